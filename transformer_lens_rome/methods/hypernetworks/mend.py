"""MEND: a network that turns a fine-tuning gradient into an edit (Mitchell et al. 2022).

For each matrix W, with the gradient's factors x_t and delta_t of every token t:

    z      = [(x_t - mean) / std ; (delta_t - mean) / std]
    twice:   z <- z + max(0, scale * (U V z + b) + shift)         (section 3.2, Eq. 3)
    dW     = alpha * sum over t of x~_tᵀ delta~_t                 where [x~_t ; delta~_t] = z

Matrices of one shape share U, V, b and the statistics; each matrix has its own scale, shift and
alpha. U starts as zeros, so the network starts as the identity. The sign of dW is not fixed: the
network learns that dW should go against the gradient.

Where the released code and this module differ:

    what                     released                               here
    learning rate of alpha   the network's; 1e-4 has no effect      1e-4
    alpha when editing       W_in's and W_out's swapped on GPT-2    each matrix's own;
                                                                    `swap_alphas=True`: swapped
    mean and std when        of the first edit's tokens, then       of training;
      editing                updated by each edit                   `own_statistics=True`: edit's
    CounterFact targets      their last token; ten on GPT-J         all their tokens
    gated MLPs               -                                      W_gate is edited too
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens_rome.edits.kinds import Factors
from transformer_lens_rome.methods.base import register_method
from transformer_lens_rome.methods.hypernetworks.hypernetwork import (
    EditorNetwork,
    MatrixName,
    Shapes,
    Text,
    TokenFactors,
)
from transformer_lens_rome.methods.hypernetworks.recipe import Recipe, with_editor
from transformer_lens_rome.methods.hypernetworks.training import Training
from transformer_lens_rome.model.adapter import Weight

_SWAPPED: dict[str, MatrixName] = {"W_in": "W_out", "W_out": "W_in"}

RANK = 1920
"""Largest rank of U V."""


class Moments(nn.Module):
    """Mean and standard deviation of each coordinate of the vectors so far (Welford's sums)."""

    n: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "n width"]) -> None:
        """Add vectors to the sums; skip vectors that are not finite."""
        vectors = vectors[vectors.isfinite().all(1)]
        if (n := len(vectors)) == 0:
            return
        mean, total = vectors.mean(0), self.n + n
        step = mean - self.mean
        self.squares += (vectors - mean).square().sum(0) + step.square() * self.n * n / total
        self.mean += step * n / total
        self.n += n

    def normalised(self, vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """Return vectors minus the mean, divided by the standard deviation."""
        std = (self.squares / (self.n - 1).clamp(min=1)).sqrt()
        return (vectors - self.mean) / (std + 1e-7)


def _moments_for(factors: TokenFactors) -> tuple[Moments, Moments]:
    """Construct empty statistics of x and delta."""
    x, delta = (Moments(part.shape[1]).to(part.device) for part in factors)
    return x, delta


class ResidualLayer(nn.Module):
    """z + max(0, scale * (U V z + b) + shift), with a scale and shift for each matrix."""

    def __init__(self, width: int, n_matrices: int) -> None:
        super().__init__()
        rank = min(RANK, width)
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(rank, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(n_matrices, width))
        self.shift = nn.Parameter(torch.zeros(n_matrices, width))

    def forward(self, z: Float[Tensor, "n width"], which: int) -> Float[Tensor, "n width"]:
        """Apply the layer for one of the matrices.

        At the start of training the maximum is max(0, 0). `clamp` has a gradient there; a ReLU has
        none, and the layer would never learn.
        """
        y = z @ self.v.T @ self.u.T + self.bias
        return z + (y * self.scale[which] + self.shift[which]).clamp(min=0)


class ShapeEditor(nn.Module):
    """The network that all matrices of one shape share."""

    def __init__(self, d_in: int, d_out: int, n_matrices: int) -> None:
        super().__init__()
        self.x, self.delta = Moments(d_in), Moments(d_out)
        self.layers = nn.ModuleList(ResidualLayer(d_in + d_out, n_matrices) for _ in range(2))

    def forward(
        self, factors: TokenFactors, which: int, own: tuple[Moments, Moments] | None = None
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Compute new factors for one of the matrices; in training, update the statistics first.

        Args:
            factors: The factors of the gradient.
            which: The index of the matrix among those of its shape.
            own: Statistics of x and delta to update and use instead of the network's.
        """
        if own is None and not self.training and not self.x.n:  # no statistics yet
            own = _moments_for(factors)
        x, delta = own or (self.x, self.delta)
        if own or self.training:
            x.update(factors.x)
            delta.update(factors.delta)
        z = torch.cat([x.normalised(factors.x), delta.normalised(factors.delta)], dim=1)
        for layer in self.layers:
            z = layer(z, which)
        return z.split([factors.x.shape[1], factors.delta.shape[1]], dim=1)


class MendNetwork(EditorNetwork):
    """Map the factors of a gradient to the factors of a change, for some matrices.

    Attributes:
        places: For each matrix, its shape's key and its index among the matrices of that shape.
        alpha: The learned step size of each matrix.
        swap_alphas, own_statistics: See `Mend`; both are False in training.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.swap_alphas = self.own_statistics = False
        self.places: dict[Weight, tuple[str, int]] = {}
        counts: dict[tuple[int, int], int] = {}
        for where, shape in shapes.items():
            self.places[where] = (str(shape), counts.setdefault(shape, 0))
            counts[shape] += 1
        editors = {str(shape): ShapeEditor(*shape, n) for shape, n in counts.items()}
        self.editors = nn.ModuleDict(editors)
        self.alpha = nn.Parameter(torch.full((len(shapes),), 1e-4))

    def forward(self, factors: Mapping[Weight, TokenFactors], text: Text) -> dict[Weight, Factors]:
        """Compute the change of each matrix; the text is not used."""
        alpha = dict(zip(self.places, self.alpha, strict=True))
        changes: dict[Weight, Factors] = {}
        own: dict[str, tuple[Moments, Moments]] = {}
        for where, (shape, which) in self.places.items():
            if self.own_statistics and shape not in own:  # shared by the matrices of a shape
                own[shape] = _moments_for(factors[where])
            x, delta = self.editors[shape](factors[where], which, own.get(shape))
            other = where._replace(name=_SWAPPED.get(where.name, where.name))
            step = alpha.get(other, alpha[where]) if self.swap_alphas else alpha[where]
            changes[where] = (x.T, step * delta)
        return changes


@dataclass(frozen=True)
class Mend(Recipe):
    """The recipe of MEND, or of MEND-CF with `counterfact`.

    Attributes:
        swap_alphas: Swap the step sizes of W_in and W_out, as the released code does on GPT-2.
        own_statistics: Normalise with the edit's tokens, as the released code does in its first
            edit: the tokens of this matrix and of the matrices of its shape before it.
    """

    swap_alphas: bool = False
    own_statistics: bool = False

    kind = "mend"

    def new_network(
        self, shapes: Shapes, embeddings: Float[Tensor, "n d_model"], tokens: Int[Tensor, "n"]
    ) -> MendNetwork:
        """Construct a new network; embeddings and tokens are not used."""
        return MendNetwork(shapes)

    def for_editing(self, network: EditorNetwork) -> EditorNetwork:
        """Set the options of the released code on a trained network and return the network."""
        assert isinstance(network, MendNetwork)
        network.swap_alphas, network.own_statistics = self.swap_alphas, self.own_statistics
        return network

    def settings(self) -> Training:
        """Return the published settings, but with an effective learning rate of alpha."""
        return Training(lr=1e-6, alpha_lr=1e-4, n_labels=None if self.counterfact else 10)


register_method("mend", with_editor(Mend))
register_method("mend-cf", with_editor(partial(Mend, counterfact=True)))
