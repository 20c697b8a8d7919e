"""What did an edit change? Traces, top tokens, neurons and neighbours, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.edits.kinds import Edit, EditRequest
from transformer_lens_rome.edits.ledger import AppliedEdit, active_edits, applied, without
from transformer_lens_rome.files.result import Result
from transformer_lens_rome.model import passes, refusals
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_log_probs
from transformer_lens_rome.showing import Shown, figure
from transformer_lens_rome.tracing.causal_trace import causal_trace
from transformer_lens_rome.tracing.results import CausalTrace, Kind

_LIKELY = 10
"""How many of the likeliest tokens a page shows at each place."""


@dataclass(frozen=True)
class PromptChange:
    """What the edit changed at one prompt.

    Attributes:
        prompt: The text.
        top_before, top_after: The most probable next tokens, with their probabilities.
        p_before, p_after: Probability of the edit's target after this prompt.
        divergence: KL(before || after) of the next token, in nats.
        value_shift: The largest ||k delta W|| / ||v|| over the prompt's tokens but BOS, with each
            token's key k and value v at the edited layer before the edit.
        token: The token where that is.
    """

    prompt: str
    top_before: tuple[tuple[str, float], ...]
    top_after: tuple[tuple[str, float], ...]
    p_before: float
    p_after: float
    divergence: float
    value_shift: float
    token: str


@dataclass(frozen=True, eq=False)
class EditReport(Result, Shown):
    """What an edit changed; the last value of a notebook cell shows it.

    Attributes:
        request: What was asked for.
        layer: The edited layer.
        before: Trace of the edited prompt without the edit, of what the model said then.
        after: The same with the edit, of the edit's target.
        prompts: What changed at each prompt, the edited one first.
        shares: The part of each neuron in what the edit adds to the value at the edited prompt's
            last subject token: with key k, `<k_i delta_i, k delta> / ||k delta||^2`. Sums to 1.
        tokens: The edited prompt with the target, token by token, as text.
        ids: Their ids.
        log_probs: What the model expected after each of them, before and after, in nats.
        texts: The text of each token that was likely somewhere, by its id.
        attention: Attention patterns in the layer where they changed most, before and after.
        attention_layer: That layer.
    """

    request: EditRequest
    layer: int
    before: CausalTrace
    after: CausalTrace
    prompts: tuple[PromptChange, ...]
    shares: Float[Tensor, "d_mlp"]
    tokens: tuple[str, ...]
    ids: Int[Tensor, "pos"] = field(repr=False)
    log_probs: Float[Tensor, "2 pos d_vocab"] = field(repr=False)
    texts: Mapping[str, str] = field(repr=False)
    attention: Float[Tensor, "2 head dest src"] = field(repr=False)
    attention_layer: int

    FORMAT: ClassVar[str] = "transformer_lens_rome.edit_report.1"

    def top_neurons(self, k: int = 10) -> list[tuple[int, float]]:
        """The neurons with the largest shares."""
        best = self.shares.topk(min(k, len(self.shares)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def neurons_for(self, share: float) -> int:
        """How many neurons, the largest first, make up a share of what is added to the value."""
        return int((self.shares.sort(descending=True).values.cumsum(0) < share).sum()) + 1

    def plot(self) -> Any:
        """One figure of it all, with matplotlib (the `plot` extra)."""
        return figure(self)


@model_call
def show_edit(
    model: Any,
    edit: Edit | AppliedEdit,
    prompts: Sequence[str] = (),
    *,
    kind: Kind = "resid",
    noise_std: float | None = None,
    n_samples: int = 5,
    seed: int = 0,
    prepend_bos: bool | None = None,
    force: bool = False,
    progress: bool = True,
) -> EditReport:
    """Compare the model without and with an edit; afterwards it is as it was, edited or not.

    Args:
        model: A HookedTransformer or TransformerBridge.
        edit: An edit, on the model or not.
        prompts: What else to ask: paraphrases, neighbours, prompts that should not change.
        kind: What the traces restore, as for `causal_trace`.
        noise_std: Noise of the traces; None: 3 sigma of the subject's embeddings.
        n_samples: How many noises are drawn.
        seed: For drawing them.
        prepend_bos: Overrides the checkpoint's own rule.
        force: Also where W_out is not the weight that the edit was made on.
        progress: Show progress bars.

    Raises:
        ValueError: not an edit or not a list of prompts, an edit that changes nothing, or other
            matrices than one W_out, or was made on another weight, or a weight that something
            else changed since it was edited.
    """
    edit = edit.edit if isinstance(edit, AppliedEdit) else edit
    if not isinstance(edit, Edit) or isinstance(prompts, str):
        raise ValueError("show_edit takes one edit, and prompts as a list of texts")
    refusals.check_editable(model, [edit.layer])
    if not edit.delta().any():
        raise ValueError("this edit changes nothing; there is nothing to show")
    force = force or any(edit.digest == one.digest for one in active_edits(model, edit.layer))
    encoder, request = Encoder.of(model, prepend_bos), edit.request
    options = {"kind": kind, "noise_std": noise_std, "n_samples": n_samples, "seed": seed}
    options |= {"prepend_bos": prepend_bos, "progress": progress}
    options |= {"occurrence": _occurrence(request)}
    traced = (model, request.text, request.subject)
    with without(model, edit):
        was = _State.of(model, encoder, edit, prompts)
        before = causal_trace(*traced, **options)
        with applied(model, edit, force=force):
            now = _State.of(model, encoder, edit, prompts)
            after = causal_trace(*traced, answer=request.target_new, **options)
    delta = edit.delta().to(was.keys[0])
    row = encoder.templated_row(request.prompt, request.subject)
    return EditReport(
        request=request,
        layer=edit.layer,
        before=before,
        after=after,
        prompts=tuple(_changes(encoder, was, now, delta)),
        shares=_shares(was.keys[0][row.subject[-1]], delta),
        **_explored(encoder, was, now),
    )


def _occurrence(request: EditRequest) -> int:
    """Which of the places where the subject stands in the text is the edited one."""
    subject, before = request.subject.strip(), request.prompt.index("{}")
    start = request.text.index(subject, before)
    return sum(request.text.startswith(subject, i) for i in range(start))


@dataclass(frozen=True, eq=False)
class _State:
    """What is read from the model, once without and once with the edit.

    The lists have an entry a prompt, the edited one first; `log_probs` and `patterns` are of the
    edited prompt followed by the target.
    """

    prompts: list[str]
    next: list[Float[Tensor, "d_vocab"]]
    p_target: list[float]
    ids: list[list[int]]
    keys: list[Float[Tensor, "pos d_mlp"]]
    values: list[Float[Tensor, "pos d_model"]]
    told: list[int]
    log_probs: Float[Tensor, "pos d_vocab"]
    patterns: Float[Tensor, "layer head dest src"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, encoder: Encoder, edit: Edit, prompts: Sequence[str]) -> _State:
        """Read it all."""
        request, texts = edit.request, [edit.request.text, *prompts]
        ids = [encoder.row(text).ids for text in texts]
        key, value = Point("key", edit.layer), Point("value", edit.layer)
        read = [passes.read(model, torch.tensor([row]), [key, value]) for row in ids]
        scores = target_log_probs(model, texts, [request.target_new] * len(texts), encoder=encoder)
        told = encoder.row(request.text, None, request.target_new).ids
        points = [Point("pattern", layer) for layer in range(model.cfg.n_layers)]
        patterns = passes.read(model, torch.tensor([told]), points)
        return cls(
            prompts=texts,
            next=[_log_probs(model, row, [len(row) - 1])[0] for row in ids],
            p_target=[score.sum().exp().item() for score in scores],
            ids=[list(row) for row in ids],
            keys=[found[key][0].float().cpu() for found in read],
            values=[found[value][0].float().cpu() for found in read],
            told=list(told),
            log_probs=_log_probs(model, told, range(len(told))),
            patterns=torch.stack([patterns[point][0].float().cpu() for point in points]),
        )


def _log_probs(
    model: Any, ids: Sequence[int], positions: Sequence[int]
) -> Float[Tensor, "pos d_vocab"]:
    """Log-probabilities of what follows some tokens of a text."""
    at = torch.tensor(list(positions))
    logits = passes.logits_at(model, torch.tensor([list(ids)]), torch.zeros_like(at), at)
    return logits.float().log_softmax(-1).cpu()


def _shares(key: Float[Tensor, "d_mlp"], delta: Float[Tensor, "d_mlp d_model"]) -> Tensor:
    """Each neuron's part of what the edit adds to the value of this key."""
    added = key @ delta
    return key * (delta @ added) / added.square().sum()


