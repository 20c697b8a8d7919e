"""Requests, and edits as values: scale, save, load. `ledger` puts them on a model and off again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.adapter import Weight, weight_hash
from transformer_lens_rome.files import read_tensors, write_tensors
from transformer_lens_rome.viz import stack
from transformer_lens_rome.viz.page import table

_FORMAT = "transformer_lens_rome.edit.1"


@dataclass(frozen=True)
class EditRequest:
    """A fact to write: after `prompt` with `subject` filled in, the model should say `target_new`.

    Attributes:
        prompt: Text with exactly one `{}`, where the subject goes.
        subject: The subject, as it should stand in the prompt.
        target_new: The new continuation; it follows the prompt after one space.
        target_true: The old one, if known; methods may use it, ROME does not.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None

    def __post_init__(self) -> None:
        holes = self.prompt.count("{}")
        if holes != 1:
            raise ValueError(
                f"the prompt needs exactly one '{{}}' where the subject goes, found {holes} in "
                f"{self.prompt!r}; write for instance 'The mother tongue of {{}} is'"
            )
        if not self.subject.strip():
            raise ValueError("the subject is empty; give the text that replaces '{}' in the prompt")
        if "{}" in self.subject:
            raise ValueError(f"the subject {self.subject!r} holds '{{}}'; give plain text")
        if not isinstance(self.target_new, str) or not self.target_new.strip():
            raise ValueError("target_new is empty; give the text that should follow the prompt")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditRequest:
        """Read the released ROME format, or a flat CounterFact record.

        Released: `{"prompt": "... {} ...", "subject", "target_new": {"str": ...}, ...}`. Flat:
        `{"prompt", "subject", "target_new", "ground_truth"}` with the subject already in the
        prompt, where it must occur exactly once.
        """
        if missing := {"prompt", "subject", "target_new"} - set(record):
            raise ValueError(f"the request lacks {sorted(missing)}; it has {sorted(record)}")
        prompt, subject = record["prompt"], record["subject"]
        if "{}" not in prompt:
            if (times := prompt.count(subject)) != 1:
                raise ValueError(
                    f"the subject {subject!r} occurs {times} times in {prompt!r}; "
                    "put '{}' in the prompt where the subject is meant"
                )
            prompt = prompt.replace(subject, "{}")
        true = record.get("target_true", record.get("ground_truth"))
        return cls(
            prompt, subject, _text(record["target_new"]), None if true is None else _text(true)
        )


def _text(target: Any) -> str:
    return target.get("str") if isinstance(target, Mapping) else target


@dataclass(frozen=True)
class EditHealth:
    """What an edit did, in numbers that tell a good one from a bad one.

    Attributes:
        subject_token: The token whose key was written, as text.
        losses: The objective at every step of the optimisation.
        p_before, p_after: Probability of the target after the bare prompt, on the model itself.
        clamp_hits: Steps after which delta was pulled back to the allowed norm.
        relative_norm: ||delta W|| / ||W||, Frobenius.
        k_C_k: k*ᵀ C⁻¹ k*, Eq. 2's denominator.
        key_agreement: Cosine of the bare prompt's key and k*.
        warnings: What a user should look at, in words.
    """

    subject_token: str = ""
    losses: tuple[float, ...] = ()
    p_before: float | None = None
    p_after: float | None = None
    clamp_hits: int = 0
    relative_norm: float | None = None
    k_C_k: float | None = None
    key_agreement: float | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        return table(_said(self))._repr_html_()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditHealth:
        """The inverse of `to_dict`, also after a round through JSON."""
        fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fixed)


