"""KE: a network that reads the edit and gates its gradient (De Cao et al. 2021, section 4).

The text to write, prompt and target, is read by a bidirectional LSTM; one head for each matrix W
`[d_in, d_out]` with the gradient G gives two pairs of vectors and a number:

    h        = tanh(linear(LSTM(text)))
    a, b, eta from h:   rows a_in, b_in `[d_in]`, columns a_out, b_out `[d_out]`
    dW       = sigmoid(eta) * (G * (softmax(a_in)ᵀ a_out) + softmax(b_in)ᵀ b_out)

with * entry by entry: the re-implementation by Mitchell et al. that the ROME paper used. As G is a
sum of products of vectors, so is dW, and it is kept that way.

Where the released code and this module differ:

    what                     released                               here
    embeddings               a copy of all, one row added, trained  the model's, with rows of their
                                                                    own for tokens in training
    orientation              as the checkpoint stores W             always `[d_in, d_out]`
    first row of them        never trained (`padding_idx`)          as any other
    CounterFact targets      their last token                       all their tokens
    gated MLPs               -                                      W_gate is edited too

A row of an embedding matrix that no training text uses gets no gradient, and Adam leaves it; so
keeping only the others loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from transformer_lens_rome.edits.kinds import Factors
from transformer_lens_rome.methods.base import register_method
from transformer_lens_rome.methods.hypernetworks.hypernetwork import Text, TokenFactors
from transformer_lens_rome.methods.hypernetworks.trained_method import TrainedMethod
from transformer_lens_rome.methods.hypernetworks.training import Training
from transformer_lens_rome.model.adapter import Weight

LSTM_WIDTH, H_WIDTH, HEAD_WIDTH = 512, 768, 512


class Condition(nn.Module):
    """From a text's embeddings to h: a bidirectional LSTM, its two last states, a linear layer.

    Attributes:
        tokens: Ids of the tokens whose embeddings are trained, in order, `[n]`.
        rows: Their embeddings, `[n, d_model]`.
    """

    def __init__(self, d_model: int, tokens: Int[Tensor, "n"]) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.rows = nn.Parameter(torch.zeros(len(tokens), d_model))
        self.lstm = nn.LSTM(d_model, LSTM_WIDTH, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * LSTM_WIDTH, H_WIDTH)

    def forward(
        self, ids: Int[Tensor, "pos"], embeddings: Float[Tensor, "pos d_model"]
    ) -> Float[Tensor, "h"]:
        """The vector h of one text, whose tokens have these embeddings in the model."""
        if len(self.tokens):
            at = torch.searchsorted(self.tokens, ids).clamp(max=len(self.tokens) - 1)
            own = (self.tokens[at] == ids)[:, None]
            embeddings = torch.where(own, self.rows[at], embeddings)
        _, (last, _) = self.lstm(embeddings[None])
        return self.linear(last.flatten()).tanh()


class Head(nn.Module):
    """From h to the two pairs of vectors and the number for one matrix."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.widths = [d_out, d_in, d_out, d_in, 1]
        self.inner = weight_norm(nn.Linear(H_WIDTH, HEAD_WIDTH))
        self.outer = weight_norm(nn.Linear(HEAD_WIDTH, sum(self.widths)))

    def forward(self, h: Float[Tensor, "h"], factors: TokenFactors) -> Factors:
        """The change of W as two factors, whose rank is the number of tokens and one more."""
        a_out, a_in, b_out, b_in, eta = self.outer(self.inner(h).tanh()).split(self.widths)
        left = torch.cat([factors.x * a_in.softmax(0), b_in.softmax(0)[None]]).T
        right = torch.cat([factors.delta * a_out, b_out[None]])
        return left, eta.sigmoid() * right


class KnowledgeEditorNetwork(nn.Module):
    """The LSTM, and one head for each matrix.

    Attributes:
        names: Each head's matrix.
    """

    def __init__(
        self, shapes: Mapping[Weight, tuple[int, int]], d_model: int, tokens: Int[Tensor, "n"]
    ) -> None:
        super().__init__()
        self.names = {where: f"{where.name}_{where.layer}" for where in shapes}
        self.condition = Condition(d_model, tokens)
        self.heads = nn.ModuleDict({self.names[w]: Head(*shape) for w, shape in shapes.items()})

    def forward(self, factors: Mapping[Weight, TokenFactors], text: Text) -> dict[Weight, Factors]:
        """The change of each matrix."""
        h = self.condition(*text)
        return {where: self.heads[name](h, factors[where]) for where, name in self.names.items()}


@dataclass(frozen=True)
class KnowledgeEditor(TrainedMethod):
    """KE, or with `counterfact` KE-CF, as an `EditMethod` that has to be trained, or loaded."""

    kind = "ke"

    def new_network(
        self,
        shapes: Mapping[Weight, tuple[int, int]],
        embeddings: Float[Tensor, "n d_model"],
        tokens: Int[Tensor, "n"],
    ) -> KnowledgeEditorNetwork:
        """A new network, whose own embeddings start as the model's."""
        network = KnowledgeEditorNetwork(shapes, embeddings.shape[1], tokens)
        with torch.no_grad():
            network.condition.rows.copy_(embeddings)
        return network

    def settings(self) -> Training:
        """The published settings."""
        return Training(lr=1e-5, n_labels=None if self.counterfact else 1)


register_method("ke", KnowledgeEditor)
register_method("ke-cf", partial(KnowledgeEditor, counterfact=True))
