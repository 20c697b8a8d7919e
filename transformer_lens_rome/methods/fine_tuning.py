"""FT and FT+L: fine-tune one MLP's output matrix on the fact (Meng et al. 2022, section 3.4).

    min over W_out of -log P(target | prompt)        by Adam, until it is below `stop_loss`
    FT+L: |W_out - W_out before| <= eps, entry by entry, after every update

W_out changes nothing below it, so the keys k of the prompt stay fixed, and its output is
k W_out + b_out. Only copies of W_out and b_out are optimised; no parameter of the model changes.
Each step runs only the layers above. Several requests share these passes, each with copies of its
own, so that each is trained as it would be alone, up to rounding.

Where paper, released code and this module differ:

    what                paper          released code                     here
    what is trained     W_out          W_out and b_out                   `bias=True`: both
    scored at           -              all target tokens at the prompt's `objective="last_token"`;
                                       last token, without feeding any   or "teacher_forced"
    stop at loss        3e-2           1e-2                              1e-2
    layer, eps          per model      per model                         the same; others 0, 5e-4
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.edits.kinds import DenseEdit, EditRequest
from transformer_lens_rome.edits.measure import measured_each
from transformer_lens_rome.methods.base import provenance, register_method
from transformer_lens_rome.methods.batches import Shape, in_batches
from transformer_lens_rome.model import adapter, passes, refusals
from transformer_lens_rome.model.adapter import Point, short_name
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.changes import Change, replacement
from transformer_lens_rome.model.keys import check_value
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_index

logger = logging.getLogger(__name__)

LAYERS = {"gpt2-xl": 1, "gpt-j-6b": 21}
"""Layers of FT in the released configurations; 0 for other models. FT+L always uses 0."""

EPS = {"gpt2-medium": 2e-3, "gpt2-large": 1e-3, "gpt2-xl": 5e-4, "gpt-j-6b": 5e-5}
"""Bounds of FT+L in the released configurations; 5e-4 for other models."""


@dataclass(frozen=True)
class FineTuning:
    """FT or FT+L as an `EditMethod`.

    Attributes:
        constrained: Use FT+L: no entry of the weight changes by more than `eps`.
        layer: The block whose W_out is trained, from 0. None: the released layer.
        eps: The bound of FT+L. None: the released bound.
        lr: Adam's learning rate.
        steps: Largest number of updates.
        weight_decay: Adam's weight decay, which is added to the gradient.
        stop_loss: Stop as soon as the loss is below this, in nats.
        objective: "last_token" scores every target token after the bare prompt, as released;
            "teacher_forced" scores each after the target tokens before it.
        bias: Also train b_out, as released, if the model has one that is not all zeros.
        prepend_bos: Whether to prepend BOS. None: as the checkpoint's tokenizer does.
        progress: Show a progress bar.
    """

    constrained: bool = False
    layer: int | None = None
    eps: float | None = None
    lr: float = 5e-4
    steps: int = 25
    weight_decay: float = 0.0
    stop_loss: float = 1e-2
    objective: Literal["last_token", "teacher_forced"] = "last_token"
    bias: bool = True
    prepend_bos: bool | None = None
    progress: bool = field(default=False, metadata={"identifies": False})

    def __post_init__(self) -> None:
        if self.objective not in ("last_token", "teacher_forced"):
            raise ValueError(
                f"objective must be 'last_token' or 'teacher_forced', got {self.objective!r}"
            )
        if self.eps is not None and not self.constrained:
            raise ValueError("eps bounds FT+L only; use get_method('ft+l', eps=...)")
        if self.lr <= 0 or self.steps < 1 or (self.eps is not None and self.eps <= 0):
            raise ValueError("lr, steps and eps must be positive")

    @property
    def name(self) -> str:
        """Return the method's name in tables."""
        return "ft+l" if self.constrained else "ft"

    @model_call
    def prepared(self, model: Model, *, seed: int = 0) -> FineTuning:
        """Return a copy with layer and bound set."""
        return self._resolved(model)[1]

    def _resolved(self, model: Model) -> tuple[int, FineTuning]:
        """Return the layer, and a copy with layer and bound set."""
        name, layer, eps = short_name(model), self.layer, self.eps
        if layer is None:
            layer = 0 if self.constrained else LAYERS.get(name, 0)
            logger.info("%s trains layer %d", self.name, layer)
        refusals.check_editable(model, [layer])
        if self.constrained and eps is None:
            eps = EPS.get(name, 5e-4)
            logger.info("%s keeps every entry within %g", self.name, eps)
        return layer, dataclasses.replace(self, layer=layer, eps=eps)

    @model_call
    def compute(self, model: Model, request: EditRequest, *, seed: int = 0) -> DenseEdit:
        """Compute the edit that writes one fact; no step is random.

        Raises:
            ValueError: the layer is out of range, the passes are random, or the loss is NaN.
            NotImplementedError: the model cannot be edited.
        """
        (found,) = self.compute_each(model, [request], seed=seed, batch_size=1)
        if isinstance(found, Exception):
            raise found
        return found

    @model_call
    def compute_each(
        self,
        model: Model,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[DenseEdit | Exception]:
        """Compute an edit for each request on the model as it is, or return why there is none.

        Up to `batch_size` requests share passes, each with its own copy of the weight; None: as
        many as memory allows.
        """
        layer, method = self._resolved(model)
        encoder = Encoder.of(model, self.prepend_bos)
        trained = 5 * adapter.w_out(model, layer).numel()  # weight, change, gradient, Adam's two

        def shape(request: EditRequest) -> Shape:
            n = len(_Task.of(encoder, request, self.objective).ids)
            return Shape(rows=1, longest=n, recomputed=n, beside=trained)

        def compute(some: Sequence[EditRequest]) -> list[DenseEdit]:
            return method._compute(model, encoder, some)

        return in_batches(model, requests, shape, compute, batch_size=batch_size)

    def _compute(
        self, model: Model, encoder: Encoder, requests: Sequence[EditRequest]
    ) -> list[DenseEdit]:
        """Compute edits whose training shares passes."""
        layer = self.layer
        assert layer is not None  # see `_resolved`
        tasks = [_Task.of(encoder, request, self.objective) for request in requests]
        runs = _train(model, layer, tasks, self)
        made: dict[str, Any] = {
            "layer": layer,
            "config": dataclasses.asdict(self),
            "model_hash": adapter.weight_hash(adapter.w_out(model, layer)),
            "provenance": provenance(model, encoder.prepends_bos),
        }
        edits = []
        for request, run in zip(requests, runs, strict=True):
            weight, *bias = (change.cpu() for change in run.changes())
            edits.append(
                DenseEdit(request=request, left=weight, bias=bias[0] if bias else None, **made)
            )
        healths = [one.health for one in measured_each(model, encoder, edits)]
        return [
            dataclasses.replace(edit, health=dataclasses.replace(health, losses=tuple(run.losses)))
            for edit, health, run in zip(edits, healths, runs, strict=True)
        ]


class _Task(NamedTuple):
    """One row of tokens and its labels.

    Attributes:
        ids: The tokens of the row.
        at: The position that predicts each label.
        labels: The target tokens.
    """

    ids: tuple[int, ...]
    at: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]

    @classmethod
    def of(cls, encoder: Encoder, request: EditRequest, objective: str) -> _Task:
        """Tokenise a request for one of the objectives of `FineTuning`."""
        row = encoder.row(request.text, target=request.target_new)
        _, at, labels = target_index([row])
        if objective == "last_token":
            return cls(row.ids[: row.target[0]], torch.full_like(at, row.target[0] - 1), labels)
        return cls(row.ids[: row.target[-1]], at, labels)


