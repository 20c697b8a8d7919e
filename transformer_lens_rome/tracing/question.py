"""The question of a trace: a prompt with a subject, and the answer that is scored."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import torch

from transformer_lens_rome.files.strict_json import check_edges, stripped
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing.results import Metric
from transformer_lens_rome.tracing.runs import CleanRun


@dataclass(frozen=True)
class Question:
    """A prompt, its subject and its answer; the fields are arguments of `causal_trace`."""

    prompt: str
    subject: str
    answer: str | None = None
    foil: str | None = None
    metric: Metric = "probability"
    occurrence: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in ("probability", "log_probability", "logit_diff"):
            raise ValueError(
                "metric must be 'probability', 'log_probability' or 'logit_diff', got "
                f"{self.metric!r}"
            )
        if (self.metric == "logit_diff") != (self.foil is not None):
            raise ValueError("foil= (the other answer) and metric='logit_diff' go together")
        for text in (self.answer, self.foil):
            if text is not None and not stripped(text):
                raise ValueError(f"an answer needs a token, got the text {text!r}")

    def span(self) -> tuple[int, int]:
        """Return where the subject starts and ends in the prompt, in characters (end exclusive).

        Raises:
            ValueError: the subject does not occur, or occurs several times and none was chosen.
        """
        check_edges(self.subject)
        prompt, subject = self.prompt, self.subject.strip()
        starts = [i for i in range(len(prompt)) if subject and prompt.startswith(subject, i)]
        if not starts:
            alike, within = (unicodedata.normalize("NFC", text) for text in (subject, prompt))
            same = subject and alike in within
            raise ValueError(
                f"the subject {subject!r} does not occur in the prompt {prompt!r}"
                + ("; their accents are written differently (NFC and NFD)" if same else "")
            )
        if self.occurrence is None and len(starts) > 1:
            raise ValueError(
                f"the subject {subject!r} occurs {len(starts)} times in {prompt!r}; choose one "
                f"with occurrence=0 to {len(starts) - 1}"
            )
        chosen = self.occurrence or 0
        if not 0 <= chosen < len(starts):
            raise ValueError(f"occurrence {chosen} of {subject!r}: there are {len(starts)}")
        return starts[chosen], starts[chosen] + len(subject)

    @torch.no_grad()
    def clean_run(self, model: Model, encoder: Encoder) -> CleanRun:
        """Tokenise the prompt; if no answer is given, take the model's top token."""
        answer = None if self.answer is None else stripped(self.answer)
        row = encoder.row(self.prompt, self.span(), answer)
        if answer is None:
            last = torch.tensor([len(row.ids) - 1])
            top = passes.logits_at(model, torch.tensor([row.ids]), torch.tensor([0]), last)
            ids, n_prompt, label_ids = row.ids, len(row.ids), [int(top.argmax())]
        else:
            ids, n_prompt = row.ids[: row.target[-1]], row.target[0]
            label_ids = [row.ids[p] for p in row.target]
        foil_id = None
        if self.foil is not None:
            foil_row = encoder.row(self.prompt, None, self.foil)
            foil_id = foil_row.ids[foil_row.target[0]]
        decode = encoder.tokenizer.decode
        return CleanRun(
            model=model,
            ids=ids,
            subject=row.subject,
            n_prompt=n_prompt,
            labels=torch.tensor(label_ids),
            answer=decode(label_ids) if answer is None else answer,
            tokens=tuple(decode([i]) for i in ids[:n_prompt]),
            metric=self.metric,
            foil=foil_id,
        )
