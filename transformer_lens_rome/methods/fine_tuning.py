"""FT and FT+L: fine-tune one MLP's output matrix on the fact (Meng et al. 2022, section 3.4).

    min over W_out of -log P(target | prompt)        by Adam, until it is below `stop_loss`
    FT+L: |W_out - W_out before| <= eps, entry by entry, after every update

W_out changes nothing below it, so the keys k of the prompt stay fixed, and its output is
k W_out + b_out. Only copies of W_out and b_out are optimised; no parameter of the model changes.
Each step runs only the layers above.

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
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from transformer_lens_rome.edits.kinds import DenseEdit, EditRequest
from transformer_lens_rome.edits.measure import measured
from transformer_lens_rome.methods.base import provenance, register_method
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
        layer, method = self._resolved(model)
        encoder = Encoder.of(model, self.prepend_bos)
        task = _Task.of(encoder, request, self.objective)
        losses, weight, bias = _train(model, layer, task, method)
        edit = DenseEdit(
            layer=layer,
            request=request,
            config=dataclasses.asdict(method),
            model_hash=adapter.weight_hash(adapter.w_out(model, layer)),
            provenance=provenance(model, encoder.prepends_bos),
            left=weight.cpu(),
            bias=None if bias is None else bias.cpu(),
        )
        health = dataclasses.replace(measured(model, encoder, edit), losses=tuple(losses))
        return dataclasses.replace(edit, health=health)


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


def _train(
    model: Model, layer: int, task: _Task, method: FineTuning
) -> tuple[list[float], Float[Tensor, "d_mlp d_model"], Float[Tensor, "d_model"] | None]:
    """Return the loss before each update and the changes of W_out and, if it is trained, b_out."""
    points = (Point("key", layer), Point("value", layer))
    activations = passes.read(model, torch.tensor([task.ids]), points)
    keys, value = (activations[point][0] for point in points)
    check_value(model, layer, keys, value)
    keys = keys.float()
    forward = PartialForward(model, layer, [task.ids], [0])
    old = [adapter.w_out(model, layer).detach().float(), adapter.b_out(model, layer).float()]
    train_bias = method.bias and bool(old[1].any())  # `b_out` is zeros if the model has no bias
    losses: list[float] = []
    with adapter.gradients_for(model):
        new = [tensor.clone().requires_grad_() for tensor in (old if train_bias else old[:1])]
        adam = torch.optim.Adam(new, lr=method.lr, weight_decay=method.weight_decay)
        for _ in tqdm(range(method.steps), desc=method.name, disable=not method.progress):
            loss = _loss(forward, layer, task, keys, *new, *old[len(new) :])
            losses.append(loss.item())
            if not losses[-1] >= method.stop_loss:
                break
            for tensor, gradient in zip(new, torch.autograd.grad(loss, new), strict=True):
                tensor.grad = gradient
            adam.step()
            if method.eps is not None:
                _project_(new, old, method.eps)
    changes = [(tensor - base).detach() for tensor, base in zip(new, old)]
    if not math.isfinite(losses[-1]) or not all(torch.isfinite(one).all() for one in changes):
        raise ValueError(f"{method.name} gives NaN; try a smaller lr than {method.lr:g}")
    if method.eps is not None:  # exactly: the subtraction may have rounded
        changes = [change.clamp(-method.eps, method.eps) for change in changes]
    return losses, changes[0], changes[1] if train_bias else None


def _loss(
    forward: PartialForward,
    layer: int,
    task: _Task,
    keys: Float[Tensor, "pos d_mlp"],
    weight: Float[Tensor, "d_mlp d_model"],
    bias: Float[Tensor, "d_model"],
) -> Float[Tensor, ""]:
    """Compute the mean of -log P over the target tokens, with the given W_out and b_out."""
    positions = torch.arange(len(keys))
    value = keys @ weight + bias
    change = Change(
        Point("value", layer), torch.zeros_like(positions), positions, replacement(value)
    )
    places, which = task.at.unique(return_inverse=True)  # unembed each position once
    logits = forward.logits([change], torch.zeros_like(places), places)[which].float()
    return cross_entropy(logits, task.labels.to(logits.device))


@torch.no_grad()
def _project_(new: list[Tensor], old: list[Tensor], eps: float) -> None:
    """Clamp every entry to within eps of its old value, in place."""
    for tensor, base in zip(new, old):
        tensor.copy_(torch.clamp(tensor, base - eps, base + eps))


register_method("ft", FineTuning)
register_method("ft+l", partial(FineTuning, constrained=True))