class _Run:
    """The training of one request: its copies of W_out and b_out, and its optimiser.

    Attributes:
        task: The tokens and labels.
        losses: The loss before each update.
    """

    def __init__(
        self,
        method: FineTuning,
        task: _Task,
        keys: Float[Tensor, "pos d_mlp"],
        old: Sequence[Tensor],
    ) -> None:
        self.task, self._method, self._keys, self._old = task, method, keys, old
        self._bias = old[1]
        train_bias = method.bias and bool(self._bias.any())  # zeros if the model has no bias
        self.new = [one.clone().requires_grad_() for one in (old if train_bias else old[:1])]
        self._adam = torch.optim.Adam(self.new, lr=method.lr, weight_decay=method.weight_decay)
        self.losses: list[float] = []

    @property
    def goes_on(self) -> bool:
        """Return whether the last loss calls for an update."""
        return not self.losses or self.losses[-1] >= self._method.stop_loss  # not if it is NaN

    def change(self, layer: int, row: int) -> Change:
        """Return the change that gives the row the output of the present copies."""
        weight, bias = [*self.new, self._bias][:2]
        at = torch.arange(len(self._keys))
        value = self._keys @ weight + bias
        return Change(Point("value", layer), torch.full_like(at, row), at, replacement(value))

    def update(self, gradients: Sequence[Tensor]) -> None:
        """Take one step of Adam, and keep every entry within eps."""
        for tensor, gradient in zip(self.new, gradients, strict=True):
            tensor.grad = gradient
        self._adam.step()
        if self._method.eps is not None:
            _project_(self.new, self._old, self._method.eps)

    def changes(self) -> list[Tensor]:
        """Return the changes of W_out and, if it was trained, of b_out.

        Raises:
            ValueError: They are not finite.
        """
        method = self._method
        found = [(tensor - base).detach() for tensor, base in zip(self.new, self._old)]
        if not math.isfinite(self.losses[-1]) or not all(one.isfinite().all() for one in found):
            raise ValueError(f"{method.name} gives NaN; try a smaller lr than {method.lr:g}")
        if method.eps is not None:  # exactly: the subtraction may have rounded
            found = [change.clamp(-method.eps, method.eps) for change in found]
        return found


