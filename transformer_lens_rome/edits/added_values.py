"""The vectors that an edit adds to the values of some texts by changing W_out: k delta W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.kinds import Edit, EditRequest
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder


class AddedValues(NamedTuple):
    """The vectors that an edit's change of one W_out adds to the values, k delta W.

    Attributes:
        layer: The layer of that W_out.
        shifts: For each text, the norm of the vector at each token, in units of the value's norm.
        at_subject: The shift at the edited prompt's last subject token.
        shares: The share of each neuron in the vector at that token. They sum to 1.
        vector: The vector a at that token.
        parts: For each text, `<k delta W, a> / ||a||^2` at each token: how much of a it gets.
    """

    layer: int
    shifts: list[Float[Tensor, "pos"]]
    at_subject: float
    shares: Float[Tensor, "d_mlp"]
    vector: Float[Tensor, "d_model"]
    parts: list[Float[Tensor, "pos"]]


@torch.no_grad()
def added_values(
    model: Model,
    encoder: Encoder,
    edit: Edit,
    rows: Sequence[Sequence[int]],
    request: EditRequest | None = None,
) -> list[AddedValues]:
    """Return what each change of a W_out adds, with the keys and values of the model as it is.

    Args:
        model: The model, without the edit.
        encoder: The encoder of the rows.
        edit: Any edit; its changes of other weights than W_out add nothing here.
        rows: Token ids of the texts, the edited prompt first.
        request: The fact of that prompt; None: the edit's first.
    """
    matrices = [w for w in edit.sizes() if w.name == "W_out" and edit.change(w).any()]
    if not matrices:
        return []
    points = [Point(name, where.layer) for where in matrices for name in ("key", "value")]
    read = [passes.read(model, torch.tensor([list(row)]), points) for row in rows]
    request = request or edit.request
    last = encoder.templated_row(request.prompt, request.subject).subject[-1]
    added = []
    for where in matrices:
        keys = [one[Point("key", where.layer)][0].float().cpu() for one in read]
        values = [one[Point("value", where.layer)][0].float().cpu() for one in read]
        delta = edit.change(where).to(keys[0])
        vectors = [k @ delta for k in keys]
        shifts = [x.norm(dim=1) / v.norm(dim=1) for x, v in zip(vectors, values, strict=True)]
        at = vectors[0][last]
        parts = [x @ at / at.square().sum() for x in vectors]
        shares = keys[0][last] * (delta @ at) / at.square().sum()
        added.append(AddedValues(where.layer, shifts, shifts[0][last].item(), shares, at, parts))
    return added
