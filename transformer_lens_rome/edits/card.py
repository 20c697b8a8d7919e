"""The card (README.md) of a folder that is shared: what was edited, how to load it, how to undo it.

An edit may come from a stranger, so its texts are data: Markdown shows them as they are, and none
of them is in the YAML above the card or in its code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from transformer_lens_rome.edits.health import said
from transformer_lens_rome.files.hub import check_hub_name, is_hub_name
from transformer_lens_rome.files.markdown import code, escaped, front, quoted, table
from transformer_lens_rome.model.adapter import Weight

if TYPE_CHECKING:
    from transformer_lens_rome.edits.base import Edit

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SHOWN = 50  # facts in a card
_TAGS = ("knowledge-editing", "model-editing")


class Answers(Protocol):
    """A prompt with the model's next tokens before and after an edit: `show_edit(...).prompts`."""

    @property
    def prompt(self) -> str:
        """The text."""

    @property
    def top_before(self) -> tuple[tuple[str, float], ...]:
        """The most probable next tokens without the edit, with their probabilities."""

    @property
    def top_after(self) -> tuple[tuple[str, float], ...]:
        """The same with the edit."""

    @property
    def p_before(self) -> float:
        """The probability of the edit's target without the edit."""

    @property
    def p_after(self) -> float:
        """The same with the edit."""


@dataclass(frozen=True)
class Known:
    """The contents of a card beyond the edits.

    Attributes:
        base_model: The base model on the Hub; None if it is not known.
        revision: A branch, a tag or a commit of it; None if it is not known.
        license: The licence's identifier on the Hub, such as "apache-2.0"; None: none was stated.
        answers: Prompts with the model's answers before and after.
    """

    base_model: str | None = None
    revision: str | None = None
    license: str | None = None
    answers: Sequence[Answers] = ()

    def __post_init__(self) -> None:
        if self.base_model is not None:
            check_hub_name(self.base_model)
        for name, pattern in (("revision", _REVISION), ("license", _LICENSE)):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and pattern.fullmatch(text)):
                kind = "a branch, tag or commit" if name == "revision" else "like 'apache-2.0'"
                raise ValueError(f"{name} should be {kind}, it is {text!r:.100}")

    @classmethod
    def of(cls, edit: Edit, base_model: str | None, revision: str | None, **others: Any) -> Known:
        """Return what is known, with base model and revision of the edit's provenance as defaults.

        The provenance may come from a file, so what cannot be a name in it is left out.
        """
        made_on, commit = (edit.provenance.get(name) for name in ("model", "revision"))
        if base_model is None and is_hub_name(made_on, owned=True):
            base_model = made_on
            if revision is None and isinstance(commit, str) and _REVISION.fullmatch(commit):
                revision = commit
        return cls(base_model, revision, **others)

    @property
    def model(self) -> str:
        """The base model and its revision, in Markdown."""
        if self.base_model is None:
            return "not known"
        return f"`{self.base_model}`" + (f", revision `{self.revision}`" if self.revision else "")


def edit_card(edit: Edit, known: Known, name: str) -> str:
    """Return the card of an edit's folder.

    Args:
        edit: The edit.
        known: What else is known.
        name: The repository on the Hub, or the name of the folder, for `load_edit`.
    """
    rows = [
        ("base model", known.model),
        *_fact(edit),
        ("changes", f"{_places(edit)} ({type(edit).__name__})"),
        ("made on weights with sha256", escaped(edit.model_hash) or "not known"),
        ("statistics of keys (C)", _statistics(edit)),
    ]
    health = [(escaped(key), escaped(value)) for key, value in said(edit.health)]
    parts = [
        _front(known, "transformer-lens-rome", "transformer-lens"),
        _title(edit),
        "Written into a language model by a change of its weights.",
        table(("", ""), rows),
        *_facts(edit),
        *_before_and_after(known),
        "## Health",
        table(("measured when the edit was made", ""), health or [("nothing", "")]),
        "## Load and undo",
        code(
            "from transformer_lens.model_bridge import TransformerBridge",
            "from transformer_lens_rome import apply_edit, load_edit",
            "",
            f"model = TransformerBridge.boot_transformers({_base(known)})",
            f"on = apply_edit(model, load_edit({json.dumps(name)}))",
            "on.revert()  # the old weights again, bit for bit",
        ),
        "`apply_edit` refuses a model whose weights are not those that the edit was made on. "
        "`edit * 0.5` is weaker, `-edit` the opposite.",
        *_terms(known),
    ]
    return "\n\n".join(parts) + "\n"


