"""The runs of a causal trace: restore states of a corrupted run, and score the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.files.strict_json import stripped
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change, Noise
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing.patching import window_of
from transformer_lens_rome.tracing.results import Kind, Metric, Sever

_Output = Literal["resid_post", "mlp_out", "attn_out"]
_POINTS: dict[Kind, _Output] = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}


@dataclass(frozen=True)
class CleanRun:
    """A prompt and its answer, scored without corruption.

    Attributes:
        model: The model.
        ids: Tokens of the prompt and the answer, without the last one, which predicts nothing.
        subject: Positions of the subject's tokens.
        n_prompt: The number of prompt tokens in ids.
        labels: The answer's tokens; the first is predicted from position n_prompt - 1.
        answer: The answer as text.
        tokens: The prompt's tokens as text.
        metric: The metric of a score.
        foil: First token of the other answer, for "logit_diff".
    """

    model: Any
    ids: tuple[int, ...]
    subject: tuple[int, ...]
    n_prompt: int
    labels: Int[Tensor, "n_answer"]
    answer: str
    tokens: tuple[str, ...]
    metric: Metric
    foil: int | None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: Any,
        encoder: Encoder,
        prompt: str,
        span: tuple[int, int],
        *,
        answer: str | None,
        foil: str | None,
        metric: Metric,
    ) -> CleanRun:
        """Tokenise the prompt; if no answer is given, take the model's top token."""
        for text in (answer, foil):
            if text is not None and not stripped(text):
                raise ValueError(f"an answer needs a token, got the text {text!r}")
        answer = None if answer is None else stripped(answer)
        row = encoder.row(prompt, span, answer)
        if answer is None:
            last = torch.tensor([len(row.ids) - 1])
            top = passes.logits_at(model, torch.tensor([row.ids]), torch.tensor([0]), last)
            ids, n_prompt, label_ids = row.ids, len(row.ids), [int(top.argmax())]
        else:
            ids, n_prompt = row.ids[: row.target[-1]], row.target[0]
            label_ids = [row.ids[p] for p in row.target]
        foil_id = None
        if foil is not None:
            foil_row = encoder.row(prompt, None, foil)
            foil_id = foil_row.ids[foil_row.target[0]]
        decode = encoder.tokenizer.decode
        text = decode(label_ids) if answer is None else answer
        tokens = tuple(decode([i]) for i in ids[:n_prompt])
        labels = torch.tensor(label_ids)
        return cls(model, ids, row.subject, n_prompt, labels, text, tokens, metric, foil_id)

    @property
    def at(self) -> Int[Tensor, "n_answer"]:
        """The positions from which the answer's tokens are predicted."""
        return torch.arange(len(self.labels)) + self.n_prompt - 1

    @property
    def wanted(self) -> Int[Tensor, "n_answer k"]:
        """The tokens whose log-probabilities the metric needs: the answer's, then the foil."""
        foil = [] if self.foil is None else [torch.full_like(self.labels, self.foil)]
        return torch.stack([self.labels, *foil], 1)

    @property
    @torch.no_grad()
    def p_clean(self) -> float:
        """The metric without corruption."""
        rows = torch.zeros_like(self.at)
        logits = passes.logits_at(self.model, torch.tensor([self.ids]), rows, self.at)
        log_probs = logits.float().log_softmax(-1).cpu().gather(1, self.wanted)
        return self.score(log_probs[None, None]).item()

    def score(
        self, log_probs: Float[Tensor, "cell sample n_answer k"]
    ) -> Float[Tensor, "cell sample"]:
        """Compute the metric from the log-probabilities of the wanted tokens."""
        if self.metric == "logit_diff":  # equals the difference of log-probabilities
            return log_probs[..., 0, 0] - log_probs[..., 0, 1]
        total = log_probs[..., 0].sum(-1)
        return total if self.metric == "log_probability" else total.exp()

    def states(self, name: _Output) -> list[Float[Tensor, "pos d_model"]]:
        """Return the clean activations at a kind of point, by layer."""
        points = [Point(name, layer) for layer in range(self.model.cfg.n_layers)]
        activations = passes.read(self.model, torch.tensor([self.ids]), points)
        return [activations[point][0] for point in points]


