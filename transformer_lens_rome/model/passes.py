"""Forward passes of both model classes: whole, or continued from a cache.

`adapter` names the parts of a model and `block_calls` runs single blocks; this module runs models.

Batches are padded on the right and run with a mask of ones. A causal model does not look ahead, so
tokens after a row's last one do not change the row, whatever the architecture does with masks,
positions or sliding windows. When tokens follow cached ones, the padding is on the left and masked,
so that no row has a gap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.model import adapter, vocabulary
from transformer_lens_rome.model.adapter import Hook, Point, architecture, model_class
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.vocabulary import Losses, Scored, Unembedding

NO_ROW = torch.zeros(0, dtype=torch.long)  # no logits are needed, only the hooks

# ---------------------------------------------------------------- whole


class _AllRead(Exception):
    """Ends a forward pass when all requested activations have been read."""


def read(
    model: Model, tokens: Int[Tensor, "batch pos"], points: Sequence[Point]
) -> dict[Point, Tensor]:
    """Read activations at some points of one forward pass, which stops after the last of them."""
    return read_during(model, points, lambda: final_residual(model, tokens))


@torch.no_grad()
def read_during(
    model: Model, points: Sequence[Point], run: Callable[[], Any]
) -> dict[Point, Tensor]:
    """Read activations at some points of any pass, which stops after the last of them."""
    activations: dict[Point, Tensor] = {}

    def reader(point: Point) -> Hook:
        def keep(tensor: Tensor) -> None:
            activations[point] = tensor.detach().clone()
            if len(activations) == len(set(points)):
                raise _AllRead

        return keep

    try:
        with adapter.hooks(model, [(point, reader(point)) for point in points]):
            run()
    except _AllRead:
        pass
    return activations


def logits_at(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    rows: Int[Tensor, "n"],
    positions: Int[Tensor, "n"],
) -> Float[Tensor, "n d_vocab"]:
    """Return next-token logits at chosen (row, position) pairs; only these are unembedded."""
    rows, positions = rows.to(tokens.device), positions.to(tokens.device)
    if model_class(model) == "hooked":
        final = final_residual(model, tokens)
        return unembed(model, final[rows.to(final.device), positions.to(final.device)])
    with _unembed_only(model, rows, positions):
        logits = final_residual(model, tokens)
    return _chosen(model, logits, rows)


def final_residual(model: Model, tokens: Int[Tensor, "batch pos"]) -> Tensor:
    """Run one forward pass over right-padded tokens.

    Return the residual before the final norm (HookedTransformer) or the logits (bridge).
    """
    check_context(model, tokens.shape[1])
    tokens = tokens.to(model.cfg.device)
    mask = torch.ones_like(tokens)
    if model_class(model) == "hooked":
        return model(tokens, attention_mask=mask, stop_at_layer=model.cfg.n_layers)
    return model(tokens, attention_mask=mask, return_type="logits", use_cache=False)


def check_context(model: Model, length: int) -> None:
    """Raise ValueError if a text is longer than the model's context."""
    if length > (model.cfg.n_ctx or length):
        raise ValueError(
            f"a text of {length} tokens is longer than the model's context of {model.cfg.n_ctx}; "
            "shorten the prompt or its prefix"
        )


def apart(model: Model, lengths: Sequence[int]) -> list[list[int]]:
    """Group the indices of texts that may share a pass: one group, except with LongRoPE.

    With LongRoPE, the longest text of a pass determines the rotations of all texts. So texts within
    the model's limit and longer ones need separate passes.
    """
    limit = adapter.rotation_limit(model) or max(lengths, default=0)
    short = [i for i, length in enumerate(lengths) if length <= limit]
    long = [i for i, length in enumerate(lengths) if length > limit]
    return [group for group in (short, long) if group]


# ---------------------------------------------------------------- the end of a pass


