"""Collect the second moment of keys: one streaming pass over texts, for any number of layers.

Exactly as many tokens are used as asked for. Every token counts, BOS included, padding never. A
text longer than a piece may be is cut, and every piece starts with BOS where the BOS rule asks for
one (the released code drops what does not fit instead).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from transformer_lens_rome import adapter, passes
from transformer_lens_rome.adapter import Point
from transformer_lens_rome.prompts import Encoder, Row, pad
from transformer_lens_rome.second_moment import SecondMoment, cosine, probe_keys

logger = logging.getLogger(__name__)


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
    progress: bool = True,
) -> Any:
    """C at one layer or, for a list of layers, `{layer: SecondMoment}`, in one pass over texts.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
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
        progress: Show a progress bar.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a single text; pass a list of texts: [text]")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    layers = list(layer) if isinstance(layer, Sequence) else [layer]
    adapter.check_editable(model, layers)
    encoder = Encoder.of(model, prepend_bos)
    probes = probe_keys(model, layers)

    def empty(n: int) -> SecondMoment:
        weight = adapter.w_out(model, n)
        device = "cpu" if len(layers) > 1 or weight.device.type == "mps" else weight.device
        known = {"layer": n, "prepend_bos": encoder.prepends_bos, "source": source}
        return SecondMoment.empty(len(weight), dtype, device, probe=probes[n], **known)

    halves = [{n: empty(n) for n in layers} for _ in range(2)]
    length = min(max_length, model.cfg.n_ctx or max_length)
    pieces = _pieces(texts, encoder, length, max_tokens)
    with tqdm(total=max_tokens, unit="tok", desc="second moment", disable=not progress) as bar:
        for batch in _batches(enumerate(pieces), batch_size):
            _add(model, batch, layers, halves)
            bar.update(sum(len(piece.ids) for _, piece in batch))
    moments = {n: _join_halves(halves[0].pop(n), halves[1].pop(n)) for n in layers}
    return moments if isinstance(layer, Sequence) else moments[layer]


def _pieces(
    texts: Iterable[str | Sequence[int]], encoder: Encoder, length: int, max_tokens: int
) -> Iterator[Row]:
    """Texts cut to rows of at most `length` tokens, `max_tokens` in all."""
    bos = () if encoder.bos_id is None else (encoder.bos_id,)
    left = max_tokens
    for text in texts:
        ids = encoder.ids(text) if isinstance(text, str) else [int(i) for i in text]
        ids = ids[1:] if ids and ids[0] == encoder.bos_id else ids
        step = length - len(bos)
        for first in range(0, len(ids), step):
            row = (*bos, *ids[first : first + step])[:left]
            yield Row(row)
            left -= len(row)
            if left == 0:
                return


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
    batch: list[tuple[int, Row]],
    layers: Sequence[int],
    halves: Sequence[Mapping[int, SecondMoment]],
) -> None:
    """Run one batch; even pieces of text go to the first half, odd ones to the second."""
    rows = [row for _, row in batch]
    keys = passes.read(model, pad(rows), [Point("key", n) for n in layers])
    for point, found in keys.items():
        for half in (0, 1):
            mine = [found[i, : len(r.ids)] for i, (n, r) in enumerate(batch) if n % 2 == half]
            if mine:
                halves[half][point.layer].update(torch.cat(mine))


def _join_halves(a: SecondMoment, b: SecondMoment) -> SecondMoment:
    both = a.merge(b)
    if both.n_tokens == 0:
        raise ValueError("the texts held no tokens; give collect_second_moment some text")
    if min(a.n_tokens, b.n_tokens) >= both.d_mlp:
        keys = both.probe.reshape(-1, both.d_mlp)
        pairs = [(a.solve(k, ridge=1e-6), b.solve(k, ridge=1e-6)) for k in keys]
        both.half_agreement = sum(cosine(x, y) for x, y in pairs) / len(pairs)
    if both.n_tokens < 2 * both.d_mlp:
        logger.warning(
            "the second moment of layer %s has %d tokens for d_mlp=%d; several times as many make "
            "it reliable",
            both.layer,
            both.n_tokens,
            both.d_mlp,
        )
    return both
