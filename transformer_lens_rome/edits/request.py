"""The fact that an edit writes: a prompt, its subject, and the new continuation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens_rome.files.strict_json import check_edges, check_text, stripped


@dataclass(frozen=True)
class EditRequest:
    """A fact to write: the model should continue `prompt`, with `subject` in it, by `target_new`.

    Attributes:
        prompt: Text with exactly one `{}`, which the subject replaces.
        subject: The subject, as written in the prompt.
        target_new: The new continuation; it follows the prompt after one space. White space around
            it is removed, here and in `target_true`.
        target_true: The old continuation, if known; methods may use it, ROME does not.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new", "target_true"):
            text = getattr(self, name)
            if not isinstance(text, str) and (name, text) != ("target_true", None):
                raise ValueError(f"{name} should be a text, it is {text!r:.60}")
            check_text(text or "")
        holes = self.prompt.count("{}")
        if holes != 1:
            raise ValueError(
                f"the prompt needs exactly one '{{}}' where the subject goes, found {holes} in "
                f"{self.prompt!r:.200}; write for instance 'The mother tongue of {{}} is'"
            )
        if not stripped(self.subject):
            raise ValueError("the subject is empty; give the text that replaces '{}' in the prompt")
        check_edges(self.subject)
        if "{}" in self.subject:
            raise ValueError(f"the subject {self.subject!r:.200} contains '{{}}'; give plain text")
        for name in ("target_new", "target_true"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, stripped(text))
        if not self.target_new:
            raise ValueError("target_new is empty; give the text that should follow the prompt")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @classmethod
    def of(cls, request: EditRequest | Mapping[str, Any]) -> EditRequest:
        """Return an `EditRequest` as it is, and a dict as `from_dict` reads it.

        Raises:
            ValueError: it is neither, or a dict that describes no request.
        """
        return request if isinstance(request, EditRequest) else cls.from_dict(request)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditRequest:
        """Read the released ROME format, or a flat CounterFact record.

        Released: `{"prompt": "... {} ...", "subject", "target_new": {"str": ...}, ...}`. Flat:
        `{"prompt", "subject", "target_new", "ground_truth"}`, where the prompt contains the
        subject exactly once.
        """
        if not isinstance(record, Mapping):
            raise ValueError(
                f"a request is an EditRequest or a dict, got {record!r:.80}; write for instance "
                "EditRequest('The mother tongue of {} is', 'Danielle Darrieux', 'English')"
            )
        if missing := {"prompt", "subject", "target_new"} - set(record):
            has = sorted(map(str, record))
            raise ValueError(f"the request lacks {sorted(missing)}; it has {has!r:.300}")
        prompt, subject = record["prompt"], record["subject"]
        if isinstance(prompt, str) and isinstance(subject, str) and "{}" not in prompt:
            if (times := prompt.count(subject)) != 1:
                raise ValueError(
                    f"the subject {subject!r:.200} occurs {times} times in {prompt!r:.200}; "
                    "put '{}' in the prompt where the subject is meant"
                )
            prompt = prompt.replace(subject, "{}")
        true = record.get("target_true", record.get("ground_truth"))
        return cls(
            prompt, subject, _text(record["target_new"]), None if true is None else _text(true)
        )


def _text(target: Any) -> Any:
    """Return the text of a target in either format; `EditRequest` checks that it is a text."""
    return target.get("str") if isinstance(target, Mapping) else target
