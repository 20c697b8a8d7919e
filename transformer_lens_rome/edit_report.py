"""Compare a model before and after an edit: traces, top tokens, neurons and other prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.edits.added_values import AddedValues, added_values
from transformer_lens_rome.edits.kinds import Edit, EditRequest
from transformer_lens_rome.edits.ledger import AppliedEdit, active_edits, applied, without
from transformer_lens_rome.edits.lens import EditLens, edit_lens
from transformer_lens_rome.files.result import Result
from transformer_lens_rome.model import passes, refusals
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_log_probs
from transformer_lens_rome.showing import Shown, figure
from transformer_lens_rome.tracing.causal_trace import causal_trace
from transformer_lens_rome.tracing.kinds import Kind
from transformer_lens_rome.tracing.results import CausalTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LIKELY = 10
"""The number of most probable tokens that a page shows at each position."""


@dataclass(frozen=True)
class PromptChange:
    """The changes at one prompt due to the edit.

    Attributes:
        prompt: The text.
        top_before, top_after: The most probable next tokens, with their probabilities.
        p_before, p_after: Probability of the edit's target after this prompt.
        divergence: KL(before || after) of the next token, in nats.
        value_shift: The largest ||k delta W|| / ||v|| over the prompt's tokens except BOS, and over
            the layers whose W_out the edit changes, with each token's key k and value v before the
            edit. None if no W_out changes.
        token: The token with the largest shift.
        layer: The layer with the largest shift.
    """

    prompt: str
    top_before: tuple[tuple[str, float], ...]
    top_after: tuple[tuple[str, float], ...]
    p_before: float
    p_after: float
    divergence: float
    value_shift: float | None
    token: str
    layer: int | None = None


@dataclass(frozen=True, eq=False)
class EditReport(Result, Shown):
    """The changes due to an edit; a notebook shows it as the last value of a cell.

    Attributes:
        request: The requested fact.
        layer: The edited layer; the first one if the edit changes several.
        before: Trace of the edited prompt without the edit, for the model's answer without it.
        after: Trace of the edited prompt with the edit, for the edit's target.
        prompts: The changes at each prompt, the edited one first.
        shares: The share of each neuron in the vector that the edit adds to the value at the edited
            prompt's last subject token: with key k, `<k_i delta_i, k delta> / ||k delta||^2`. The
            shares sum to 1. None if the edit changes no W_out.
        tokens: The tokens of the edited prompt with the target, as text.
        ids: The ids of these tokens.
        log_probs: Log-probabilities of the next token after each of them, before and after the
            edit, in nats.
        texts: The text of each token that was likely at some position, by its id.
        attention: Attention patterns before and after, in the layer where they changed most.
        attention_layer: The layer of `attention`.
        layers: Every edited layer.
        shares_layer: The layer of `shares` and `lens`: of the layers whose W_out changes, the one
            where the value at that token changes most, `||k delta|| / ||v||`.
        lens: That layer's change read in tokens. None if the edit changes no W_out.
    """

    request: EditRequest
    layer: int
    before: CausalTrace
    after: CausalTrace
    prompts: tuple[PromptChange, ...]
    shares: Float[Tensor, "d_mlp"] | None
    tokens: tuple[str, ...]
    ids: Int[Tensor, "pos"] = field(repr=False)
    log_probs: Float[Tensor, "2 pos d_vocab"] = field(repr=False)
    texts: Mapping[str, str] = field(repr=False)
    attention: Float[Tensor, "2 head dest src"] = field(repr=False)
    attention_layer: int
    layers: tuple[int, ...] = ()
    shares_layer: int | None = None
    lens: EditLens | None = None

    FORMAT: ClassVar[str] = "transformer_lens_rome.edit_report.1"

    def __post_init__(self) -> None:
        if not self.layers:  # the file of an edit of one W_out may leave them out
            object.__setattr__(self, "layers", (self.layer,))
            object.__setattr__(self, "shares_layer", self.layer)

    def top_neurons(self, k: int = 10) -> list[tuple[int, float]]:
        """Return the k neurons with the largest shares, and their shares."""
        shares = self._known_shares()
        best = shares.topk(min(k, len(shares)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def neurons_for(self, share: float) -> int:
        """Return the smallest number of neurons, largest first, with this total share."""
        ordered = self._known_shares().sort(descending=True).values
        return int((ordered.cumsum(0) < share).sum()) + 1

    def _known_shares(self) -> Tensor:
        if self.shares is None:
            raise ValueError("this edit changes no W_out, so neurons have no shares of its change")
        return self.shares

    def plot(self) -> Figure:
        """Return one matplotlib figure of the report (the `plot` extra)."""
        return figure(self)


@model_call
def show_edit(
    model: Model,
    edit: Edit | AppliedEdit,
    prompts: Sequence[str] = (),
    *,
    fact: int = 0,
    kind: Kind = "resid",
    noise_std: float | None = None,
    n_samples: int = 5,
    seed: int = 0,
    prepend_bos: bool | None = None,
    force: bool = False,
    progress: bool = True,
) -> EditReport:
    """Compare the model without and with an edit; afterwards the model is in its old state.

    Args:
        model: A HookedTransformer or TransformerBridge.
        edit: An edit, applied to the model or not.
        prompts: Other prompts: paraphrases, neighbours, prompts that should not change.
        fact: If the edit writes many facts: the number of the shown one in `edit.requests`.
        kind: The states that the traces restore, as for `causal_trace`.
        noise_std: Noise of the traces; None: 3 sigma of the subject's embeddings.
        n_samples: The number of noise samples.
        seed: The seed of the noise.
        prepend_bos: Overrides the checkpoint's rule.
        force: Accept an edit that was made on other weights than the model's.
        progress: Show progress bars.

    Raises:
        ValueError: `edit` is not an edit or `prompts` is not a list, the edit changes nothing or
            has no such fact, it was made on another weight, or other code changed the weight since
            it was edited.
    """
    edit = edit.edit if isinstance(edit, AppliedEdit) else edit
    if not isinstance(edit, Edit) or isinstance(prompts, str):
        raise ValueError("show_edit takes one edit, and prompts as a list of texts")
    if not 0 <= fact < len(edit.requests):
        raise ValueError(f"this edit has the facts 0 to {len(edit.requests) - 1}, got {fact}")
    layers = sorted({where.layer for where in edit.sizes() if edit.change(where).any()})
    if not layers:
        raise ValueError("this edit changes nothing; there is nothing to show")
    refusals.check_editable(model, layers)
    force = force or any(edit.digest == one.digest for one in active_edits(model, edit.layer))
    encoder, request = Encoder.of(model, prepend_bos), edit.requests[fact]
    trace = partial(
        causal_trace,
        model,
        request.text,
        request.subject,
        kind=kind,
        noise_std=noise_std,
        n_samples=n_samples,
        seed=seed,
        prepend_bos=prepend_bos,
        progress=progress,
        occurrence=_occurrence(request),
    )
    with without(model, edit):
        was = _State.of(model, encoder, request, prompts)
        added = added_values(model, encoder, edit, was.ids, request)
        before = trace()
        with applied(model, edit, force=force):
            now = _State.of(model, encoder, request, prompts)
            after = trace(answer=request.target_new)
    return EditReport(
        request=request,
        layer=edit.layer,
        before=before,
        after=after,
        prompts=tuple(_changes(encoder, was, now, added)),
        layers=tuple(layers),
        **_inside(model, encoder, added, was),
        **_explorable(encoder, was, now),
    )


def _occurrence(request: EditRequest) -> int:
    """Return the index of the edited occurrence of the subject in the text."""
    subject, before = request.subject.strip(), request.prompt.index("{}")
    start = request.text.index(subject, before)
    return sum(request.text.startswith(subject, i) for i in range(start))


@dataclass(frozen=True, eq=False)
class _State:
    """Scores and attention patterns of the model, with or without the edit.

    The lists have an entry per prompt, the edited one first. `full_ids`, `log_probs` and `patterns`
    belong to the edited prompt followed by the target.
    """

    prompts: list[str]
    next: list[Float[Tensor, "d_vocab"]]
    p_target: list[float]
    ids: list[list[int]]
    full_ids: list[int]
    log_probs: Float[Tensor, "pos d_vocab"]
    patterns: Float[Tensor, "layer head dest src"]

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: Model, encoder: Encoder, request: EditRequest, prompts: Sequence[str]
    ) -> _State:
        """Run the model and read its scores and attention patterns."""
        texts = [request.text, *prompts]
        ids = [encoder.row(text).ids for text in texts]
        scores = target_log_probs(model, texts, [request.target_new] * len(texts), encoder=encoder)
        full_ids = encoder.row(request.text, None, request.target_new).ids
        points = [Point("pattern", layer) for layer in range(model.cfg.n_layers)]
        patterns = passes.read(model, torch.tensor([full_ids]), points)
        return cls(
            prompts=texts,
            next=[_log_probs(model, row, [len(row) - 1])[0] for row in ids],
            p_target=[score.sum().exp().item() for score in scores],
            ids=[list(row) for row in ids],
            full_ids=list(full_ids),
            log_probs=_log_probs(model, full_ids, range(len(full_ids))),
            patterns=torch.stack([patterns[point][0].float().cpu() for point in points]),
        )


def _log_probs(
    model: Model, ids: Sequence[int], positions: Sequence[int]
) -> Float[Tensor, "pos d_vocab"]:
    """Return log-probabilities of the next token at some positions of a text."""
    at = torch.tensor(list(positions))
    logits = passes.logits_at(model, torch.tensor([list(ids)]), torch.zeros_like(at), at)
    return logits.float().log_softmax(-1).cpu()


def _inside(
    model: Model, encoder: Encoder, added: Sequence[AddedValues], was: _State
) -> dict[str, Any]:
    """Return the neurons and the lens of the layer where the subject's value changes most."""
    most = max(added, key=lambda one: one.at_subject, default=None)
    if most is None:
        return {"shares": None}
    target = was.full_ids[len(was.ids[0])]
    lens = edit_lens(model, encoder, most, was.ids, target)
    return {"shares": most.shares, "shares_layer": most.layer, "lens": lens}


