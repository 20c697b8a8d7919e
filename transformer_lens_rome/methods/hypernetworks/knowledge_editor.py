"""KE: a network that reads the text of an edit and gates its gradient (De Cao et al. 2021, sec. 4).

A bidirectional LSTM reads the text to write, prompt and target. For each matrix W `[d_in, d_out]`
with the gradient G, one head computes two pairs of vectors and a number:

    h        = tanh(linear(LSTM(text)))
    a, b, eta from h:   rows a_in, b_in `[d_in]`, columns a_out, b_out `[d_out]`
    dW       = sigmoid(eta) * (G * (softmax(a_in)ᵀ a_out) + softmax(b_in)ᵀ b_out)

with * elementwise. This is the re-implementation by Mitchell et al. that the ROME paper used. G is
a sum of outer products, so dW is one as well, and it is stored as factors.

Where the released code and this module differ:

    what                     released                               here
    embeddings               a copy of all, one row added, trained  the model's, with trained rows
                                                                    for tokens of training texts
    orientation              as the checkpoint stores W             always `[d_in, d_out]`
    first embedding          never trained (`padding_idx`)          trained like the others
    CounterFact targets      their last token                       all their tokens
    gated MLPs               -                                      W_gate is edited too

A row of an embedding matrix that no training text uses gets no gradient, and Adam does not change
it. So it suffices to store the other rows.
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
from transformer_lens_rome.methods.hypernetworks.hypernetwork import (
    EditorNetwork,
    Shapes,
    Text,
    TokenFactors,
)
from transformer_lens_rome.methods.hypernetworks.recipe import Recipe, with_editor
from transformer_lens_rome.methods.hypernetworks.training import Training
from transformer_lens_rome.model.adapter import Weight

LSTM_WIDTH, H_WIDTH, HEAD_WIDTH = 512, 768, 512


class Condition(nn.Module):
    """Map a text's embeddings to h: a bidirectional LSTM, its two last states, a linear layer.

    Attributes:
        tokens: Ids of the tokens whose embeddings are trained, in order, `[n]`.
        rows: Their embeddings, `[n, d_model]`.
    """

    tokens: Tensor

    def __init__(self, d_model: int, tokens: Int[Tensor, "n"]) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.rows = nn.Parameter(torch.zeros(len(tokens), d_model))
        self.lstm = nn.LSTM(d_model, LSTM_WIDTH, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * LSTM_WIDTH, H_WIDTH)

    def forward(
        self, ids: Int[Tensor, "pos"], embeddings: Float[Tensor, "pos d_model"]
    ) -> Float[Tensor, "h"]:
        """Compute the vector h of one text; `embeddings` are the model's, for its tokens."""
        if len(self.tokens):
            at = torch.searchsorted(self.tokens, ids).clamp(max=len(self.tokens) - 1)
            trained = (self.tokens[at] == ids)[:, None]
            embeddings = torch.where(trained, self.rows[at], embeddings)
        _, (last, _) = self.lstm(embeddings[None])
        return self.linear(last.flatten()).tanh()


class Head(nn.Module):
    """Map h to the two pairs of vectors and the number for one matrix."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.widths = [d_out, d_in, d_out, d_in, 1]
        self.inner = weight_norm(nn.Linear(H_WIDTH, HEAD_WIDTH))
        self.outer = weight_norm(nn.Linear(HEAD_WIDTH, sum(self.widths)))

    def forward(self, h: Float[Tensor, "h"], factors: TokenFactors) -> Factors:
        """Compute the change of W as two factors, of rank one more than the number of tokens."""
        a_out, a_in, b_out, b_in, eta = self.outer(self.inner(h).tanh()).split(self.widths)
        left = torch.cat([factors.x * a_in.softmax(0), b_in.softmax(0)[None]]).T
        right = torch.cat([factors.delta * a_out, b_out[None]])
        return left, eta.sigmoid() * right


class KnowledgeEditorNetwork(EditorNetwork):
    """The LSTM and one head for each matrix.

    Attributes:
        names: The name of each matrix's head.
    """

    def __init__(self, shapes: Shapes, d_model: int, tokens: Int[Tensor, "n"]) -> None:
        super().__init__(shapes)
        self.names = {where: f"{where.name}_{where.layer}" for where in shapes}
        self.condition = Condition(d_model, tokens)
        self.heads = nn.ModuleDict({self.names[w]: Head(*shape) for w, shape in shapes.items()})

    def forward(self, factors: Mapping[Weight, TokenFactors], text: Text) -> dict[Weight, Factors]:
        """Compute the change of each matrix."""
        h = self.condition(*text)
        return {where: self.heads[name](h, factors[where]) for where, name in self.names.items()}


@dataclass(frozen=True)
class KnowledgeEditor(Recipe):
    """The recipe of KE, or of KE-CF with `counterfact`."""

    kind = "ke"

    def new_network(
        self, shapes: Shapes, embeddings: Float[Tensor, "n d_model"], tokens: Int[Tensor, "n"]
    ) -> KnowledgeEditorNetwork:
        """Construct a new network, whose trained embeddings start as the model's."""
        network = KnowledgeEditorNetwork(shapes, embeddings.shape[1], tokens)
        with torch.no_grad():
            network.condition.rows.copy_(embeddings)
        return network

    def settings(self) -> Training:
        """Return the published settings."""
        return Training(lr=1e-5, n_labels=None if self.counterfact else 1)


register_method("ke", with_editor(KnowledgeEditor))
register_method("ke-cf", with_editor(partial(KnowledgeEditor, counterfact=True)))