def unembed(model: Model, residual: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """Compute logits from residuals after the last block: final norm, unembedding, soft cap."""
    weight, bias, cap = unembedding(model)
    parts = []
    for part in products(_normed(model, residual), weight, bias):
        part = cap * torch.tanh(part / cap) if cap else part
        parts.append(part.transpose(0, 1).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@torch.no_grad()
def logits_of_vector(model: Model, vector: Float[Tensor, "d_model"]) -> Float[Tensor, "d_vocab"]:
    """Return the logits of a residual that is this vector, less those of one that is 0."""
    residuals = torch.stack([vector, torch.zeros_like(vector)]).to(
        model.W_U.device, model.W_U.dtype
    )
    logits, nothing = unembed(model, residuals).float().cpu()
    return logits - nothing


def log_probs(
    model: Model, residual: Float[Tensor, "n d_model"], labels: Int[Tensor, "n k"]
) -> Scored:
    """Compute log-probabilities of some tokens from residuals after the last block, in float32.

    No logits are stored, and there are no gradients.
    """
    found = vocabulary.log_probs(_normed(model, residual), unembedding(model), labels)
    return found._replace(log_probs=found.log_probs.float())


def losses(
    model: Model,
    residual: Float[Tensor, "n_plus_k d_model"],
    labels: Int[Tensor, "n"],
    log_q: Float[Tensor, "k d_vocab"] | None = None,
) -> Losses:
    """Compute losses from residuals after the last block, with gradients; see `vocabulary`."""
    return vocabulary.losses(_normed(model, residual), unembedding(model), labels, log_q)


def _normed(model: Model, residual: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """Apply the final norm."""
    return model.ln_final(residual[:, None])[:, 0]


def unembedding(model: Model) -> Unembedding:
    """Return what follows the final norm."""
    cap = float(getattr(model.cfg, "output_logits_soft_cap", 0.0) or 0.0)
    return Unembedding(model.W_U, model.b_U, max(cap, 0.0))  # TransformerLens: -1 means none


def products(
    x: Float[Tensor, "n d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, "d_vocab"],
    *,
    block: int = 2048,
) -> Iterator[Float[Tensor, "block n tokens"]]:
    """Yield `x @ W_U + b_U`; on a CPU, a stack of blocks, then what is left.

    CPU libraries are slow at one product of a few rows with a wide matrix: for 12 rows and
    262,144 tokens, forward and backward, the blocks were 1.1 to 1.4 times as fast on one core
    (`examples/benchmarks/unembedding.py`).

    `block` is the number of tokens in a block.
    """
    whole = W_U.shape[1] // block * block if x.device.type == "cpu" else 0
    if whole:
        weights = W_U[:, :whole].unflatten(1, (-1, block)).transpose(0, 1)
        biases = b_U[:whole].unflatten(0, (-1, 1, block))
        yield torch.baddbmm(biases, x.expand(len(weights), -1, -1), weights)
    if whole < W_U.shape[1]:
        yield torch.addmm(b_U[whole:], x, W_U[:, whole:])[None]


@contextmanager
def _unembed_only(model: Model, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Within this context, a bridge returns logits `[n, 1, d_vocab]`, at chosen pairs only."""

    def choose(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        chosen = hidden[rows.to(hidden.device), positions.to(hidden.device)]
        return (chosen[:, None], *args[1:])

    handle = model.unembed.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _chosen(model: Model, logits: Tensor, rows: Tensor) -> Float[Tensor, "n d_vocab"]:
    """Return the logits of a pass within `_unembed_only`, after a check of their shape."""
    if logits.shape[:2] != (len(rows), 1):
        raise NotImplementedError(f"{architecture(model)} does not unembed through model.unembed")
    return logits[:, 0]


# ---------------------------------------------------------------- continued from a cache


@torch.no_grad()
def next_logits(
    model: Model, tokens: Int[Tensor, "batch new"], cache: Any = None
) -> tuple[Float[Tensor, "batch d_vocab"], Any]:
    """Return logits after the last new token, and the cache for the next call."""
    return continue_from(model, tokens, cache, None, torch.arange(len(tokens)))


@torch.no_grad()
def keys_and_values(
    model: Model, tokens: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
) -> Any:
    """Return the cache after left-padded tokens; later passes do not change it.

    Raises:
        NotImplementedError: There is no cache, or each pass overwrites its states.
    """
    _, cache = continue_from(model, tokens, None, mask, NO_ROW)
    if cache is None:
        raise NotImplementedError("the model gives no cache of keys and values")
    if any(hasattr(layer, "update_recurrent_state") for layer in getattr(cache, "layers", ())):
        raise NotImplementedError("the model's cache holds recurrent states")
    if model_class(model) == "hooked":
        cache.freeze()
    return cache


def continue_from(
    model: Model,
    tokens: Int[Tensor, "row new"],
    cache: Any,
    mask: Int[Tensor, "row old_and_new"] | None,
    rows: Int[Tensor, "n"],
) -> tuple[Float[Tensor, "n d_vocab"], Any]:
    """Run new tokens after cached ones; return logits after the last token of rows, and the cache.

    The mask is 0 for padding, among cached and new tokens. None means that there is no padding.
    """
    tokens, new = tokens.to(model.cfg.device), tokens.shape[1]
    mask = None if mask is None else mask.to(tokens.device)
    if model_class(model) == "bridge":
        last = torch.full_like(rows, new - 1)
        with _unembed_only(model, rows, last), cache_by_both_names(model.blocks):
            logits, cache = model(
                tokens,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                return_type="logits_and_cache",
            )
        return _chosen(model, logits, rows), cache
    if cache is None:
        cache = _empty_hooked_cache(model, len(tokens))
    # the cache stores the mask of its tokens; without a mask, a start token that is also the
    # padding token would count as padding
    mask = torch.ones_like(tokens) if mask is None else mask[:, -new:]
    last = model.cfg.n_layers
    final = model(tokens, attention_mask=mask, past_kv_cache=cache, stop_at_layer=last)
    return unembed(model, final[rows.to(final.device), -1]), cache


@contextmanager
def cache_by_both_names(blocks: Iterable[Any]) -> Iterator[None]:
    """Within this context, pass the cache to attention as `past_key_values` too.

    The bridges of TransformerLens 4.3 read this name, but transformers 5.24 passes the cache as
    `cache`. Without the old name, a bridge would silently treat the first new token as the first
    token of the text. The deprecation warning of transformers is meant for TransformerLens, so it
    is not shown to the user.
    """

    def add_name(
        _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if (cache := kwargs.get("cache")) is None:
            return None
        return args, {"past_key_values": cache, **kwargs}

    attention = [block.attn for block in blocks if hasattr(block, "attn")]
    handles = [part.register_forward_pre_hook(add_name, with_kwargs=True) for part in attention]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(Both )?`past_key_values`", FutureWarning)
            yield
    finally:
        for handle in handles:
            handle.remove()


def _empty_hooked_cache(model: Model, batch: int) -> Any:
    """Return an empty key-value cache for a HookedTransformer; 3.x renamed its class."""
    try:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
    except ImportError:
        from transformer_lens import HookedTransformerKeyValueCache

        return HookedTransformerKeyValueCache.init_cache(model.cfg, model.cfg.device, batch)
    return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, batch)
