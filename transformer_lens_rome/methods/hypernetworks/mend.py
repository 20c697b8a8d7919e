"""MEND: a network that turns a fine-tuning gradient into an edit (Mitchell et al. 2022).

For each matrix W, with the gradient's factors x_t and delta_t of every token t:

    z      = [(x_t - mean) / std ; (delta_t - mean) / std]
    twice:   z <- z + max(0, scale * (U V z + b) + shift)         (section 3.2, Eq. 3)
    dW     = alpha * sum over t of x~_tᵀ delta~_t                 where [x~_t ; delta~_t] = z

Matrices of one shape share U, V, b and the statistics; scale, shift and alpha are each matrix's
own. U starts as zeros, so the network starts as the identity. The sign of dW is not given: that it
should go against the gradient is learned.

Where the released code and this module differ:

    what                     released                               here
    learning rate of alpha   the network's; its own has no effect   its own, 1e-4
    alpha when editing       W_in's and W_out's exchanged on        each matrix's own;
                             GPT-2                                  `swap_alphas=True`: exchanged
    mean and std when        those of the first edit's own tokens,  those of training;
      editing                then moving                            `own_statistics=True`: its own
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
from transformer_lens_rome.methods.hypernetworks.hypernetwork import Text, TokenFactors
from transformer_lens_rome.methods.hypernetworks.trained_method import TrainedMethod
from transformer_lens_rome.methods.hypernetworks.training import Training
from transformer_lens_rome.model.adapter import Weight

RANK = 1920
"""Largest inner width of the network."""


class Moments(nn.Module):
    """Mean and standard deviation of each coordinate of the vectors so far (Welford's sums)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "n width"]) -> None:
        """Add some vectors; those that hold no numbers would spoil the sums for good."""
        vectors = vectors[vectors.isfinite().all(1)]
        if (n := len(vectors)) == 0:
            return
        mean, total = vectors.mean(0), self.n + n
        step = mean - self.mean
        self.squares += (vectors - mean).square().sum(0) + step.square() * self.n * n / total
        self.mean += step * n / total
        self.n += n

    def normalised(self, vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """Vectors less the mean, over the standard deviation."""
        std = (self.squares / (self.n - 1).clamp(min=1)).sqrt()
        return (vectors - self.mean) / (std + 1e-7)


def _moments_for(factors: TokenFactors) -> tuple[Moments, Moments]:
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
        """One layer for one of the matrices.

        All starts at max(0, 0), where `clamp` passes the gradient on; a ReLU would never start.
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
        """New factors for one of the matrices; in training its statistics, or others, grow first.

        Args:
            factors: The gradient's.
            which: The matrix's number among those of its shape.
            own: Statistics of x and delta to use instead, and to add to.
        """
        if own is None and not self.training and not self.x.n:  # it has seen nothing yet
            own = _moments_for(factors)
        x, delta = own or (self.x, self.delta)
        if own or self.training:
            x.update(factors.x)
            delta.update(factors.delta)
        z = torch.cat([x.normalised(factors.x), delta.normalised(factors.delta)], dim=1)
        for layer in self.layers:
            z = layer(z, which)
        return z.split([factors.x.shape[1], factors.delta.shape[1]], dim=1)


class MendNetwork(nn.Module):
    """From a gradient's factors to those of a change, for some matrices.

    Attributes:
        places: For each matrix, its shape's key and its number among those of that shape.
        alpha: Each matrix's learned step size.
        swap_alphas, own_statistics: See `Mend`; in training both are off.
    """

    def __init__(self, shapes: Mapping[Weight, tuple[int, int]]) -> None:
        super().__init__()
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
        """The change of each matrix; what the text is makes no difference."""
        alpha = dict(zip(self.places, self.alpha, strict=True))
        found, own = {}, {}
        for where, (shape, which) in self.places.items():
            if self.own_statistics and shape not in own:  # those of a shape share them, one by one
                own[shape] = _moments_for(factors[where])
            x, delta = self.editors[shape](factors[where], which, own.get(shape))
            other = Weight({"W_in": "W_out", "W_out": "W_in"}.get(where.name, ""), where.layer)
            step = alpha.get(other, alpha[where]) if self.swap_alphas else alpha[where]
            found[where] = (x.T, step * delta)
        return found


@dataclass(frozen=True)
class Mend(TrainedMethod):
    """MEND, or with `counterfact` MEND-CF, as an `EditMethod` that has to be trained, or loaded.

    Attributes:
        swap_alphas: Exchange the step sizes of W_in and W_out, as the released code does on GPT-2.
        own_statistics: Normalise with the edit's own tokens, as the released code does in its first
            edit: those of this matrix and of the matrices of its shape before it.
    """

    swap_alphas: bool = False
    own_statistics: bool = False

    kind = "mend"

    def new_network(
        self,
        shapes: Mapping[Weight, tuple[int, int]],
        embeddings: Float[Tensor, "n d_model"],
        tokens: Int[Tensor, "n"],
    ) -> MendNetwork:
        """A new network, which takes no account of tokens."""
        return MendNetwork(shapes)

    def for_editing(self, network: nn.Module) -> nn.Module:
        """A trained network, which from now on edits as the released code does, where asked to."""
        network.swap_alphas, network.own_statistics = self.swap_alphas, self.own_statistics
        return network

    def settings(self) -> Training:
        """The published settings, but that alpha's learning rate has its effect."""
        return Training(lr=1e-6, alpha_lr=1e-4, n_labels=None if self.counterfact else 10)


register_method("mend", Mend)
register_method("mend-cf", partial(Mend, counterfact=True))
