"""Corruption of the subject: noise on its token embeddings (Meng et al. 2022, App. B).

A noise source is called with the number of samples, the number of tokens, d_model and a generator.
It returns noise to add to each embedding, or to replace it with:

    Gaussian(std)                      spherical; the paper's choice with std = 3 sigma
    Uniform(half_width)                each coordinate in (-half_width, half_width)
    Multivariate(mean, covariance)     the moments of token embeddings
    StudentT(mean, covariance, df)     the same covariance, heavier tails

sigma is `subject_embedding_std`. All noise is drawn on the CPU in float64, so a seed gives the same
noise on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.model import passes
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, check_texts

NoiseSource = Callable[[int, int, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Gaussian:
    """Independent normal noise of one standard deviation."""

    std: float

    def __call__(
        self, n_samples: int, n_tokens: int, d_model: int, generator: torch.Generator
    ) -> Float[Tensor, "n_samples n_tokens d_model"]:
        """Draw the noise."""
        return self.std * _normal((n_samples, n_tokens, d_model), generator)


@dataclass(frozen=True)
class Uniform:
    """Independent uniform noise between -half_width and half_width."""

    half_width: float

    def __call__(
        self, n_samples: int, n_tokens: int, d_model: int, generator: torch.Generator
    ) -> Float[Tensor, "n_samples n_tokens d_model"]:
        """Draw the noise."""
        shape = (n_samples, n_tokens, d_model)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return self.half_width * (2 * uniform - 1)


@dataclass(frozen=True, eq=False)
class Multivariate:
    """Normal noise with the mean and covariance of token embeddings: see `embedding_moments`."""

    mean: Float[Tensor, "d_model"]
    covariance: Float[Tensor, "d_model d_model"]

    def __call__(
        self, n_samples: int, n_tokens: int, d_model: int, generator: torch.Generator
    ) -> Float[Tensor, "n_samples n_tokens d_model"]:
        """Draw the noise."""
        return self.mean.double() + self._centred((n_samples, n_tokens, d_model), generator)

    def _centred(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        values, vectors = torch.linalg.eigh(self.covariance.double())
        root = vectors * values.clamp(min=0).sqrt()
        return _normal(shape, generator) @ root.T


@dataclass(frozen=True, eq=False)
class StudentT(Multivariate):
    """Like `Multivariate`, with each token's deviation times sqrt((df - 2) / chi2(df))."""

    df: float = 3.0

    def __post_init__(self) -> None:
        if self.df <= 2:
            raise ValueError(f"df must be above 2 for a finite covariance, got {self.df}")

    def _centred(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        half = torch.full((*shape[:2], 1), self.df / 2, dtype=torch.float64)
        chi2 = 2 * torch._standard_gamma(half, generator=generator)
        return super()._centred(shape, generator) * ((self.df - 2) / chi2).sqrt()


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@model_call
def subject_embedding_std(
    model: Model, subjects: Sequence[str], *, encoder: Encoder | None = None
) -> float:
    """Return sigma_t: the standard deviation of all entries of the subject tokens' embeddings.

    Each subject is tokenised alone, without BOS. The paper takes the subjects of all known facts.
    """
    if isinstance(subjects, str) or not subjects:
        raise ValueError(f"subjects is a list of texts, got {subjects!r}")
    return embeddings_of(model, subjects, encoder=encoder).std().item()


@model_call
def embedding_moments(
    model: Model, texts: Sequence[str], *, encoder: Encoder | None = None
) -> tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model d_model"]]:
    """Return the mean and covariance of the token embeddings of some texts, in float64."""
    embeddings = embeddings_of(model, texts, encoder=encoder).double()
    return embeddings.mean(0), torch.cov(embeddings.T)


@model_call
def embeddings_of(
    model: Model, texts: Sequence[str], *, encoder: Encoder | None = None
) -> Float[Tensor, "token d_model"]:
    """Return the embedding of every token of some texts, before positions are added."""
    check_texts("texts", texts)
    encoder = encoder or Encoder.of(model)
    ids = [i for text in texts for i in encoder.ids(text)]
    kinds, index = torch.tensor(ids).unique(return_inverse=True)
    point = Point("embed")
    return passes.read(model, kinds[:, None], [point])[point][:, 0].float().cpu()[index]
