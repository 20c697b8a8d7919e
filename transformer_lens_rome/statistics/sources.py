"""Where C comes from when nobody gives one: text that ships, the cache, a published file, a corpus.

For a bundled model the package has text that this model wrote (`sampled/`, by
`examples/sample_text.py`), from which C is collected in seconds. It is used only if the model at
hand has the keys of the model that wrote it.

A file in the cache folder (see `files`) is found by model name, layer, BOS rule and corpus, and
used only if its probe keys are those of the model at hand.

The authors publish no checksums of their statistics, so these are not downloaded: whoever wants
them puts them where `default_second_moment` says that it looked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.ledger import edited_weights
from transformer_lens_rome.files.cache import cache_folder, safe_name
from transformer_lens_rome.files.strict_json import parse
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import short_name
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.default_layer import default_layer
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
"""The corpus that is streamed with `datasets` where nothing else is at hand."""


@model_call
def default_second_moment(
    model: Any, layer: int, *, prepend_bos: bool, progress: bool = True
) -> SecondMoment:
    """C for a layer, from the first of these that can be had.

    The model's own text, if it ships with this package; Wikipedia in the cache; the authors' file
    there (GPT-2 M/L/XL, GPT-J); the model's own sampled text in the cache; Wikipedia, streamed.

    Raises:
        ValueError: none of these can be had, for instance offline; the message has the remedies.
    """
    if bundled_texts(model):
        return sampled_second_moment(model, layer, prepend_bos=prepend_bos, progress=progress)
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


@model_call
def sampled_second_moment(
    model: Any,
    layer: int | None = None,
    *,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> SecondMoment:
    """C from text that the model writes itself; made once, then kept in the cache folder.

    `layer=None` is the model's default layer, `max_tokens=None` four tokens for each dimension of a
    key. Made with the default, `rome_edit` finds these statistics by itself later. Text that ships
    with this package is taken where it is enough; sampling it takes minutes on a CPU.
    """
    layer = default_layer(model) if layer is None else layer
    prepend_bos = Encoder.of(model, prepend_bos).prepends_bos
    enough = 4 * len(adapter.w_out(model, layer))
    budget = enough if max_tokens is None else max_tokens
    corpus = "sampled" if max_tokens is None else f"sampled-{max_tokens}"

    def make() -> SecondMoment:
        texts = bundled_texts(model) if budget <= enough else ()
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

    return cached_second_moment(model, layer, prepend_bos, corpus, make)


@model_call
def bundled_texts(model: Any) -> tuple[str, ...]:
    """Text that ships with this package for a model, if the model is the one that wrote it.

    That is judged by the norms of a few keys of its first block, which edits leave as they are.
    """
    name = f"{safe_name(short_name(model))}.json"
    file = resources.files("transformer_lens_rome.statistics") / "sampled" / name
    if not file.is_file():
        return ()
    found = parse(file.read_bytes(), name)
    expected = torch.tensor(found["key_norms"])
    if ((key_norms(model) - expected).abs() > 0.05 * expected).any():
        logger.warning("text of %s is not used: this model has other keys", found["model"])
        return ()
    return tuple(found["texts"])


@model_call
def key_norms(model: Any) -> Float[Tensor, "token"]:
    """Norms of the keys that a fixed handful of tokens have in the first block."""
    return probe_keys(model, [0])[0].unflatten(0, (8, -1)).norm(dim=1)


@model_call
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
