"""Collect the second moment of keys in one streaming pass over texts, for one or more layers.

Exactly `max_tokens` tokens are used if the texts have so many. BOS counts as a token, padding does
not. A text is cut into pieces of at most `max_length` tokens, and every piece starts with BOS if
the BOS rule adds one (the released code drops the tokens that do not fit instead).
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import torch
from tqdm.auto import tqdm

from transformer_lens_rome.distributed import on_workers
from transformer_lens_rome.model import adapter, passes, refusals
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row, pad
from transformer_lens_rome.statistics.second_moment import SecondMoment, cosine, probe_keys

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Batch = list[tuple[int, Row]]
"""Pieces of text with their numbers."""
Halves = list[dict[int, SecondMoment]]
"""Two sums for each layer, of the pieces with even and with odd numbers."""


@overload
def collect_second_moment(
    model: Model,
    texts: Iterable[str | Sequence[int]],
    layer: int,
    *,
    max_tokens: int = ...,
    batch_size: int = ...,
    max_length: int = ...,
    prepend_bos: bool | None = ...,
    dtype: torch.dtype = ...,
    source: str = ...,
    workers: int = ...,
    ray_address: str | None = ...,
    progress: bool = ...,
) -> SecondMoment: ...


@overload
def collect_second_moment(
    model: Model,
    texts: Iterable[str | Sequence[int]],
    layer: Sequence[int],
    *,
    max_tokens: int = ...,
    batch_size: int = ...,
    max_length: int = ...,
    prepend_bos: bool | None = ...,
    dtype: torch.dtype = ...,
    source: str = ...,
    workers: int = ...,
    ray_address: str | None = ...,
    progress: bool = ...,
) -> dict[int, SecondMoment]: ...


@model_call
def collect_second_moment(
    model: Model,
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
) -> SecondMoment | dict[int, SecondMoment]:
    """Return C at one layer or, for a list of layers, `{layer: SecondMoment}`, from one pass.

    Args:
        model: A HookedTransformer or TransformerBridge.
        texts: Strings, or sequences of token ids; only as many are read as needed.
        layer: A layer or a list of layers, from 0.
        max_tokens: Stop after exactly this many keys. A few times d_mlp is enough for most edits;
            check `half_agreement` in the report.
        batch_size: Pieces of text in one forward pass; affects only speed and memory.
        max_length: Tokens in a piece, including BOS, at most the model's context; longer texts are
            cut into several pieces.
        prepend_bos: Overrides the BOS rule of the checkpoint.
        dtype: The dtype of the running sum: float64, or float32 to halve its memory. Each layer
            has two sums, on the device of the weight for one layer and in main memory for several.
        source: A description of the corpus; saved with the statistics.
        workers: The number of model copies that run in parallel on Ray (the `distributed` extra).
            Their sums are added, so the result equals that of one process up to rounding.
        ray_address: The address of an existing Ray cluster. None: the cluster that this process is
            connected to, or else a local one for this call.
        progress: Show a progress bar.

    Raises:
        ValueError: An argument is invalid, the texts are empty, or a key is not finite.
        NotImplementedError: The model cannot be edited.
        ImportError: `workers` is given and Ray is not installed.
    """
    if isinstance(texts, (str, bytes, bytearray, memoryview, os.PathLike)):
        raise ValueError("texts is a single text; pass a list of texts: [text]")
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise ValueError(
            f"texts must be a list of texts or of lists of token ids, got {type(texts).__name__}; "
            "for the output of a tokenizer pass its .input_ids"
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
        raise ValueError(f"max_length={max_length} leaves no room for text; pass 2 or more")
    batches = _batches(enumerate(_pieces(texts, encoder, length, max_tokens)), batch_size)
    with tqdm(total=max_tokens, unit="tok", desc="second moment", disable=not progress) as bar:
        if workers > 1 or ray_address is not None:
            halves = _on_workers(model, plan, list(batches), workers, ray_address, bar)
        else:
            halves = plan.empty(model)
            for batch in batches:
                _add(model, batch, layers, halves)
                bar.update(_tokens(batch))
    moments = {n: _join_halves(halves[0].pop(n), halves[1].pop(n)) for n in layers}
    return moments if isinstance(layer, Sequence) else moments[layer]


class _Plan(NamedTuple):
    """The settings of a collection, which every worker receives.

    Attributes:
        layers: The layers to collect.
        dtype: The dtype of the sums.
        probes: The probe keys of each layer.
        known: Further fields of the statistics.
    """

    layers: tuple[int, ...]
    dtype: torch.dtype
    probes: Mapping[int, Any]
    known: Mapping[str, Any]

    def empty(self, model: Model) -> Halves:
        """Return two empty sums for each layer."""
        return [{n: self._moment(model, n) for n in self.layers} for _ in range(2)]

    def _moment(self, model: Model, layer: int) -> SecondMoment:
        """Return one empty sum, beside the weight for one layer, else in main memory."""
        weight = adapter.w_out(model, layer)
        beside_weight = len(self.layers) == 1 and weight.device.type != "mps"
        return SecondMoment.empty(
            len(weight),
            self.dtype,
            weight.device if beside_weight else "cpu",
            layer=layer,
            probe=self.probes[layer],
            **self.known,
        )


def _on_workers(
    model: Model, plan: _Plan, batches: list[Batch], workers: int, address: str | None, bar: Any
) -> Halves:
    """Return the sums of all batches; each worker takes several batches at a time."""
    size = max(1, -(-len(batches) // (4 * workers)))
    shards = list(_batches(iter(batches), size))
    halves = plan.empty(model)
    work = partial(_shard, plan=plan)
    for shard, parts in on_workers(workers, address, model, work, shards):
        for total, part in zip(halves, parts, strict=True):
            for n in plan.layers:
                total[n] = total[n].merge(part[n])
        bar.update(sum(map(_tokens, shard)))
    return halves


def _shard(model: Model, batches: list[Batch], plan: _Plan) -> Halves:
    """Return the sums of some batches, in main memory."""
    halves = plan.empty(model)
    for batch in batches:
        _add(model, batch, plan.layers, halves)
    for half in halves:
        for moment in half.values():
            moment.sum_kk = moment.sum_kk.cpu()
    return halves


def _tokens(batch: Batch) -> int:
    """Return the number of tokens in a batch."""
    return sum(len(piece.ids) for _, piece in batch)


def _pieces(
    texts: Iterable[str | Sequence[int]], encoder: Encoder, length: int, max_tokens: int
) -> Iterator[Row]:
    """Cut texts into rows of at most `length` tokens, and stop after `max_tokens` tokens."""
    bos = encoder.bos_before([])
    left = max_tokens
    for text in texts:
        ids = encoder.ids(text) if isinstance(text, str) else _token_ids(text, encoder)
        ids = ids[len(bos) - len(encoder.bos_before(ids)) :]  # without a BOS in the text
        step = length - len(bos)
        for first in range(0, len(ids), step):
            piece = ids[first : first + step]
            row = (*encoder.bos_before(piece), *piece)[:left]
            yield Row(row)
            left -= len(row)
            if left == 0:
                return


def _token_ids(text: Any, encoder: Encoder) -> list[int]:
    """Return token ids that were passed as a text; raise ValueError if they are not valid."""
    n_ids = len(encoder.tokenizer)
    is_sequence = isinstance(text, Sequence) or hasattr(text, "dtype")  # a tensor, an array
    if is_sequence and not isinstance(text, (bytes, bytearray, memoryview)):
        try:
            ids = [operator.index(i) if "bool" not in _kind(i) else -1 for i in text]
        except TypeError:
            ids = [-1]
        if all(0 <= i < n_ids for i in ids):
            return ids
    raise ValueError(
        f"a text is a string, or a sequence of token ids from 0 to {n_ids - 1}; got {text!r:.60}. "
        "Decode bytes, and read files, before you pass them"
    )


def _kind(i: Any) -> str:
    """Return the name of the type of a number, or of its dtype."""
    return str(getattr(i, "dtype", type(i).__name__))


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last one may be shorter."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _add(
    model: Model,
    batch: Batch,
    layers: Sequence[int],
    halves: Sequence[Mapping[int, SecondMoment]],
) -> None:
    """Run one batch; add keys of even pieces to the first half and of odd ones to the second."""
    for some in passes.apart(model, [len(row.ids) for _, row in batch]):
        rows = [batch[i] for i in some]
        tokens = pad([row for _, row in rows])
        keys = passes.read(model, tokens, [Point("key", n) for n in layers])
        for point, values in keys.items():
            for half in (0, 1):
                added = [values[i, : len(r.ids)] for i, (n, r) in enumerate(rows) if n % 2 == half]
                if added:
                    halves[half][point.layer].update(torch.cat(added))


def _join_halves(a: SecondMoment, b: SecondMoment) -> SecondMoment:
    """Merge the halves of a corpus, measure their agreement, and warn about too few tokens."""
    both = a.merge(b)
    if both.n_tokens == 0:
        raise ValueError("the texts contain no tokens; pass collect_second_moment some text")
    if min(a.n_tokens, b.n_tokens) >= both.d_mlp:
        assert both.probe is not None  # `_Plan` gives every sum its probe
        keys = both.probe.reshape(-1, both.d_mlp)
        try:
            pairs = [(a.solve(k, ridge=1e-6), b.solve(k, ridge=1e-6)) for k in keys]
            both.half_agreement = sum(cosine(x, y) for x, y in pairs) / len(pairs)
        except ValueError:
            logger.warning(
                "half agreement at layer %s is not measured: one half of the text gives no C⁻¹k",
                both.layer,
            )
    if both.n_tokens < 2 * both.d_mlp:
        logger.warning(
            "the second moment of layer %s has only %d tokens for d_mlp=%d; collect several times "
            "as many",
            both.layer,
            both.n_tokens,
            both.d_mlp,
        )
    return both
