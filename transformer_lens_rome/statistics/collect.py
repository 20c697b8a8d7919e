"""Collect the second moment of keys: one streaming pass over texts, for any number of layers.

Exactly as many tokens are used as asked for. Every token counts, BOS included, padding never. A
text longer than a piece may be is cut, and every piece starts with BOS where the BOS rule asks for
one (the released code drops what does not fit instead).
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from transformer_lens_rome.distributed import on_workers
from transformer_lens_rome.model import adapter, passes, refusals
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.prompts.encoder import Encoder, Row, pad
from transformer_lens_rome.statistics.second_moment import SecondMoment, cosine, probe_keys

logger = logging.getLogger(__name__)


@model_call
def collect_second_moment(
    model: Any,
    texts: Iterable[str | Sequence[int]],
    layer: int | Sequence[int],
    *,
    max_tokens: int = 100_000,
    batch_size: int = 16,
    max_length: int = 512,
    prepend_bos: bool | None = None,
    dtype: torch.dtype = torch.float64,
    source: str = "texts",
    workers: int = 1,
    ray_address: str | None = None,
    progress: bool = True,
) -> Any:
    """C at one layer or, for a list of layers, `{layer: SecondMoment}`, in one pass over texts.

    Args:
        model: A HookedTransformer or TransformerBridge.
        texts: Strings, or sequences of token ids; read only as far as needed.
        layer: A layer or a list of layers, from 0.
        max_tokens: Stop after exactly this many keys. A few times d_mlp is enough for most edits;
            see the report's `half_agreement`.
        batch_size: Pieces of text in one forward pass; changes nothing but speed and memory.
        max_length: Tokens in a piece, BOS included; longer texts are cut (and at the context).
        prepend_bos: Overrides the checkpoint's own rule.
        dtype: Of the running sum: float64, or float32 to halve its memory. Two sums a layer are
            held, beside the weight for one layer and in main memory for several.
        source: The corpus, in words; kept with the statistics.
        workers: How many copies of the model read side by side, on Ray (the `distributed` extra);
            their sums are added, so the result is that of one process but for rounding.
        ray_address: An existing Ray cluster's; None: the one that this process is connected to,
            else one on this machine, for this call.
        progress: Show a progress bar.

    Raises:
        ValueError: bad arguments, no text, or keys that are not finite.
        NotImplementedError: a model that cannot be edited.
        ImportError: `workers` without Ray.
    """
    if isinstance(texts, (str, bytes, bytearray, memoryview, os.PathLike)):
        raise ValueError("texts is a single text; pass a list of texts: [text]")
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise ValueError(
            f"texts is a list of texts, or of lists of token ids, got a {type(texts).__name__}; "
            "of a tokenizer's output pass .input_ids"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    layers = list(layer) if isinstance(layer, Sequence) else [layer]
    refusals.check_editable(model, layers)
    encoder = Encoder.of(model, prepend_bos)
    known = {"prepend_bos": encoder.prepends_bos, "source": source}
    plan = _Plan(tuple(layers), dtype, probe_keys(model, layers), known)
    length = min(max_length, model.cfg.n_ctx or max_length)
    if length <= encoder.prepends_bos:
        raise ValueError(f"max_length={max_length} leaves no room for text")
    batches = _batches(enumerate(_pieces(texts, encoder, length, max_tokens)), batch_size)
    several = workers > 1 or ray_address is not None
    with tqdm(total=max_tokens, unit="tok", desc="second moment", disable=not progress) as bar:
        if several:
            halves = _side_by_side(model, plan, list(batches), workers, ray_address, bar)
        else:
            halves = plan.empty(model)
            for batch in batches:
                _add(model, batch, layers, halves)
                bar.update(_tokens(batch))
    moments = {n: _join_halves(halves[0].pop(n), halves[1].pop(n)) for n in layers}
    return moments if isinstance(layer, Sequence) else moments[layer]


Batch = list[tuple[int, Row]]
Halves = list[dict[int, SecondMoment]]


class _Plan(NamedTuple):
    """What every process that collects must know."""

    layers: tuple[int, ...]
    dtype: torch.dtype
    probes: Mapping[int, Any]
    known: Mapping[str, Any]

    def empty(self, model: Any) -> Halves:
        """Two empty sums a layer."""
        return [{n: self._moment(model, n) for n in self.layers} for _ in range(2)]

    def _moment(self, model: Any, layer: int) -> SecondMoment:
        weight = adapter.w_out(model, layer)
        here = len(self.layers) == 1 and weight.device.type != "mps"
        return SecondMoment.empty(
            len(weight),
            self.dtype,
            weight.device if here else "cpu",
            layer=layer,
            probe=self.probes[layer],
            **self.known,
        )


def _side_by_side(
    model: Any, plan: _Plan, batches: list[Batch], workers: int, address: str | None, bar: Any
) -> Halves:
    """The sums of all batches, each worker taking several at a time."""
    size = max(1, -(-len(batches) // (4 * workers)))
    shards = list(_batches(iter(batches), size))
    halves = plan.empty(model)
    for shard, found in on_workers(workers, address, model, partial(_shard, plan=plan), shards):
        for total, part in zip(halves, found, strict=True):
            for n in plan.layers:
                total[n] = total[n].merge(part[n])
        bar.update(sum(map(_tokens, shard)))
    return halves


def _shard(model: Any, record: list[Batch], plan: _Plan) -> Halves:
    """The sums of some batches, in main memory."""
    halves = plan.empty(model)
    for batch in record:
        _add(model, batch, plan.layers, halves)
    for half in halves:
        for moment in half.values():
            moment.sum_kk = moment.sum_kk.cpu()
    return halves


def _tokens(batch: Batch) -> int:
    return sum(len(piece.ids) for _, piece in batch)


def _pieces(
    texts: Iterable[str | Sequence[int]], encoder: Encoder, length: int, max_tokens: int
) -> Iterator[Row]:
    """Texts cut to rows of at most `length` tokens, `max_tokens` in all."""
    bos = encoder.bos_before([])
    left = max_tokens
    for text in texts:
        ids = encoder.ids(text) if isinstance(text, str) else _token_ids(text, encoder)
        ids = ids[len(bos) - len(encoder.bos_before(ids)) :]  # without one of its own
        step = length - len(bos)
        for first in range(0, len(ids), step):
            piece = ids[first : first + step]
            row = (*encoder.bos_before(piece), *piece)[:left]
            yield Row(row)
            left -= len(row)
            if left == 0:
                return


def _token_ids(text: Any, encoder: Encoder) -> list[int]:
    """Token ids that were given in place of a text."""
    whole = len(encoder.tokenizer)
    ordered = isinstance(text, Sequence) or hasattr(text, "dtype")  # a tensor, an array
    if ordered and not isinstance(text, (bytes, bytearray, memoryview)):
        try:
            ids = [operator.index(i) if "bool" not in _kind(i) else -1 for i in text]
        except TypeError:
            ids = [-1]
        if all(0 <= i < whole for i in ids):
            return ids
    raise ValueError(
        f"a text is a string, or a sequence of token ids from 0 to {whole - 1}; got {text!r:.60}. "
        "Decode bytes, and read files, before you pass them"
    )


def _kind(i: Any) -> str:
    return str(getattr(i, "dtype", type(i).__name__))


def _batches(items: Iterator, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _add(
    model: Any,
    batch: Batch,
    layers: Sequence[int],
    halves: Sequence[Mapping[int, SecondMoment]],
) -> None:
    """Run one batch; even pieces of text go to the first half, odd ones to the second."""
    for some in passes.apart(model, [len(row.ids) for _, row in batch]):
        rows = [batch[i] for i in some]
        tokens = pad([row for _, row in rows])
        keys = passes.read(model, tokens, [Point("key", n) for n in layers])
        for point, found in keys.items():
            for half in (0, 1):
                mine = [found[i, : len(r.ids)] for i, (n, r) in enumerate(rows) if n % 2 == half]
                if mine:
                    halves[half][point.layer].update(torch.cat(mine))


def _join_halves(a: SecondMoment, b: SecondMoment) -> SecondMoment:
    both = a.merge(b)
    if both.n_tokens == 0:
        raise ValueError("the texts held no tokens; give collect_second_moment some text")
    if min(a.n_tokens, b.n_tokens) >= both.d_mlp:
        keys = both.probe.reshape(-1, both.d_mlp)
        try:
            pairs = [(a.solve(k, ridge=1e-6), b.solve(k, ridge=1e-6)) for k in keys]
            both.half_agreement = sum(cosine(x, y) for x, y in pairs) / len(pairs)
        except ValueError:
            logger.warning(
                "half agreement at layer %s: half of the text gives nothing to compare with",
                both.layer,
            )
    if both.n_tokens < 2 * both.d_mlp:
        logger.warning(
            "the second moment of layer %s has %d tokens for d_mlp=%d; several times as many make "
            "it reliable",
            both.layer,
            both.n_tokens,
            both.d_mlp,
        )
    return both