def _changes(
    encoder: Encoder, was: _State, now: _State, added: Sequence[AddedValues]
) -> Iterator[PromptChange]:
    """Yield one comparison per prompt."""
    decode = encoder.tokenizer.decode

    def top(log_probs: Tensor) -> tuple[tuple[str, float], ...]:
        best = log_probs.exp().topk(3)
        return tuple((decode([i]), p) for p, i in zip(best.values.tolist(), best.indices))

    for i, prompt in enumerate(was.prompts):
        start = 1 if encoder.prepends_bos and len(was.ids[i]) > 1 else 0  # BOS is the same always
        largest = [(one.shifts[i][start:].max().item(), one) for one in added]
        shift, most = max(largest, key=lambda pair: pair[0], default=(None, None))
        at = None if most is None else start + int(most.shifts[i][start:].argmax())
        p = was.next[i].exp()
        yield PromptChange(
            prompt=prompt,
            top_before=top(was.next[i]),
            top_after=top(now.next[i]),
            p_before=was.p_target[i],
            p_after=now.p_target[i],
            divergence=(p * (was.next[i] - now.next[i])).sum().item(),
            value_shift=shift,
            token="" if at is None else decode([was.ids[i][at]]),
            layer=None if most is None else most.layer,
        )


def _explorable(encoder: Encoder, was: _State, now: _State) -> dict[str, Any]:
    """Return the report's log-probabilities, and the attention of the layer that changed most."""
    decode = encoder.tokenizer.decode
    at = int((now.patterns - was.patterns).abs().amax((1, 2, 3)).argmax())
    log_probs = torch.stack([was.log_probs, now.log_probs])
    likely = log_probs.topk(min(_LIKELY, log_probs.shape[-1])).indices.unique().tolist()
    return {
        "tokens": tuple(decode([i]) for i in was.full_ids),
        "ids": torch.tensor(was.full_ids),
        "log_probs": log_probs,
        "texts": {str(i): decode([i]) for i in (*likely, *was.full_ids)},
        "attention": torch.stack([was.patterns[at], now.patterns[at]]),
        "attention_layer": at,
    }
