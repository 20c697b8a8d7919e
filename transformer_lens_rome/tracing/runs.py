"""The runs of a causal trace: restore states of a corrupted run, and score the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.model import passes
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change, Noise
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.tracing.kinds import KINDS, StateKind
from transformer_lens_rome.tracing.patching import window_of
from transformer_lens_rome.tracing.results import Metric, Sever


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

    model: Model
    ids: tuple[int, ...]
    subject: tuple[int, ...]
    n_prompt: int
    labels: Int[Tensor, "n_answer"]
    answer: str
    tokens: tuple[str, ...]
    metric: Metric
    foil: int | None

    @property
    def at(self) -> Int[Tensor, "n_answer"]:
        """The positions from which the answer's tokens are predicted."""
        return torch.arange(len(self.labels)) + self.n_prompt - 1

    @property
    def wanted(self) -> Int[Tensor, "n_answer k"]:
        """The tokens whose log-probabilities the metric needs: the answer's, then the foil."""
        foil = [] if self.foil is None else [torch.full_like(self.labels, self.foil)]
        return torch.stack([self.labels, *foil], 1)

    @torch.no_grad()
    def p_clean(self) -> float:
        """Run the model; return the metric without corruption."""
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

    def at_point(self, point: Point) -> Float[Tensor, "pos d"]:
        """Return the clean activations at a point."""
        return passes.read(self.model, torch.tensor([self.ids]), [point])[point][0]

    def states(self, kind: StateKind) -> list[Float[Tensor, "pos d"]]:
        """Return the clean states of a kind, by layer."""
        points = [kind.at(layer) for layer in range(self.model.cfg.n_layers)]
        activations = passes.read(self.model, torch.tensor([self.ids]), points)
        return [activations[point][0] for point in points]


class Scores(NamedTuple):
    """What runs say, by noise sample and restored cell.

    Attributes:
        metric: The metric of the answer.
        top: The token that the model ranks first after the prompt.
    """

    metric: Float[Tensor, "sample *cell"]
    top: Int[Tensor, "sample *cell"]


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
    ) -> Scores:
        """Return the scores of each sample and cell; `progress` is the name of a progress bar."""
        run, n = self.clean, len(self.rows)
        rows, at = torch.arange(n).repeat_interleave(len(run.labels)), run.at.repeat(n)
        each, scores, top = max(1, batch_size // n), [], []
        for first in tqdm(range(0, len(cells), each), desc=progress, disable=progress is None):
            batch = cells[first : first + each]
            log_probs, tokens = forward.log_probs(batch, rows, at, run.wanted.repeat(n, 1))
            scores.append(run.score(log_probs.unflatten(1, (n, -1))))
            top.append(tokens.unflatten(1, (n, -1))[..., 0])
        return Scores(torch.cat(scores).T, torch.cat(top).T)


@torch.no_grad()
def restore_each(
    corrupted: CorruptedRun, kind: str, window: int, batch_size: int, progress: bool
) -> tuple[Scores, Float[Tensor, "sample"]]:
    """Return the scores with each layer and position restored, and the metric with none restored.

    The cells of the former have two axes, layer and position.
    """
    run, n = corrupted.clean, len(corrupted.rows)
    n_layers, first = run.model.cfg.n_layers, run.subject[0]
    restored = KINDS[kind]
    clean = run.states(restored)
    scores = torch.empty(n, n_layers, run.n_prompt)
    top = torch.empty(n, n_layers, run.n_prompt, dtype=torch.long)
    for position in tqdm(range(first, run.n_prompt), desc=f"tracing {kind}", disable=not progress):
        cells = [list(_restored(clean, restored, i, position, window, n)) for i in range(n_layers)]
        forward = corrupted.from_(position)
        found = corrupted.scores(forward, cells, batch_size)
        scores[:, :, position], top[:, :, position] = found
        if position == first:
            base = corrupted.scores(forward, [[]], batch_size)
    scores[:, :, :first] = base.metric[:, :, None]  # restoring uncorrupted states changes nothing
    top[:, :, :first] = base.top[:, :, None]
    return Scores(scores, top), base.metric[:, 0]


@torch.no_grad()
def restore_some(
    corrupted: CorruptedRun,
    kind: str,
    window: int,
    cells: Sequence[Sequence[int]],
    batch_size: int,
) -> Float[Tensor, "sample cell"]:
    """Return the scores with each of some (layer, position) cells restored, in their order."""
    n, restored = len(corrupted.rows), KINDS[kind]
    clean = corrupted.clean.states(restored)
    scores = torch.empty(n, len(cells))
    for position in sorted({position for _, position in cells}):
        some = [i for i, cell in enumerate(cells) if cell[1] == position]
        layers = [cells[i][0] for i in some]
        changes = [list(_restored(clean, restored, i, position, window, n)) for i in layers]
        scores[:, some] = corrupted.scores(corrupted.from_(position), changes, batch_size).metric
    return scores


@torch.no_grad()
def sever_each(
    corrupted: CorruptedRun, sever: Sever, batch_size: int, progress: bool
) -> tuple[Float[Tensor, "sample layer"], Float[Tensor, "sample layer"], Float[Tensor, "sample"]]:
    """Return scores with the last subject token restored: ordinary, severed, and not restored.

    Severed: at that token, the layers above keep their outputs of the corrupted run.
    """
    run, n, position = corrupted.clean, len(corrupted.rows), corrupted.clean.subject[-1]
    n_layers, resid = run.model.cfg.n_layers, KINDS["resid"]
    clean = run.states(resid)
    rows, positions = torch.arange(n), torch.full((n,), position)
    forward = corrupted.from_(position)
    points = [KINDS[sever].at(layer) for layer in range(n_layers)]
    kept = [
        Change(point, rows, positions, _put(state))
        for point, state in zip(points, forward.read(points), strict=True)
    ]
    restored = [list(_restored(clean, resid, i, position, 1, n)) for i in range(n_layers)]
    severed = [[*changes, *kept[i + 1 :]] for i, changes in enumerate(restored)]
    cells = [[], *restored, *severed]
    bar = f"tracing with {sever} severed" if progress else None
    scores = corrupted.scores(forward, cells, batch_size, progress=bar).metric
    return scores[:, 1 : 1 + n_layers], scores[:, 1 + n_layers :], scores[:, 0]


def _restored(
    clean: Sequence[Float[Tensor, "pos d"]],
    kind: StateKind,
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
        point = kind.at(at)
        if point.name == "resid_post" and at + 1 < n_layers:
            point = Point("resid_pre", at + 1)
        yield Change(point, rows, positions, _put(clean[at][position]))


def _put(state: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that replaces activations by a state, or by one state per row."""
    return lambda old: state.to(old).expand_as(old)