def adapter_card(
    edits: Sequence[Edit],
    known: Known,
    ranks: Mapping[str, int],
    lost: Sequence[tuple[Weight, float]],
) -> str:
    """Return the card of an adapter's folder.

    Args:
        edits: The edits that the adapter adds.
        known: What else is known.
        ranks: The rank of the change of each module, by its path.
        lost: The weights whose change was approximated, with the share of its norm that is lost.
    """
    head = ("prompt", "subject", "new answer", "changes", "statistics of keys (C)", "health")
    facts = [
        (
            *map(quoted, (one.prompt, one.subject, one.target_new)),
            _places(edit),
            _statistics(edit),
            "; ".join(f"{escaped(key)} {escaped(value)}" for key, value in said(edit.health)),
        )
        for edit in edits
        for one in edit.requests
    ]
    at = f", revision={json.dumps(known.revision)}" if known.revision else ""
    parts = [
        _front(known, "peft", "lora", "transformers", pipeline_tag="text-generation"),
        f"# {_counted(len(facts), 'edited fact')} as a LoRA adapter",
        f"Base model: {known.model}. The adapter was computed, not trained: it adds to some "
        "matrices the change that writes these facts.",
        *_shown(head, facts),
        *(
            f"The change of {where.name} of layer {where.layer} has no low rank. What is written "
            f"is its best approximation, without {share:.2%} of its norm (Frobenius)."
            for where, share in lost
        ),
        table(("module", "rank"), [(f"`{path}`", str(rank)) for path, rank in ranks.items()]),
        *_before_and_after(known),
        "## Load and undo",
        code(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({_base(known)}{at})",
            'model = PeftModel.from_pretrained(base, "FOLDER_OR_NAME")',
            "with model.disable_adapter():",
            "    ...  # the base model",
            "base = model.unload()  # or merge_and_unload(): the change is added to the weights",
        ),
        *_terms(known),
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- parts of both


def _title(edit: Edit) -> str:
    """Return the heading: the fact, or how many facts there are."""
    if len(edit.requests) > 1:
        return f"# {_counted(len(edit.requests), 'fact')}, written by one edit"
    return f"# {quoted(edit.request.subject)}: {quoted(edit.request.target_new)}"


def _fact(edit: Edit) -> list[tuple[str, str]]:
    """Return what was written, if it is one fact."""
    if len(edit.requests) > 1:
        return []
    true = edit.request.target_true
    return [
        ("prompt", quoted(edit.request.prompt)),
        ("subject", quoted(edit.request.subject)),
        ("new answer", quoted(edit.request.target_new)),
        ("old answer", "not stated" if true is None else quoted(true)),
    ]


def _facts(edit: Edit) -> list[str]:
    """Return a table of the facts with their probabilities, if there are several."""
    if len(edit.requests) == 1:
        return []
    head = ("prompt", "subject", "new answer", "P(new answer) before", "after")
    measured = [(f"{fact.p_before:.3g}", f"{fact.p_after:.3g}") for fact in edit.health.facts]
    measured = measured or [("", "")] * len(edit.requests)  # of a scaled edit, nothing is known
    rows = [
        (*map(quoted, (one.prompt, one.subject, one.target_new)), *p)
        for one, p in zip(edit.requests, measured, strict=False)
    ]
    return ["## Facts", *_shown(head, rows)]


def _shown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table of the first rows, and how many there are if those are not all."""
    rest = [f"{_SHOWN} of {len(rows)} facts."] if len(rows) > _SHOWN else []
    return [table(head, rows[:_SHOWN]), *rest]


def _counted(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def _front(known: Known, library: str, *tags: str, **others: str) -> str:
    """Return the YAML of a card; PEFT's own cards have the first tag too."""
    of_base = [f"base_model:adapter:{known.base_model}"] if known.base_model else []
    plain = {"library_name": library, "base_model": known.base_model, "license": known.license}
    return front({**plain, **others, "tags": [*of_base, *tags, *_TAGS]})


def _base(known: Known) -> str:
    return json.dumps(known.base_model or "BASE_MODEL")


def _places(edit: Edit) -> str:
    return escaped(", ".join(f"{where.name} of layer {where.layer}" for where in edit.sizes()))


def _statistics(edit: Edit) -> str:
    """Return where C, the second moment of keys, came from."""
    moments = edit.provenance.get("second_moments")
    if not isinstance(moments, Mapping):
        moments = {"": edit.provenance.get("second_moment")}
    said_of = [
        (f"layer {layer}: " if layer else "") + ", ".join(f"{k} {v}" for k, v in moment.items())
        for layer, moment in moments.items()
        if isinstance(moment, Mapping)
    ]
    return escaped("; ".join(said_of)) or "none recorded"


def _tops(top: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{quoted(token)} {p:.3f}" for token, p in top)


def _before_and_after(known: Known) -> list[str]:
    """Return the section of answers, or nothing if there are none."""
    if not known.answers:
        return []
    head = ("prompt", "next token before", "after", "P(new answer) before", "after")
    rows = [
        (quoted(a.prompt), _tops(a.top_before), _tops(a.top_after), f"{a.p_before:.3g}")
        + (f"{a.p_after:.3g}",)
        for a in known.answers
    ]
    return ["## Before and after", table(head, rows)]


def _terms(known: Known) -> list[str]:
    stated = f"Licence: {known.license}." if known.license else "No licence was stated."
    return [
        "An edit changes what a model says after some prompts. Others may change too, so measure "
        "it before you rely on it.",
        f"{stated} The terms of the base model hold for what is made of it.",
    ]
