"""Default sources of C: bundled text, the cache, a published file, or a corpus.

For some models the package has text that the model wrote (`sampled/`, by
`examples/scripts/sample_text.py`), from which C is collected in seconds. The text is used only if
the given model has the keys of the model that wrote it.

A file in the cache folder (see `files.cache`) is selected by model name, layer, BOS rule and
corpus. It is used only if its probe keys are those of the given model.

The authors publish no checksums of their statistics, so these files are not downloaded. Users can
save them at the path that `default_second_moment` logs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.ledger import edited_weights
from transformer_lens_rome.extras import first_line
from transformer_lens_rome.files.cache import cache_folder, safe_name
from transformer_lens_rome.files.strict_json import parse
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import short_name
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.default_layer import default_layer
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sampled_texts
from transformer_lens_rome.statistics.collect import collect_second_moment
from transformer_lens_rome.statistics.second_moment import SecondMoment, probe_keys

logger = logging.getLogger(__name__)

_PUBLISHED = {
    "gpt2-medium": ("gpt2-medium", "c_proj"),
    "gpt2-large": ("gpt2-large", "c_proj"),
    "gpt2-xl": ("gpt2-xl", "c_proj"),
    "gpt-j-6b": ("EleutherAI_gpt-j-6B", "fc_out"),
}
_HOST = "https://rome.baulab.info/data/stats"
CORPUS = ("wikimedia/wikipedia", "20231101.en")
"""The corpus that is streamed with `datasets` if there is no other source."""


@model_call
def default_second_moment(
    model: Model, layer: int, *, prepend_bos: bool, progress: bool = True
) -> SecondMoment:
    """Return C for a layer from the first available source.

    The sources are, in this order: text that the model wrote and that is part of this package;
    statistics of Wikipedia in the cache; the authors' file in the cache (GPT-2 M/L/XL, GPT-J);
    statistics of sampled text in the cache; Wikipedia, streamed.

    Raises:
        ValueError: No source is available, for instance offline; the message says what to pass.
    """
    if bundled_texts(model):
        return sampled_second_moment(model, layer, prepend_bos=prepend_bos, progress=progress)
    if (moment := _cached(model, layer, prepend_bos, "wikipedia")) is not None:
        return moment
    try:
        if short_name(model) in _PUBLISHED and not prepend_bos:
            return _published(model, layer)
    except (OSError, ValueError) as error:
        logger.warning("no published statistics for layer %d: %s", layer, first_line(error))
    if (moment := _cached(model, layer, prepend_bos, "sampled")) is not None:
        return moment
    try:
        collect = partial(_from_wikipedia, model, layer, prepend_bos, progress)
        return _collected(model, layer, prepend_bos, "wikipedia", collect)
    except (_NoCorpus, ImportError) as error:
        logger.warning("no Wikipedia statistics for layer %d: %s", layer, first_line(error))
    raise ValueError(
        f"no second moment for layer {layer} of {adapter.model_name(model)}: there is none in "
        f"{cache_folder()}, and no corpus could be read. Pass second_moment=, either "
        "collect_second_moment(model, your_texts, layer) or, if you have no text, "
        "collect_second_moment(model, sampled_texts(model, 500), layer)"
    )


@model_call
def sampled_second_moment(
    model: Model,
    layer: int | None = None,
    *,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> SecondMoment:
    """Return C of text that the model writes; it is collected once and saved in the cache folder.

    `layer=None` means the model's default layer, `max_tokens=None` four tokens per dimension of a
    key. With the default `max_tokens`, `rome_edit` uses the saved statistics later. Bundled text is
    used if it is long enough; otherwise text is sampled, which takes minutes on a CPU.
    """
    layer = default_layer(model) if layer is None else layer
    prepend_bos = Encoder.of(model, prepend_bos).prepends_bos
    enough = 4 * len(adapter.w_out(model, layer))
    budget = enough if max_tokens is None else max_tokens
    corpus = "sampled" if max_tokens is None else f"sampled-{max_tokens}"

    def collect() -> SecondMoment:
        texts: Sequence[str] = bundled_texts(model) if budget <= enough else ()
        if not texts:
            texts = sampled_texts(model, -(-budget // 120), progress=progress)
        return collect_second_moment(
            model,
            texts,
            layer,
            max_tokens=budget,
            prepend_bos=prepend_bos,
            source="sampled",
            progress=progress,
        )

    return cached_second_moment(model, layer, prepend_bos, corpus, collect)


@model_call
def bundled_texts(model: Model) -> tuple[str, ...]:
    """Return the texts of this package that the given model wrote; empty if there are none.

    The model is recognised by the norms of some keys of its first block, which edits do not change.
    """
    name = f"{safe_name(short_name(model))}.json"
    file = resources.files("transformer_lens_rome.statistics") / "sampled" / name
    if not file.is_file():
        return ()
    bundled = parse(file.read_bytes(), name)
    expected = torch.tensor(bundled["key_norms"])
    if ((key_norms(model) - expected).abs() > 0.05 * expected).any():
        logger.warning(
            "bundled text of %s is not used: this model has other keys", bundled["model"]
        )
        return ()
    return tuple(bundled["texts"])


@model_call
def key_norms(model: Model) -> Float[Tensor, "token"]:
    """Return the norms of the keys of some fixed tokens in the first block."""
    return probe_keys(model, [0])[0].unflatten(0, (8, -1)).norm(dim=1)


@model_call
def cached_second_moment(
    model: Model,
    layer: int,
    prepend_bos: bool,
    corpus: str,
    make: Callable[[], SecondMoment],
) -> SecondMoment:
    """Return the statistics of one corpus from the cache, or call `make` and save its result."""
    moment = _cached(model, layer, prepend_bos, corpus)
    return _collected(model, layer, prepend_bos, corpus, make) if moment is None else moment


def _collected(
    model: Model, layer: int, prepend_bos: bool, corpus: str, make: Callable[[], SecondMoment]
) -> SecondMoment:
    """Call `make`, and save its result in the cache unless the model is edited."""
    moment = make()
    if edited_weights(model):
        logger.warning(
            "statistics of an edited model are not kept; the next call computes them again"
        )
        return moment
    path = _path(model, layer, prepend_bos, corpus)
    try:
        moment.save(path)
        logger.info("saved the second moment of layer %d in %s", layer, path)
    except OSError as error:
        logger.warning("cannot save statistics in %s (%s); they are not kept", path, error)
    return moment


def _path(model: Model, layer: int, prepend_bos: bool, corpus: str) -> Path:
    """Return the path of statistics in the cache folder."""
    name, width = safe_name(adapter.model_name(model)), len(adapter.w_out(model, layer))
    bos = "bos" if prepend_bos else "nobos"
    file = f"{name}-{width}-layer{layer}-{bos}-{safe_name(corpus, 40)}.safetensors"
    return cache_folder() / file


def _cached(model: Model, layer: int, prepend_bos: bool, corpus: str) -> SecondMoment | None:
    """Return the statistics in the cache; None if there are none of this model."""
    path = _path(model, layer, prepend_bos, corpus)
    try:
        moment = SecondMoment.load(path)
        moment.check_fits(model, layer, prepend_bos)
        if moment.n_tokens < moment.d_mlp:
            raise ValueError(f"{moment.n_tokens} tokens are too few for d_mlp={moment.d_mlp}")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        logger.warning("%s is not used: %s", path, error)
        return None
    logger.info("second moment of layer %d: %s", layer, path)
    return moment


def _published(model: Model, layer: int) -> SecondMoment:
    """Return the authors' statistics of 100,000 Wikipedia articles, if the user saved the file.

    Raises:
        FileNotFoundError: The file is not in the cache folder.
    """
    folder, module = _PUBLISHED[short_name(model)]
    name = f"transformer.h.{layer}.mlp.{module}_float32_mom2_100000.npz"
    path = cache_folder() / folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{_HOST}/{folder}/wikipedia_stats/{name} is published without a checksum, so it is "
            f"not downloaded; save it as {path} to use it"
        )
    logger.info("second moment of layer %d: %s", layer, path)
    return SecondMoment.from_npz(path)


def _from_wikipedia(model: Model, layer: int, prepend_bos: bool, progress: bool) -> SecondMoment:
    """Return C of the start of the English Wikipedia, streamed, at ten tokens per dimension."""
    budget = max(100_000, 10 * len(adapter.w_out(model, layer)))
    return collect_second_moment(
        model,
        _articles(),
        layer,
        max_tokens=budget,
        prepend_bos=prepend_bos,
        source="/".join(CORPUS),
        progress=progress,
    )


class _NoCorpus(Exception):
    """The corpus cannot be read; errors of the collection itself keep their own types."""


def _articles() -> Iterator[str]:
    """Yield the texts of the Wikipedia corpus; raise `_NoCorpus` if it cannot be read."""
    from datasets import load_dataset

    try:
        for article in load_dataset(*CORPUS, split="train", streaming=True):
            yield article["text"]
    except GeneratorExit:
        raise
    except Exception as error:  # each host library and network stack has different errors
        raise _NoCorpus(first_line(error)) from error