@dataclass(frozen=True)
class CorruptedRun:
    """Rows with a corrupted subject: the clean tokens under noise, or other tokens.

    Attributes:
        clean: The clean run.
        rows: Token ids, one row per sample.
        noise: Noise on the embeddings of the rows.
    """

    clean: CleanRun
    rows: Sequence[Sequence[int]]
    noise: Noise | None

    def from_(self, position: int) -> PartialForward:
        """Return a partial pass that recomputes the tokens from a position on."""
        starts = [position] * len(self.rows)
        return PartialForward(self.clean.model, 0, self.rows, starts, noise=self.noise)

    def scores(
        self,
        forward: PartialForward,
        cells: Sequence[Sequence[Change]],
        batch_size: int,
        *,
        progress: str | None = None,
    ) -> Float[Tensor, "sample cell"]:
        """Return the metric of each sample and cell; `progress` is the name of a progress bar."""
        run, n = self.clean, len(self.rows)
        rows, at = torch.arange(n).repeat_interleave(len(run.labels)), run.at.repeat(n)
        each, scores = max(1, batch_size // n), []
        for first in tqdm(range(0, len(cells), each), desc=progress, disable=progress is None):
            batch = cells[first : first + each]
            log_probs = forward.log_probs(batch, rows, at, run.wanted.repeat(n, 1)).cpu()
            scores.append(run.score(log_probs.unflatten(1, (n, -1))))
        return torch.cat(scores).T


@torch.no_grad()
def restore_each(
    corrupted: CorruptedRun, kind: Kind, window: int, batch_size: int, progress: bool
) -> tuple[Float[Tensor, "sample layer pos"], Float[Tensor, "sample"]]:
    """Return the scores with each (layer, position) restored, and with nothing restored."""
    run, n = corrupted.clean, len(corrupted.rows)
    n_layers, first = run.model.cfg.n_layers, run.subject[0]
    clean = run.states(_POINTS[kind])
    scores = torch.empty(n, n_layers, run.n_prompt)
    for position in tqdm(range(first, run.n_prompt), desc=f"tracing {kind}", disable=not progress):
        cells = [list(_restored(clean, kind, i, position, window, n)) for i in range(n_layers)]
        forward = corrupted.from_(position)
        scores[:, :, position] = corrupted.scores(forward, cells, batch_size)
        if position == first:
            base = corrupted.scores(forward, [[]], batch_size)[:, 0]
    scores[:, :, :first] = base[:, None, None]  # restoring uncorrupted states changes nothing
    return scores, base


@torch.no_grad()
def sever_each(
    corrupted: CorruptedRun, sever: Sever, batch_size: int, progress: bool
) -> tuple[Float[Tensor, "sample layer"], Float[Tensor, "sample layer"], Float[Tensor, "sample"]]:
    """Return scores with the last subject token restored: ordinary, severed, and not restored.

    Severed: at that token, the layers above keep their outputs of the corrupted run.
    """
    run, n, position = corrupted.clean, len(corrupted.rows), corrupted.clean.subject[-1]
    n_layers, clean = run.model.cfg.n_layers, run.states("resid_post")
    rows, positions = torch.arange(n), torch.full((n,), position)
    forward = corrupted.from_(position)
    points = [Point(_POINTS[sever], layer) for layer in range(n_layers)]
    kept = [
        Change(point, rows, positions, _put(state))
        for point, state in zip(points, forward.read(points), strict=True)
    ]
    restored = [list(_restored(clean, "resid", i, position, 1, n)) for i in range(n_layers)]
    severed = [[*changes, *kept[i + 1 :]] for i, changes in enumerate(restored)]
    cells = [[], *restored, *severed]
    bar = f"tracing with {sever} severed" if progress else None
    scores = corrupted.scores(forward, cells, batch_size, progress=bar)
    return scores[:, 1 : 1 + n_layers], scores[:, 1 + n_layers :], scores[:, 0]


def _restored(
    clean: Sequence[Float[Tensor, "pos d_model"]],
    kind: Kind,
    layer: int,
    position: int,
    window: int,
    n: int,
) -> Iterator[Change]:
    """Yield the changes of one cell: clean states at one position of every row.

    A residual is restored where the next block starts, so that only later blocks run.
    """
    rows, positions = torch.arange(n), torch.full((n,), position)
    n_layers = len(clean)
    for at in window_of(layer, window, n_layers):
        point = Point(_POINTS[kind], at)
        if kind == "resid" and at + 1 < n_layers:
            point = Point("resid_pre", at + 1)
        yield Change(point, rows, positions, _put(clean[at][position]))


def _put(state: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that replaces activations by a state, or by one state per row."""
    return lambda old: state.to(old).expand_as(old)
