"""Keys and values of an MLP: the inputs and outputs of W_out at a token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.protocol import Model


def read_keys_and_values(
    forward: PartialForward, layer: int
) -> tuple[Float[Tensor, "row d_mlp"], Float[Tensor, "row d_model"]]:
    """Read keys and values at each row's start, the last subject token, in float32.

    Raises:
        NotImplementedError, ValueError: See `check_value`.
    """
    model, points = forward.model, (Point("key", layer), Point("value", layer))
    keys, values = forward.read(points)
    check_value(model, layer, keys, values)
    return keys.float(), values.float()


def check_value(
    model: Model, layer: int, keys: Float[Tensor, "n d_mlp"], values: Float[Tensor, "n d_model"]
) -> None:
    """Check that value = key @ W_out + b_out, which an edit of W_out assumes.

    Raises:
        NotImplementedError: The value differs.
        ValueError: A key is not finite.
    """
    if not torch.isfinite(keys).all():
        raise ValueError(
            f"a key at layer {layer} contains NaN or infinity; check the model's weights and dtype"
        )
    weight, bias = adapter.w_out(model, layer).detach(), adapter.b_out(model, layer)
    expected = keys.float() @ weight.float() + bias.float()
    error = (expected - values.float()).norm() / values.float().norm()
    if not error < max(1e-3, 8 * torch.finfo(values.dtype).eps):
        raise NotImplementedError(
            f"{adapter.architecture(model)}: the value at layer {layer} is not key @ W_out + b_out "
            f"(relative error {error:.1e}), so an edit of W_out would not have the computed effect"
        )
