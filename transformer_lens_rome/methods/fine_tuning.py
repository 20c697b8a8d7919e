"""FT and FT+L: fine-tune one MLP's output matrix on the fact (Meng et al. 2022, section 3.4).

    min over W_out of -log P(target | prompt)        by Adam, until it is below `stop_loss`
    FT+L: |W_out - W_out before| <= eps, entry by entry, after every update

W_out changes nothing below it, so the keys k of the prompt stay, and its output is k W_out + b_out.
That is all that is optimised: no parameter of the model is touched, and what runs at each step are
the layers above.

Where paper, released code and this module differ:

    what                paper          released code                     here
    what is trained     W_out          W_out and b_out                   `bias=True`: both
    scored at           -              all target tokens at the prompt's `objective="last_token"`;
                                       last one, none is fed             or "teacher_forced"
    stop at loss        3e-2           1e-2                              1e-2
    layer, eps          per model      per model                         the same, else 0 and 5e-4
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

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
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.keys import check_value
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_index

logger = logging.getLogger(__name__)

LAYERS = {"gpt2-xl": 1, "gpt-j-6b": 21}
"""FT's layer in the released configurations, else 0; FT+L's is always 0."""

EPS = {"gpt2-medium": 2e-3, "gpt2-large": 1e-3, "gpt2-xl": 5e-4, "gpt-j-6b": 5e-5}
"""FT+L's bound in the released configurations, else 5e-4."""


@dataclass(frozen=True)
class FineTuning:
    """FT, or FT+L, as an `EditMethod`.

    Attributes:
        constrained: FT+L: no entry of the weight moves by more than `eps`.
        layer: The block whose W_out is trained, from 0. None: the released one.
        eps: FT+L's bound. None: the released one.
        lr: Adam's learning rate.
        steps: Largest number of updates.
        weight_decay: Adam's, added to the gradient.
        stop_loss: Stop as soon as the loss is below this, in nats.
        objective: "last_token" scores every target token after the bare prompt, as released;
            "teacher_forced" each after those before it.
        bias: Train b_out too, as released, where the model has one that is not all zeros.
        prepend_bos: Overrides the checkpoint's own rule.
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
    progress: bool = False

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
        """The method's name in tables."""
        return "ft+l" if self.constrained else "ft"

    @model_call
    def prepared(self, model: Any, *, seed: int = 0) -> FineTuning:
        """The same with layer and bound found."""
        name, layer, eps = short_name(model), self.layer, self.eps
        if layer is None:
            layer = 0 if self.constrained else LAYERS.get(name, 0)
            logger.info("%s trains layer %d", self.name, layer)
        refusals.check_editable(model, [layer])
        if self.constrained and eps is None:
            eps = EPS.get(name, 5e-4)
            logger.info("%s keeps every entry within %g", self.name, eps)
        return dataclasses.replace(self, layer=layer, eps=eps)

    @model_call
    def compute(self, model: Any, request: EditRequest, *, seed: int = 0) -> DenseEdit:
        """The edit that writes one fact; nothing in it is random.

        Raises:
            ValueError: a layer out of range, passes that are random, or a loss that is no number.
            NotImplementedError: a model that cannot be edited.
        """
        method = self.prepared(model)
        layer = method.layer
        encoder = Encoder.of(model, self.prepend_bos)
        losses, weight, bias = _train(model, _Task.of(encoder, request, self.objective), method)
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
    """One row of tokens, and which token should follow which position of it."""

    ids: tuple[int, ...]
    at: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]

    @classmethod
    def of(cls, encoder: Encoder, request: EditRequest, objective: str) -> _Task:
        row = encoder.row(request.text, target=request.target_new)
        _, at, labels = target_index([row])
        if objective == "last_token":
            return cls(row.ids[: row.target[0]], torch.full_like(at, row.target[0] - 1), labels)
        return cls(row.ids[: row.target[-1]], at, labels)


def _train(
    model: Any, task: _Task, method: FineTuning
) -> tuple[list[float], Float[Tensor, "d_mlp d_model"], Float[Tensor, "d_model"] | None]:
    """The losses before each update, and the changes of W_out and, if it is trained, b_out."""
    layer, tokens = method.layer, torch.tensor([task.ids])
    points = (Point("key", layer), Point("value", layer))
    found = passes.read(model, tokens, points)
    keys, value = (found[point][0] for point in points)
    check_value(model, layer, keys, value)
    keys = keys.float()
    forward = PartialForward(model, layer, [task.ids], [0])
    old = [adapter.w_out(model, layer).detach().float(), adapter.b_out(model, layer).float()]
    train_bias = method.bias and bool(old[1].any())  # zeros stand in for a bias that is not there
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
    if not all(torch.isfinite(tensor).all() for tensor in (loss, *changes)):
        raise ValueError(f"{method.name} gives NaN; try a smaller lr than {method.lr:g}")
    if method.eps is not None:  # to the last bit, which the subtraction may have rounded
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
    """-log P(target), the mean over its tokens, with another W_out and b_out."""
    positions = torch.arange(len(keys))
    value = keys @ weight + bias
    change = Change(
        Point("value", layer), torch.zeros_like(positions), positions, partial(_instead, value)
    )
    places, which = task.at.unique(return_inverse=True)  # each is unembedded once
    logits = forward.logits([change], torch.zeros_like(places), places)[which].float()
    return cross_entropy(logits, task.labels.to(logits.device))


def _instead(new: Tensor, old: Tensor) -> Tensor:
    return new.to(old)


@torch.no_grad()
def _project_(new: list[Tensor], old: list[Tensor], eps: float) -> None:
    """Pull every entry back to within eps of what it was, in place."""
    for tensor, base in zip(new, old):
        tensor.copy_(torch.clamp(tensor, base - eps, base + eps))


register_method("ft", FineTuning)
register_method("ft+l", partial(FineTuning, constrained=True))