def _train(model: Model, layer: int, tasks: Sequence[_Task], method: FineTuning) -> list[_Run]:
    """Train a copy of W_out, and of b_out, for each task; all tasks share the passes."""
    forward = PartialForward(model, layer, [task.ids for task in tasks], [0] * len(tasks))
    points = (Point("key", layer), Point("value", layer))
    activations = passes.read(model, forward.tokens, points)
    old = [adapter.w_out(model, layer).detach().float(), adapter.b_out(model, layer).float()]
    runs = []
    for task, keys, value in zip(tasks, *(activations[point] for point in points), strict=True):
        keys, value = keys[: len(task.ids)], value[: len(task.ids)]
        check_value(model, layer, keys, value)
        runs.append(_Run(method, task, keys.float(), old))
    held = live = runs
    with adapter.gradients_for(model):
        for _ in tqdm(range(method.steps), desc=method.name, disable=not method.progress):
            if 2 * len(live) <= len(held):
                held = live
                forward = PartialForward(model, layer, [r.task.ids for r in held], [0] * len(held))
            losses = _losses(forward, layer, [(held.index(run), run) for run in live])
            for run, loss in zip(live, losses, strict=True):
                run.losses.append(loss.item())
            going = [(run, loss) for run, loss in zip(live, losses, strict=True) if run.goes_on]
            if not going:
                break
            live = [run for run, _ in going]
            every = torch.autograd.grad(
                [loss for _, loss in going], [t for r in live for t in r.new]
            )
            gradients = iter(every)
            for run in live:
                run.update([next(gradients) for _ in run.new])
    return runs


def _losses(
    forward: PartialForward, layer: int, runs: Sequence[tuple[int, _Run]]
) -> list[Float[Tensor, ""]]:
    """Compute, for the run at each row, the mean of -log P over its target tokens."""
    changes = [run.change(layer, row) for row, run in runs]
    tasks = [run.task for _, run in runs]
    rows = [torch.full_like(task.at, row) for task, (row, _) in zip(tasks, runs, strict=True)]
    at, labels = (torch.cat(some) for some in zip(*((t.at, t.labels) for t in tasks), strict=True))
    nll = forward.losses(changes, torch.cat(rows), at, labels).nll
    return [part.mean() for part in nll.split([len(task.labels) for task in tasks])]


@torch.no_grad()
def _project_(new: Sequence[Tensor], old: Sequence[Tensor], eps: float) -> None:
    """Clamp every entry to within eps of its old value, in place."""
    for tensor, base in zip(new, old):
        tensor.copy_(torch.clamp(tensor, base - eps, base + eps))


register_method("ft", FineTuning)
register_method("ft+l", partial(FineTuning, constrained=True))
