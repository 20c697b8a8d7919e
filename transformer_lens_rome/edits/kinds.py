"""The kinds of edits: values to scale, save and load. `ledger` applies and undoes them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.base import Edit
from transformer_lens_rome.edits.edit_files import edit_from, read_edit
from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.edits.hub_folder import edit_path
from transformer_lens_rome.edits.request import EditRequest
from transformer_lens_rome.files.fields import make
from transformer_lens_rome.model.adapter import Weight, weight_hash
from transformer_lens_rome.torch_states import torch_defaults

__all__ = [
    "DenseEdit",
    "Edit",
    "EditHealth",
    "EditRequest",
    "FactoredEdit",
    "Factors",
    "RankOneEdit",
    "load_edit",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class RankOneEdit(Edit):
    """W_out + u lamᵀ: the key k_star is mapped to v_star (Meng et al. 2022, Eq. 2).

    Attributes:
        k_star: The key that gets a new value, `[d_mlp]`.
        u: C⁻¹ k, the direction in key space along which W_out changes, `[d_mlp]`.
        lam: Λ, the vector added to the value per unit of `key · u`, `[d_model]`.
        v_star: The value that k_star has after the edit: `k_star @ (W_out + delta) + b_out`,
            `[d_model]`.
    """

    k_star: Float[Tensor, "d_mlp"] = field(repr=False)
    u: Float[Tensor, "d_mlp"] = field(repr=False)
    lam: Float[Tensor, "d_model"] = field(repr=False)
    v_star: Float[Tensor, "d_model"] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fit(self, self.k_star.shape == self.u.shape and self.v_star.shape == self.lam.shape)

    @torch_defaults()
    def changes(self) -> dict[Weight, Tensor]:
        """Return the change of W_out: outer(u, lam)."""
        return {Weight("W_out", self.layer): torch.outer(self.u, self.lam)}

    def sizes(self) -> dict[Weight, tuple[int, ...]]:
        """Return the shape of W_out."""
        return {Weight("W_out", self.layer): (len(self.u), len(self.lam))}

    @torch_defaults()
    def scale(self, alpha: float) -> RankOneEdit:
        """Return the edit, alpha times as strong; 0 changes nothing, -1 is the opposite."""
        v_star = self.v_star + (alpha - 1) * (self.k_star @ self.u) * self.lam
        unmeasured = EditHealth(subject_token=self.health.subject_token)
        return dataclasses.replace(self, lam=alpha * self.lam, v_star=v_star, health=unmeasured)


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseEdit(Edit):
    """A change of one W_out, as two factors `left @ right`, and optionally of its bias b_out.

    Attributes:
        left: `[d_mlp, rank]`; or the whole change, `[d_mlp, d_model]`, if it is not factored.
        right: `[rank, d_model]`; None if the change is not factored.
        bias: The change of b_out, `[d_model]`; None if b_out does not change.
    """

    left: Float[Tensor, "d_mlp rank"] = field(repr=False)
    right: Float[Tensor, "rank d_model"] | None = field(default=None, repr=False)
    bias: Float[Tensor, "d_model"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        rank, (_, d_model) = self.left.shape[1], self.sizes()[Weight("W_out", self.layer)]
        whole = self.right is None or len(self.right) == rank
        _check_fit(self, whole and (self.bias is None or self.bias.shape == (d_model,)))

    @torch_defaults()
    def changes(self) -> dict[Weight, Tensor]:
        """Return the change of W_out, left @ right, and of b_out if it changes."""
        whole = self.left if self.right is None else self.left @ self.right
        bias = {} if self.bias is None else {Weight("b_out", self.layer): self.bias}
        return {Weight("W_out", self.layer): whole, **bias}

    def sizes(self) -> dict[Weight, tuple[int, ...]]:
        """Return the shape of W_out, and of b_out if it changes."""
        last = self.left if self.right is None else self.right
        sizes: dict[Weight, tuple[int, ...]] = {
            Weight("W_out", self.layer): (len(self.left), last.shape[1])
        }
        if self.bias is not None:
            sizes[Weight("b_out", self.layer)] = tuple(self.bias.shape)
        return sizes

    @torch_defaults()
    def scale(self, alpha: float) -> DenseEdit:
        """Return the edit, alpha times as strong."""
        bias = None if self.bias is None else alpha * self.bias
        return dataclasses.replace(self, left=alpha * self.left, bias=bias, health=EditHealth())


Factors = tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank d_out"]]


@dataclass(frozen=True, eq=False, kw_only=True)
class FactoredEdit(Edit):
    """A change of several matrices in several blocks, each as two factors `left @ right`.

    Attributes:
        factors: For each matrix, `left` `[d_in, rank]` and `right` `[rank, d_out]`.
        hashes: For each matrix, sha256 of the weight that the edit was made on.
        requests: All facts that the edit writes; the first one is `request`.
    """

    factors: Mapping[Weight, Factors] = field(repr=False)
    hashes: Mapping[Weight, str] = field(repr=False)
    requests: tuple[EditRequest, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "requests", tuple(self.requests) or (self.request,))
        if self.requests[0] != self.request:
            raise ValueError("the first of an edit's requests is not its request")
        if set(self.factors) != set(self.hashes):
            raise ValueError("an edit needs one hash for each matrix that it changes")
        if not all(isinstance(digest, str) for digest in self.hashes.values()):
            raise ValueError("hashes are sha256 as text; see adapter.weight_hash")
        checked = {where: _checked(where, *self.factors[where]) for where in _ordered(self.factors)}
        if checked and self.layer != min(where.layer for where in checked):
            raise ValueError(f"layer {self.layer} is not the first that this edit changes")
        object.__setattr__(self, "factors", checked)

    @classmethod
    def of(
        cls, factors: Mapping[Weight, Factors], hashes: Mapping[Weight, str], **known: Any
    ) -> FactoredEdit:
        """Return an edit from its factors, sorted by layer; `known` are the fields of any edit."""
        order = _ordered(factors)
        together = hashlib.sha256("".join(hashes[where] for where in order).encode()).hexdigest()
        return cls(
            layer=min((where.layer for where in order), default=0),
            model_hash=together,
            factors=factors,
            hashes={where: hashes[where] for where in order},
            **known,
        )

    def changes(self) -> dict[Weight, Tensor]:
        """Return the change of every matrix."""
        return {where: self.change(where) for where in self.factors}

    def sizes(self) -> dict[Weight, tuple[int, ...]]:
        """Return the shape of every matrix."""
        return {w: (len(left), right.shape[1]) for w, (left, right) in self.factors.items()}

    @torch_defaults()
    def change(self, where: Weight) -> Float[Tensor, "d_in d_out"]:
        """Return the change of one matrix: left @ right."""
        left, right = self.factors[where]
        return left @ right

    def made_on(self) -> dict[Weight, str]:
        """Return the sha256 of each matrix that the edit was made on."""
        return dict(self.hashes)

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors by name: `W_out.3.left` and so on."""
        return {
            f"{where.name}.{where.layer}.{side}": tensor
            for where, both in self.factors.items()
            for side, tensor in zip(("left", "right"), both, strict=True)
        }

    @property
    def digest(self) -> str:
        """sha256 of the matrices' names and factors."""
        state = hashlib.sha256()
        for name, tensor in self.tensors().items():
            state.update(f"{name} {weight_hash(tensor)}".encode())
        return state.hexdigest()

    @torch_defaults()
    def scale(self, alpha: float) -> FactoredEdit:
        """Return the edit, alpha times as strong."""
        factors = {where: (left, alpha * right) for where, (left, right) in self.factors.items()}
        return dataclasses.replace(self, factors=factors, health=EditHealth())

    def _metadata(self) -> dict[str, Any]:
        """Return what the file says beyond tensors and common fields: hashes, and many requests."""
        known: dict[str, Any] = {"hashes": [[*where, one] for where, one in self.hashes.items()]}
        if len(self.requests) > 1:
            known["requests"] = [dataclasses.asdict(request) for request in self.requests]
        return known

    @classmethod
    def _fields_from(cls, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, Any]:
        """Return the factors and the hashes from the contents of a file."""
        hashes = {Weight(name, layer): digest for name, layer, digest in info["hashes"]}
        if not len(tensors) == 2 * len(hashes) == 2 * len(info["hashes"]):
            raise ValueError(f"{len(tensors)} factors, {len(info['hashes'])} hashes")
        names = {where: f"{where.name}.{where.layer}" for where in hashes}
        factors = {w: (tensors[f"{n}.left"], tensors[f"{n}.right"]) for w, n in names.items()}
        requests = tuple(make(EditRequest, one) for one in info.get("requests", ()))
        return {"hashes": hashes, "factors": factors, "requests": requests}


