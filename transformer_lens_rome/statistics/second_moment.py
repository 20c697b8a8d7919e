"""C = E[k kᵀ], the uncentred second moment of keys at one layer (Meng et al. 2022, Eq. 2).

The sum is kept, not the mean, so that statistics merge exactly; `collection` fills it from texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.files.arrays import read_npz
from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.tensors import (
    MAX_LAYERS,
    check_finite,
    read_tensors,
    write_tensors,
)
from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.torch_states import torch_defaults

_FORMAT = "transformer_lens_rome.second_moment.1"


@dataclass(eq=False)
class SecondMoment:
    """A running sum of k kᵀ, and where it came from.

    Attributes:
        sum_kk: Σ k kᵀ, `[d_mlp, d_mlp]`; float64 unless made otherwise.
        n_tokens: How many keys were added.
        layer: The block whose keys they are; None if unknown.
        prepend_bos: Whether texts started with BOS; None if unknown.
        probe: The keys that some fixed tokens have there, flattened: how statistics of another
            model are recognised. None if unknown.
        source: The corpus, in words.
        half_agreement: Mean cosine of C⁻¹k computed from either half of the corpus; None if it was
            not measured. 1 means that more text would change nothing.
    """

    sum_kk: Float[Tensor, "d_mlp d_mlp"] = field(repr=False)
    n_tokens: int = 0
    layer: int | None = None
    prepend_bos: bool | None = None
    probe: Float[Tensor, "probe"] | None = field(default=None, repr=False)
    source: str = ""
    half_agreement: float | None = None
    _factor: tuple[float, Tensor] | None = field(default=None, repr=False)

    @classmethod
    @torch_defaults()
    def empty(
        cls, d_mlp: int, dtype: torch.dtype = torch.float64, device: Any = None, **known: Any
    ) -> SecondMoment:
        """No keys yet; `known` gives the other fields."""
        return cls(torch.zeros(d_mlp, d_mlp, dtype=dtype, device=device), **known)

    @classmethod
    @torch_defaults()
    def from_moment(
        cls, C: Float[Tensor, "d_mlp d_mlp"], n_tokens: int, **known: Any
    ) -> SecondMoment:
        """From a moment that is at hand, and the number of tokens behind it."""
        C = torch.as_tensor(C)
        if C.ndim != 2 or C.shape[0] != C.shape[1]:
            raise ValueError(f"C must be square, [d_mlp, d_mlp]; got {tuple(C.shape)}")
        return cls(C.double() * n_tokens, n_tokens, **known)

    @classmethod
    def identity(cls, d_mlp: int) -> SecondMoment:
        """C = I, which ignores how keys are distributed. This is not ROME; use it as a control."""
        return cls.from_moment(
            torch.eye(d_mlp, dtype=torch.float64, device="cpu"),
            d_mlp,
            source="identity (no statistics)",
        )

    @classmethod
    @torch_defaults()
    def from_npz(cls, path: Any, **known: Any) -> SecondMoment:
        """Read a statistics file of the paper's authors (`mom2.mom2` is Σ k kᵀ, not its mean).

        Their GPT models take no BOS. The layer is read from their file name.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, or not statistics.
        """
        path = Path(path)
        layer = re.search(r"(?:^|\.)(\d{1,4})\.mlp", path.name)
        found = {"layer": int(layer[1]) if layer else None, "prepend_bos": False}
        try:
            total, count = read_npz(path, ["mom2.mom2", "mom2.count"])
            if count.size != 1 or count.dtype.kind != "i":
                raise ValueError(f"mom2.count is no whole number, but of shape {count.shape}")
            found |= {"sum_kk": torch.from_numpy(total), "n_tokens": int(count.item())}
            return _sound(make(cls, {**found, "source": path.name, **known}))
        except ValueError as error:
            raise ValueError(
                f"{path} is not a whole statistics file with mom2.mom2 and mom2.count ({error})"
            ) from error

    @property
    def d_mlp(self) -> int:
        """Width of the keys."""
        return len(self.sum_kk)

    @property
    @torch_defaults()
    def C(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """The moment, Σ k kᵀ / n."""
        return self.sum_kk / self.n_tokens

    @torch_defaults()
    @torch.no_grad()
    def update(self, keys: Float[Tensor, "n d_mlp"]) -> None:
        """Add keys, one a row."""
        if keys.ndim != 2 or keys.shape[1] != self.d_mlp:
            raise ValueError(f"keys must be [n, {self.d_mlp}], got {tuple(keys.shape)}")
        keys = keys.to(self.sum_kk.device).to(torch.promote_types(keys.dtype, torch.float32))
        if not torch.isfinite(keys).all():
            raise ValueError("a key holds NaN or infinity; check the model's weights and dtype")
        self.sum_kk += keys.T @ keys
        self.n_tokens += len(keys)
        self._factor = self.half_agreement = None

    def merge(self, other: SecondMoment) -> SecondMoment:
        """The statistics of both corpora together."""
        for name in ("d_mlp", "layer", "prepend_bos"):
            if getattr(self, name) != getattr(other, name):
                mine, theirs = getattr(self, name), getattr(other, name)
                raise ValueError(f"cannot merge statistics of different {name}: {mine}, {theirs}")
        if not _same_probe(self.probe, other.probe):
            raise ValueError("cannot merge statistics of different models: their probe keys differ")
        source = " + ".join(dict.fromkeys(s for s in (self.source, other.source) if s))
        return SecondMoment(
            self.sum_kk + other.sum_kk.to(self.sum_kk),
            self.n_tokens + other.n_tokens,
            self.layer,
            self.prepend_bos,
            self.probe,
            source,
        )

    @torch_defaults()
    def solve(self, k: Float[Tensor, "d_mlp"], *, ridge: float = 0.0) -> Float[Tensor, "d_mlp"]:
        """C⁻¹ k by Cholesky in float64; with a ridge, (C + ridge · mean(diag C) · I)⁻¹ k.

        Raises:
            ValueError: C is singular (too few tokens), or k holds NaN.
        """
        if not torch.isfinite(k).all():
            raise ValueError("the key holds NaN or infinity; check the model's weights and dtype")
        if self._factor is None or self._factor[0] != ridge:
            self._factor = (ridge, self._cholesky(ridge))
        factor = self._factor[1]
        return torch.cholesky_solve(k.to(factor)[:, None], factor)[:, 0]

    def _cholesky(self, ridge: float) -> Float[Tensor, "d_mlp d_mlp"]:
        if self.n_tokens < self.d_mlp and ridge == 0:
            raise ValueError(_singular(self.n_tokens, self.d_mlp))
        C = self.C.double()
        C.diagonal().add_(ridge * C.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(C)
        if failed:
            raise ValueError(_singular(self.n_tokens, self.d_mlp))
        return factor

    @torch_defaults()
    def report(self) -> dict[str, Any]:
        """Tokens, conditioning and convergence, as plain values."""
        eigenvalues = torch.linalg.eigvalsh(self.C.double())
        low, high = eigenvalues[0].item(), eigenvalues[-1].item()
        return {
            "n_tokens": self.n_tokens,
            "d_mlp": self.d_mlp,
            "tokens_per_dimension": self.n_tokens / self.d_mlp,
            "condition_number": high / low if low > 0 else math.inf,
            "half_agreement": self.half_agreement,
            "layer": self.layer,
            "prepend_bos": self.prepend_bos,
            "source": self.source,
        }

    def summary(self) -> dict[str, Any]:
        """What an edit records of the statistics that it used."""
        return {
            "n_tokens": self.n_tokens,
            "layer": self.layer,
            "prepend_bos": self.prepend_bos,
            "source": self.source,
            "half_agreement": self.half_agreement,
        }

    def save(self, path: Any) -> None:
        """Write as safetensors, with everything that is known of the origin."""
        tensors = {"sum_kk": self.sum_kk}
        if self.probe is not None:
            tensors["probe"] = self.probe
        write_tensors(path, tensors, {"format": _FORMAT} | self.summary())

    @classmethod
    @torch_defaults()
    def load(cls, path: Any) -> SecondMoment:
        """Read what `save` wrote.

        Raises:
            ValueError: not safetensors, truncated, or not statistics.
        """
        tensors, info = read_tensors(path, _FORMAT)
        info.pop("format")
        try:
            return _sound(make(cls, {**info, **tensors}))
        except ValueError as error:
            raise ValueError(f"{path} does not hold whole statistics ({error})") from error

    @model_call
    def check_fits(self, model: Any, layer: int, prepend_bos: bool) -> None:
        """Refuse statistics that do not belong to a model's layer, as far as that is known.

        Raises:
            ValueError: wrong width, layer, BOS setting, or another model.
        """
        remedy = "collect_second_moment(model, texts, layer) gives the right ones"
        d_mlp = len(adapter.w_out(model, layer))
        wanted = {"d_mlp": d_mlp, "layer": layer, "prepend_bos": prepend_bos}
        for name, value in wanted.items():
            if (mine := getattr(self, name)) not in (None, value):
                raise ValueError(
                    f"these statistics have {name} {mine}, the edit needs {value}; {remedy}"
                )
        if self.probe is not None:
            if not _same_probe(self.probe, probe_keys(model, [layer])[layer]):
                raise ValueError(
                    f"these statistics ({self.source}) are not from this model: its keys at layer "
                    f"{layer} are others; {remedy}"
                )


def _sound(found: SecondMoment) -> SecondMoment:
    """Refuse what cannot be a sum of k kᵀ: finite, symmetric, no diagonal below zero.

    Raises:
        ValueError: it cannot be.
    """
    total, n = found.sum_kk, found.n_tokens
    check_finite({"sum_kk": total} | ({} if found.probe is None else {"probe": found.probe}))
    if not 0 <= n < 2**53 or not 0 <= (found.layer or 0) < MAX_LAYERS or not len(total):
        raise ValueError(f"n_tokens {n}, layer {found.layer} or width {len(total)} cannot be")
    diagonal = total.diagonal()
    if (diagonal < 0).any() or (n == 0 and total.any()):
        raise ValueError("sum_kk is not a sum of squares: there is less than nothing in it")
    most = 1e-4 * diagonal.max()
    for rows in range(0, len(total), 1024):  # without a second matrix of that size
        part = slice(rows, rows + 1024)
        if (total[part] - total[:, part].T).abs().max() > most:
            raise ValueError("sum_kk is not symmetric")
    return found


def _singular(n_tokens: int, d_mlp: int) -> str:
    if n_tokens < d_mlp:
        return (
            f"C from {n_tokens} tokens is singular for d_mlp={d_mlp}; collect at least {d_mlp} "
            "tokens (several times that is better) or pass RomeConfig(ridge=1e-3)"
        )
    return (
        f"C from {n_tokens} tokens is not positive definite: it holds NaN, or some of its {d_mlp} "
        "neurons never fire; collect more text or pass RomeConfig(ridge=1e-3)"
    )


def _same_probe(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two fingerprints can be of one model; an unknown one can be of any."""
    return a is None or b is None or (a.shape == b.shape and cosine(a, b.to(a)) > 0.99)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors, taken as vectors."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@model_call
def probe_keys(model: Any, layers: Sequence[int]) -> dict[int, Float[Tensor, "probe"]]:
    """The keys that a fixed handful of tokens have at some layers: a model's fingerprint there.

    An edit of a layer's own W_out leaves it as it is.
    """
    tokens = torch.arange(1, 9)[None] * 37 % model.cfg.d_vocab
    found = passes.read(model, tokens, [Point("key", layer) for layer in layers])
    return {point.layer: keys.float().cpu().flatten() for point, keys in found.items()}
