"""C = E[k kᵀ], the uncentred second moment of keys at one layer (Meng et al. 2022, Eq. 2).

`SecondMoment` stores the sum, not the mean, so statistics merge exactly. `collect` computes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

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
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.torch_states import torch_defaults

_FORMAT = "transformer_lens_rome.second_moment.1"


@dataclass(eq=False)
class SecondMoment:
    """A running sum of k kᵀ, and a description of its origin.

    Attributes:
        sum_kk: Σ k kᵀ, `[d_mlp, d_mlp]`; float64 by default.
        n_tokens: The number of keys in the sum.
        layer: The block of the keys; None if unknown.
        prepend_bos: True if the texts started with BOS; None if unknown.
        probe: The keys of some fixed tokens at this layer, flattened. They identify the model.
            None if unknown.
        source: A description of the corpus.
        half_agreement: Mean cosine between C⁻¹k from one half of the corpus and from the other;
            None if it was not measured. At 1, more text would change nothing.
    """

    sum_kk: Float[Tensor, "d_mlp d_mlp"] = field(repr=False)
    n_tokens: int = 0
    layer: int | None = None
    prepend_bos: bool | None = None
    probe: Float[Tensor, "probe"] | None = field(default=None, repr=False)
    source: str = ""
    half_agreement: float | None = field(default=None, metadata={"identifies": False})
    _factor: tuple[float, Tensor] | None = field(default=None, repr=False)

    @classmethod
    @torch_defaults()
    def empty(
        cls, d_mlp: int, dtype: torch.dtype = torch.float64, device: Any = None, **known: Any
    ) -> SecondMoment:
        """Return a sum of no keys; `known` gives the other fields."""
        return cls(torch.zeros(d_mlp, d_mlp, dtype=dtype, device=device), **known)

    @classmethod
    @torch_defaults()
    def from_moment(
        cls, C: Float[Tensor, "d_mlp d_mlp"], n_tokens: int, **known: Any
    ) -> SecondMoment:
        """Return statistics with moment C of `n_tokens` tokens; `known` gives the other fields."""
        C = torch.as_tensor(C)
        if C.ndim != 2 or C.shape[0] != C.shape[1]:
            raise ValueError(f"C must be square, [d_mlp, d_mlp]; got {tuple(C.shape)}")
        return cls(C.double() * n_tokens, n_tokens, **known)

    @classmethod
    def identity(cls, d_mlp: int) -> SecondMoment:
        """Return C = I, which ignores how keys are distributed; this is a control, not ROME."""
        return cls.from_moment(
            torch.eye(d_mlp, dtype=torch.float64, device="cpu"),
            d_mlp,
            source="identity (no statistics)",
        )

    @classmethod
    @torch_defaults()
    def from_npz(cls, path: Any, **known: Any) -> SecondMoment:
        """Read a statistics file of the paper's authors (`mom2.mom2` is Σ k kᵀ, not its mean).

        Their GPT models use no BOS. The layer is read from the file name.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a complete statistics file.
        """
        path = Path(path)
        layer = re.search(r"(?:^|\.)(\d{1,4})\.mlp", path.name)
        fields: dict[str, Any] = {"layer": int(layer[1]) if layer else None, "prepend_bos": False}
        try:
            total, count = _arrays(path)
            if count.size != 1 or count.dtype.kind != "i" or total.dtype.char not in "efd":
                raise ValueError(
                    f"mom2.count must be one integer and mom2.mom2 float16, 32 or 64, got "
                    f"{count.dtype} of shape {count.shape} and {total.dtype}"
                )
            fields |= {"sum_kk": torch.from_numpy(total), "n_tokens": int(count.item())}
            return _checked(make(cls, {**fields, "source": path.name, **known}))
        except ValueError as error:
            raise ValueError(
                f"{path} is not a complete statistics file with mom2.mom2 and mom2.count ({error})"
            ) from error

    @property
    def d_mlp(self) -> int:
        """The width of the keys."""
        return len(self.sum_kk)

    @property
    @torch_defaults()
    def C(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """The moment, Σ k kᵀ / n."""
        return self.sum_kk / self.n_tokens

    @torch_defaults()
    @torch.no_grad()
    def update(self, keys: Float[Tensor, "n d_mlp"]) -> None:
        """Add keys, one per row."""
        if keys.ndim != 2 or keys.shape[1] != self.d_mlp:
            raise ValueError(f"keys must be [n, {self.d_mlp}], got {tuple(keys.shape)}")
        keys = keys.to(self.sum_kk.device).to(torch.promote_types(keys.dtype, torch.float32))
        if not torch.isfinite(keys).all():
            raise ValueError("a key contains NaN or infinity; check the model's weights and dtype")
        self.sum_kk += keys.T @ keys
        self.n_tokens += len(keys)
        self._factor = self.half_agreement = None

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Return the statistics of both corpora together.

        Raises:
            ValueError: The statistics are of different models, layers or BOS settings.
        """
        for name in ("d_mlp", "layer", "prepend_bos"):
            if getattr(self, name) != getattr(other, name):
                a, b = getattr(self, name), getattr(other, name)
                raise ValueError(f"cannot merge statistics of different {name}: {a}, {b}")
        if not same_probe(self.probe, other.probe):
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
        """Return C⁻¹ k by Cholesky in float64; with a ridge, (C + ridge · mean(diag C) · I)⁻¹ k.

        Raises:
            ValueError: C is singular (too few tokens), or k contains NaN or infinity.
        """
        if not torch.isfinite(k).all():
            raise ValueError(
                "the key contains NaN or infinity; check the model's weights and dtype"
            )
        if self._factor is None or self._factor[0] != ridge:
            self._factor = (ridge, self._cholesky(ridge))
        factor = self._factor[1]
        return torch.cholesky_solve(k.to(factor)[:, None], factor)[:, 0]

    def _cholesky(self, ridge: float) -> Float[Tensor, "d_mlp d_mlp"]:
        """Return the Cholesky factor of C with a ridge; raise ValueError if C is singular."""
        if self.n_tokens < self.d_mlp and ridge == 0:
            raise ValueError(singular(self, "RomeConfig(ridge=1e-3)"))
        C = self.C.double()
        C.diagonal().add_(ridge * C.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(C)
        if failed:
            raise ValueError(singular(self, "RomeConfig(ridge=1e-3)"))
        return factor

    @torch_defaults()
    def report(self) -> dict[str, Any]:
        """Return token counts, condition number and half agreement, as plain values."""
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
        """Return the description that an edit saves of the statistics it used."""
        return {
            "n_tokens": self.n_tokens,
            "layer": self.layer,
            "prepend_bos": self.prepend_bos,
            "source": self.source,
            "half_agreement": self.half_agreement,
        }

    def save(self, path: Any) -> None:
        """Write a safetensors file with the sum and the description of its origin."""
        tensors = {"sum_kk": self.sum_kk}
        if self.probe is not None:
            tensors["probe"] = self.probe
        write_tensors(path, tensors, {"format": _FORMAT} | self.summary())

    @classmethod
    @torch_defaults()
    def load(cls, path: Any) -> SecondMoment:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not safetensors, is truncated, or contains no statistics.
        """
        tensors, info = read_tensors(path, _FORMAT)
        info.pop("format")
        try:
            return _checked(make(cls, {**info, **tensors}))
        except ValueError as error:
            raise ValueError(f"{path} does not contain complete statistics ({error})") from error

    @model_call
    def check_fits(self, model: Model, layer: int, prepend_bos: bool) -> None:
        """Check that the statistics belong to a model's layer, as far as their origin is known.

        Raises:
            ValueError: The width, the layer, the BOS setting or the model is another one.
        """
        remedy = "collect_second_moment(model, texts, layer) computes the right ones"
        d_mlp = len(adapter.w_out(model, layer))
        expected = {"d_mlp": d_mlp, "layer": layer, "prepend_bos": prepend_bos}
        for name, value in expected.items():
            if (received := getattr(self, name)) not in (None, value):
                raise ValueError(
                    f"these statistics have {name} {received}, the edit needs {value}; {remedy}"
                )
        if self.probe is not None:
            if not same_probe(self.probe, probe_keys(model, [layer])[layer]):
                raise ValueError(
                    f"these statistics ({self.source}) are not from this model: its keys at layer "
                    f"{layer} are different; {remedy}"
                )


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return mom2.mom2 and mom2.count of an uncompressed `.npz` file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with np.load(path, allow_pickle=False, max_header_size=1024) as file:
            # numbers that take more room than the file: NumPy would believe a zip bomb
            if sum(part.file_size for part in file.zip.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed; write it with np.savez")
            total, count = file["mom2.mom2"], file["mom2.count"]
            if not isinstance(total, np.ndarray) or not isinstance(count, np.ndarray):
                raise ValueError("they are not arrays")  # a part without NumPy's header is bytes
            return total, count
    except Exception as error:  # NumPy and zipfile raise errors of many types for a damaged file
        raise ValueError(f"{error!r:.400}") from error


def _checked(moment: SecondMoment) -> SecondMoment:
    """Return the statistics after a check that they can be a sum of k kᵀ.

    Raises:
        ValueError: The sum is not finite or not symmetric, its diagonal has a negative entry, or
            another field is out of range.
    """
    total, n = moment.sum_kk, moment.n_tokens
    check_finite({"sum_kk": total} | ({} if moment.probe is None else {"probe": moment.probe}))
    if not 0 <= n < 2**53 or not 0 <= (moment.layer or 0) < MAX_LAYERS or not len(total):
        raise ValueError(f"n_tokens {n}, layer {moment.layer} or width {len(total)} is invalid")
    diagonal = total.diagonal()
    if (diagonal < 0).any():
        raise ValueError("sum_kk has a negative diagonal entry, so it is not a second moment")
    if n == 0 and total.any():
        raise ValueError("sum_kk is not zero although n_tokens is 0")
    tolerance = 1e-4 * diagonal.max()
    for rows in range(0, len(total), 1024):  # in blocks, to avoid a second matrix of this size
        part = slice(rows, rows + 1024)
        if (total[part] - total[:, part].T).abs().max() > tolerance:
            raise ValueError("sum_kk is not symmetric")
    return moment


def singular(moment: SecondMoment, remedy: str) -> str:
    """Return the error message for a C that has no Cholesky factor; `remedy` can be passed."""
    n_tokens, d_mlp = moment.n_tokens, moment.d_mlp
    if n_tokens < d_mlp:
        return (
            f"C from {n_tokens} tokens is singular for d_mlp={d_mlp}; collect at least {d_mlp} "
            f"tokens (several times that is better) or pass {remedy}"
        )
    return (
        f"C from {n_tokens} tokens is not positive definite: it contains NaN, or some of its "
        f"{d_mlp} neurons never fire; collect more text or pass {remedy}"
    )


def same_probe(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two probes can be of one model; an unknown probe matches any other."""
    return a is None or b is None or (a.shape == b.shape and cosine(a, b.to(a)) > 0.99)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two tensors of equal size, flattened to vectors."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@model_call
def probe_keys(model: Model, layers: Sequence[int]) -> dict[int, Float[Tensor, "probe"]]:
    """Return the keys of some fixed tokens at some layers, which identify the model there.

    An edit of W_out of the same layer does not change them.
    """
    tokens = torch.arange(1, 9)[None] * 37 % model.cfg.d_vocab
    keys = passes.read(model, tokens, [Point("key", layer) for layer in layers])
    return {point.layer: values.float().cpu().flatten() for point, values in keys.items()}