def _check_fit(edit: Edit, shapes: bool) -> None:
    """Raise ValueError if `shapes` (the shapes fit) is false, or if the dtypes differ."""
    if not shapes or len({tensor.dtype for tensor in edit.tensors().values()}) > 1:
        named = edit.tensors().items()
        listed = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in named)
        raise ValueError(f"the edit's tensors do not fit together: {listed}")


def _ordered(places: Iterable[Weight]) -> list[Weight]:
    return sorted(places, key=lambda where: (where.layer, where.name))


def _checked(where: Weight, left: Tensor, right: Tensor) -> Factors:
    """Return the factors, contiguous as read from a file; raise ValueError if they do not fit."""
    if where.name not in ("W_in", "W_gate", "W_out") or type(where.layer) is not int:
        raise ValueError(f"{where} is not W_in, W_gate or W_out of a layer, counted from 0")
    fit = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    if not fit or not left.is_floating_point() or left.dtype != right.dtype:
        raise ValueError(
            f"{where.name} of layer {where.layer} needs factors [d_in, rank] and [rank, d_out] of "
            f"one floating-point type, got {tuple(left.shape)} {left.dtype} and "
            f"{tuple(right.shape)} {right.dtype}"
        )
    return left.detach().contiguous(), right.detach().contiguous()


def load_edit(path: Any, *, revision: str | None = None) -> Edit:
    """Read an edit of any kind.

    Args:
        path: A file that `save` wrote, a folder that `save_pretrained` wrote, or the name of a
            repository on the Hugging Face Hub, `owner/name`. What exists here comes first.
        revision: A branch, a tag or a commit of the repository; None: its newest state.

    Raises:
        FileNotFoundError: there is no such file or folder, and `path` is no `owner/name`.
        ImportError: huggingface_hub, which reads the Hub, is not installed (the `share` extra).
        OSError: the file cannot be had from the Hub.
        ValueError: the file is not safetensors, is truncated, or contains no complete edit.
    """
    path = edit_path(path, revision)
    tensors, info = read_edit(path)
    kinds: tuple[type[Edit], ...] = (RankOneEdit, DenseEdit, FactoredEdit)
    for kind in kinds:
        if info.get("kind") == kind.__name__:
            return edit_from(kind, path, tensors, info)
    raise ValueError(f"{path} is an incomplete edit file (its kind is {info.get('kind')!r:.40})")