def _said(health: EditHealth) -> Iterator[tuple[str, str]]:
    """Names and values of what was measured, in words; the losses as first and last."""
    for name, value in health.to_dict().items():
        if name == "losses" and value:
            yield name, f"{value[0]:.3g} to {value[-1]:.3g} in {len(value)} steps"
        elif name == "warnings":
            yield from (("warning", text) for text in value)
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif value not in (None, (), ""):
            yield name, str(value)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Edit:
    """What every edit of one W_out carries.

    Attributes:
        layer: The block whose W_out it changes, from 0.
        request: What was asked for.
        config: The method's settings, as plain values.
        model_hash: sha256 of the W_out that the edit was made on (`adapter.weight_hash`).
        health: See `EditHealth`.
        provenance: Where it came from: model, prefixes, statistics, seed, BOS rule, versions.
    """

    layer: int
    request: EditRequest
    config: Mapping[str, Any] = field(default_factory=dict)
    model_hash: str = ""
    health: EditHealth = field(default_factory=EditHealth)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("config", "provenance"):  # as they will be when read from a file: no tuples
            object.__setattr__(self, name, json.loads(json.dumps(dict(getattr(self, name)))))

    def _repr_html_(self) -> str:
        asked = f"{self.request.text} -> {self.request.target_new} (layer {self.layer})"
        return stack(asked, table(_said(self.health)))._repr_html_()

    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change of W_out."""
        raise NotImplementedError

    def changes(self) -> dict[Weight, Tensor]:
        """The change of every parameter that is changed."""
        return {Weight("W_out", self.layer): self.delta()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the change, by field name."""
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }

    @property
    def digest(self) -> str:
        """sha256 of the layer and the tensors: equal for an edit and its saved and loaded self."""
        state = hashlib.sha256(str(self.layer).encode())
        for tensor in self.tensors().values():
            state.update(weight_hash(tensor).encode())
        return state.hexdigest()

    def save(self, path: Any) -> None:
        """Write the edit as safetensors with JSON metadata (kilobytes for a rank-one edit)."""
        info = {
            "format": _FORMAT,
            "kind": type(self).__name__,
            "layer": self.layer,
            "model_hash": self.model_hash,
            "request": dataclasses.asdict(self.request),
            "config": self.config,
            "health": self.health.to_dict(),
            "provenance": self.provenance,
        }
        own = {name: tensor.clone() for name, tensor in self.tensors().items()}
        write_tensors(path, own, info)  # safetensors refuses tensors that share memory

    @classmethod
    def load(cls, path: Any) -> Any:
        """Read an edit that `save` wrote.

        Raises:
            ValueError: not safetensors, truncated, not an edit, or an edit of another kind.
        """
        edit = load_edit(path)
        if not isinstance(edit, cls):
            raise ValueError(
                f"{path} holds a {type(edit).__name__}; read it with {type(edit).__name__}.load"
            )
        return edit


@dataclass(frozen=True, eq=False, kw_only=True)
class RankOneEdit(_Edit):
    """W_out + u lamᵀ: the key k_star gets the value v_star (Meng et al. 2022, Eq. 2).

    Attributes:
        k_star: The key that is given a new value, `[d_mlp]`.
        u: C⁻¹ k, the direction in key space along which W_out changes, `[d_mlp]`.
        lam: Λ, what each unit of `key · u` adds to the value, `[d_model]`.
        v_star: The value that k_star has after the edit: `k_star @ (W_out + delta) + b_out`,
            `[d_model]`.
    """

    k_star: Float[Tensor, "d_mlp"] = field(repr=False)
    u: Float[Tensor, "d_mlp"] = field(repr=False)
    lam: Float[Tensor, "d_model"] = field(repr=False)
    v_star: Float[Tensor, "d_model"] = field(repr=False)

    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change of W_out: outer(u, lam)."""
        return torch.outer(self.u, self.lam)

    def scale(self, alpha: float) -> RankOneEdit:
        """The same edit, alpha times as strong; 0 changes nothing, -1 is the opposite."""
        v_star = self.v_star + (alpha - 1) * (self.k_star @ self.u) * self.lam
        unmeasured = EditHealth(subject_token=self.health.subject_token)
        return dataclasses.replace(self, lam=alpha * self.lam, v_star=v_star, health=unmeasured)


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseEdit(_Edit):
    """Any change of one W_out, as two factors: `left @ right`; and of the bias after it.

    Attributes:
        left: `[d_mlp, rank]`; or the change itself, `[d_mlp, d_model]`, where it has no lower rank.
        right: `[rank, d_model]`; None in that case.
        bias: The change of b_out, `[d_model]`; None where it stays.
    """

    left: Float[Tensor, "d_mlp rank"] = field(repr=False)
    right: Float[Tensor, "rank d_model"] | None = field(default=None, repr=False)
    bias: Float[Tensor, "d_model"] | None = field(default=None, repr=False)

    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change of W_out: left @ right."""
        return self.left if self.right is None else self.left @ self.right

    def changes(self) -> dict[Weight, Tensor]:
        """The change of W_out, and of b_out if there is one."""
        own = {} if self.bias is None else {Weight("b_out", self.layer): self.bias}
        return super().changes() | own

    def scale(self, alpha: float) -> DenseEdit:
        """The same edit, alpha times as strong."""
        bias = None if self.bias is None else alpha * self.bias
        return dataclasses.replace(self, left=alpha * self.left, bias=bias, health=EditHealth())


Edit = RankOneEdit | DenseEdit


def load_edit(path: Any) -> Edit:
    """Read an edit of any kind.

    Raises:
        ValueError: not safetensors, truncated, no edit, or a part of it is missing.
    """
    tensors, info = read_tensors(path, _FORMAT)
    try:
        kind = {"RankOneEdit": RankOneEdit, "DenseEdit": DenseEdit}[info["kind"]]
        return kind(
            layer=info["layer"],
            model_hash=info["model_hash"],
            request=EditRequest(**info["request"]),
            config=info["config"],
            health=EditHealth.from_dict(info["health"]),
            provenance=info["provenance"],
            **tensors,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is an incomplete edit file ({error!r})") from error