def _changes(
    encoder: Encoder, was: _State, now: _State, delta: Float[Tensor, "d_mlp d_model"]
) -> Iterator[PromptChange]:
    """One comparison a prompt."""
    decode = encoder.tokenizer.decode

    def top(log_probs: Tensor) -> tuple[tuple[str, float], ...]:
        best = log_probs.exp().topk(3)
        return tuple((decode([i]), p) for p, i in zip(best.values.tolist(), best.indices))

    for i, prompt in enumerate(was.prompts):
        shift = (was.keys[i] @ delta).norm(dim=1) / was.values[i].norm(dim=1)
        start = 1 if encoder.prepends_bos and len(shift) > 1 else 0  # BOS is the same everywhere
        most = start + int(shift[start:].argmax())
        p = was.next[i].exp()
        yield PromptChange(
            prompt=prompt,
            top_before=top(was.next[i]),
            top_after=top(now.next[i]),
            p_before=was.p_target[i],
            p_after=now.p_target[i],
            divergence=(p * (was.next[i] - now.next[i])).sum().item(),
            value_shift=shift[most].item(),
            token=decode([was.ids[i][most]]),
        )


def _explored(encoder: Encoder, was: _State, now: _State) -> dict[str, Any]:
    """What there is to explore: log-probabilities, and attention where it changed most."""
    decode = encoder.tokenizer.decode
    at = int((now.patterns - was.patterns).abs().amax((1, 2, 3)).argmax())
    log_probs = torch.stack([was.log_probs, now.log_probs])
    likely = log_probs.topk(min(_LIKELY, log_probs.shape[-1])).indices.unique().tolist()
    return {
        "tokens": tuple(decode([i]) for i in was.told),
        "ids": torch.tensor(was.told),
        "log_probs": log_probs,
        "texts": {str(i): decode([i]) for i in (*likely, *was.told)},
        "attention": torch.stack([was.patterns[at], now.patterns[at]]),
        "attention_layer": at,
    }
