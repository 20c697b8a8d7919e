"""Activation patching in windows of layers, in the style of `transformer_lens.patching`.

The paper restores MLP or attention outputs in windows of layers, because restoring one layer has
little effect. `get_act_patch_window` does this from corrupted tokens, a clean cache and a metric.
`patching_result` converts values to a `PatchingResult` of TransformerLens 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.tracing.kinds import KINDS, Kind, layers_at_once


def window_of(layer: int, window: int, n_layers: int) -> range:
    """Return the layers of a window, as released: layer - w//2 .. layer + ceil(w/2) - 1."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


@overload
def get_act_patch_window(
    model: Model,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: Mapping[str, Tensor],
    metric: Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor],
    *,
    kind: Kind = "mlp",
    window: int = 10,
    positions: Sequence[int] | None = None,
    reduce: Literal["scalar"] = "scalar",
    progress: bool = True,
) -> Float[Tensor, "layer pos"]: ...


@overload
def get_act_patch_window(
    model: Model,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: Mapping[str, Tensor],
    metric: Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor],
    *,
    kind: Kind = "mlp",
    window: int = 10,
    positions: Sequence[int] | None = None,
    reduce: Literal["none"],
    progress: bool = True,
) -> Any: ...


@model_call
@torch.no_grad()
def get_act_patch_window(
    model: Model,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: Mapping[str, Tensor],
    metric: Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor],
    *,
    kind: Kind = "mlp",
    window: int = 10,
    positions: Sequence[int] | None = None,
    reduce: Literal["scalar", "none"] = "scalar",
    progress: bool = True,
) -> Any:
    """Patch the clean outputs of a window of layers into the corrupted run, one position at a time.

    With `window=1` it equals `get_act_patch_mlp_out` or `get_act_patch_attn_out`. Each cell takes a
    whole forward pass, because the metric reads all logits. With one of its metrics, `causal_trace`
    is many times faster.

    Args:
        model: A HookedTransformer or TransformerBridge.
        corrupted_tokens: Token ids of the corrupted prompts.
        clean_cache: From `model.run_with_cache(clean_tokens)`, of the same shape.
        metric: A function from logits to a scalar, or with `reduce="none"` to a number per prompt.
        kind: The activations to patch.
        window: The number of layers around each layer (see `window_of`); "resid" patches one.
        positions: The positions to patch, for instance the last subject token; None: all.
        reduce: "none" keeps the number of each prompt and returns a `PatchingResult`.
        progress: Show a progress bar.

    Returns:
        `[layer, position]`, or a `PatchingResult` with the corrupted run as its baseline.

    Raises:
        ValueError: the kind is unknown, the window is below 1, or the cache lacks layers or has
            another shape.
        ImportError: `reduce="none"` with TransformerLens 3 or older: it has no `PatchingResult`.
    """
    window = layers_at_once(kind, window)
    if reduce not in ("scalar", "none"):
        raise ValueError(f"reduce must be 'scalar' or 'none', got {reduce!r}")
    if reduce == "none":
        _result_class()  # fail before the work, not after it
    n_layers, length = model.cfg.n_layers, corrupted_tokens.shape[1]
    names = [_hook(model, kind, layer) for layer in range(n_layers)]
    if missing := [name for name in names if name not in clean_cache]:
        raise ValueError(f"the clean cache lacks {missing[0]}; cache it in all blocks")
    if (shape := tuple(clean_cache[names[0]].shape[:2])) != tuple(corrupted_tokens.shape):
        raise ValueError(
            f"the clean cache is of {shape} tokens and the corrupted ones are "
            f"{tuple(corrupted_tokens.shape)}; both prompts need the same number of tokens"
        )
    positions = range(length) if positions is None else positions
    cells = [(layer, position) for layer in range(n_layers) for position in positions]
    values = []
    for layer, position in tqdm(cells, desc=f"patching {kind}", disable=not progress):
        hooks = [
            (names[at], _patch(clean_cache[names[at]], position))
            for at in window_of(layer, window, n_layers)
        ]
        values.append(metric(model.run_with_hooks(corrupted_tokens, fwd_hooks=hooks)))
    stacked = torch.stack(values).unflatten(0, (n_layers, len(positions)))
    if reduce == "scalar":
        return stacked
    return patching_result(stacked, metric(model(corrupted_tokens)), positions)


def _hook(model: Model, kind: Kind, layer: int) -> str:
    """Return the name of the hook point of a kind of state, which is its key in a cache."""
    if name := adapter.hook_name(model, KINDS[kind].at(layer)):
        return name
    raise ValueError(f"this model has no hook point for {kind!r}; causal_trace can restore it")


def _patch(clean: Float[Tensor, "batch pos d_model"], position: int) -> Callable[..., Tensor]:
    def put(activation: Tensor, hook: Any = None) -> Tensor:
        activation = activation.clone()
        activation[:, position] = clean[:, position].to(activation)
        return activation

    return put


def patching_result(
    values: Float[Tensor, "layer pos sample"],
    baseline: Float[Tensor, "sample"],
    positions: Sequence[int],
    name: str = "metric",
) -> Any:
    """Return per-sample values as a `transformer_lens.patching.PatchingResult`.

    Raises:
        ImportError: this version of TransformerLens has no `PatchingResult` (4.x has).
    """
    import pandas as pd

    cells = [(layer, position) for layer in range(len(values)) for position in positions]
    return _result_class()(
        values=values,
        axis_names=["layer", "pos"],
        index_df=pd.DataFrame(cells, columns=["layer", "pos"]),
        metric_names=[name],
        reduced=False,
        baseline=baseline,
    )


def _result_class() -> Any:
    try:
        from transformer_lens.patching import PatchingResult
    except ImportError as error:
        raise ImportError(
            "this version of TransformerLens has no PatchingResult; version 4 has. Use "
            "to_dataframe(), or a metric that gives one number"
        ) from error
    return PatchingResult
