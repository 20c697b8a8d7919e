"""Where C comes from when nobody gives one: the cache, the authors' files, or a public corpus.

A file in the cache folder (see `files`) is found by model name, layer, BOS rule and corpus, and
used only if its probe keys are those of the model at hand.

The authors publish no checksums of their statistics, so these are not downloaded: whoever wants
them puts them where `default_second_moment` says that it looked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformer_lens_rome import adapter
from transformer_lens_rome.collection import collect_second_moment
from transformer_lens_rome.defaults import short_name
from transformer_lens_rome.files import cache_folder, safe_name
from transformer_lens_rome.ledger import edited_weights
from transformer_lens_rome.second_moment import SecondMoment

logger = logging.getLogger(__name__)

_PUBLISHED = {
    "gpt2-medium": ("gpt2-medium", "c_proj"),
    "gpt2-large": ("gpt2-large", "c_proj"),
    "gpt2-xl": ("gpt2-xl", "c_proj"),
    "gpt-j-6b": ("EleutherAI_gpt-j-6B", "fc_out"),
}
_HOST = "https://rome.baulab.info/data/stats"
CORPUS = ("wikimedia/wikipedia", "20231101.en")
"""The corpus that is streamed with `datasets` where nothing else is at hand."""


def default_second_moment(
    model: Any, layer: int, *, prepend_bos: bool, progress: bool = True
) -> SecondMoment:
    """C for a layer, from the first of these that can be had.

    Wikipedia in the cache; the authors' file there (GPT-2 M/L/XL, GPT-J); the model's own sampled
    text in the cache; Wikipedia, streamed.

    Raises:
        ValueError: none of these can be had, for instance offline; the message has the remedies.
    """
    if (found := _cached(model, layer, prepend_bos, "wikipedia")) is not None:
        return found
    try:
        if short_name(model) in _PUBLISHED and not prepend_bos:
            return _published(model, layer)
    except (OSError, ValueError) as error:
        logger.warning("no published statistics for layer %d: %s", layer, _first_line(error))
    if (found := _cached(model, layer, prepend_bos, "sampled")) is not None:
        return found
    try:
        make = partial(_from_wikipedia, model, layer, prepend_bos, progress)
        return cached_second_moment(model, layer, prepend_bos, "wikipedia", make)
    except (_NoCorpus, ImportError) as error:
        logger.warning("no Wikipedia statistics for layer %d: %s", layer, _first_line(error))
    raise ValueError(
        f"no second moment for layer {layer} of {adapter.model_name(model)}: none is in "
        f"{cache_folder()} and no corpus could be read. Pass second_moment=, either "
        "collect_second_moment(model, your_texts, layer) or, with no text at hand, "
        "collect_second_moment(model, sampled_texts(model, 500), layer)"
    )


def cached_second_moment(
    model: Any,
    layer: int,
    prepend_bos: bool,
    corpus: str,
    make: Callable[[], SecondMoment],
) -> SecondMoment:
    """The statistics of one corpus from the cache; else made, and kept there if possible."""
    found = _cached(model, layer, prepend_bos, corpus)
    if found is None:
        found = make()
        if edited_weights(model):
            logger.warning(
                "statistics of an edited model are not kept; the next call makes them anew"
            )
            return found
        path = _path(model, layer, prepend_bos, corpus)
        try:
            found.save(path)
            logger.info("kept the second moment of layer %d in %s", layer, path)
        except OSError as error:
            logger.warning("cannot keep statistics in %s (%s); going on without", path, error)
    return found


def _path(model: Any, layer: int, prepend_bos: bool, corpus: str) -> Path:
    name, width = safe_name(adapter.model_name(model)), len(adapter.w_out(model, layer))
    bos = "bos" if prepend_bos else "nobos"
    file = f"{name}-{width}-layer{layer}-{bos}-{safe_name(corpus, 40)}.safetensors"
    return cache_folder() / file


def _cached(model: Any, layer: int, prepend_bos: bool, corpus: str) -> SecondMoment | None:
    """What the cache holds, if it belongs to this very model."""
    path = _path(model, layer, prepend_bos, corpus)
    try:
        found = SecondMoment.load(path)
        found.check_fits(model, layer, prepend_bos)
        if found.n_tokens < found.d_mlp:
            raise ValueError(f"{found.n_tokens} tokens are too few for d_mlp={found.d_mlp}")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        logger.warning("%s is not used: %s", path, error)
        return None
    logger.info("second moment of layer %d: %s", layer, path)
    return found


def _published(model: Any, layer: int) -> SecondMoment:
    """The authors' statistics file, 100,000 Wikipedia articles, if it was put into the cache."""
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


def _from_wikipedia(model: Any, layer: int, prepend_bos: bool, progress: bool) -> SecondMoment:
    """C from the start of the English Wikipedia, streamed, at ten tokens for each dimension."""
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
    """The corpus cannot be read; whatever else goes wrong meanwhile is not hidden behind this."""


def _articles() -> Iterator[str]:
    from datasets import load_dataset

    try:
        for article in load_dataset(*CORPUS, split="train", streaming=True):
            yield article["text"]
    except GeneratorExit:
        raise
    except Exception as error:  # each host library and its network stack has errors of its own
        raise _NoCorpus(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
