"""Trace many facts, for averages: which ones the model knows, and runs that survive a stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from transformer_lens_rome.files.cache import safe_name
from transformer_lens_rome.files.strict_json import stripped
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import top_tokens
from transformer_lens_rome.tracing.causal_trace import causal_trace, severed_trace
from transformer_lens_rome.tracing.corruption import subject_embedding_std
from transformer_lens_rome.tracing.known_facts import KnownFact
from transformer_lens_rome.tracing.results import CausalTrace, Kind, Sever, SeveredTrace

logger = logging.getLogger(__name__)
T = TypeVar("T", CausalTrace, SeveredTrace)


@model_call
def facts_known_to(
    model: Any, facts: Iterable[KnownFact], *, limit: int | None = None, progress: bool = True
) -> tuple[list[KnownFact], int]:
    """The facts whose attribute is the model's top token, and how many were left out before.

    As in the released code, an attribute of several tokens counts as not known.

    Args:
        model: A HookedTransformer or TransformerBridge.
        facts: Asked in order.
        limit: Stop when so many are found.
        progress: Show a progress bar.
    """
    encoder, known, wrong = Encoder.of(model), [], 0
    for fact in tqdm(facts, desc="asking", disable=not progress):
        if limit is not None and len(known) >= limit:
            break
        ((token, _),) = top_tokens(model, fact.prompt, 1, encoder=encoder)
        if stripped(token) == stripped(fact.attribute):
            known.append(fact)
        else:
            wrong += 1
    return known, wrong


@model_call
def trace_facts(
    model: Any,
    facts: Sequence[KnownFact],
    *,
    kind: Kind = "resid",
    window: int = 10,
    noise_std: float | None = None,
    n_samples: int = 10,
    seed: int = 0,
    folder: Any = None,
    progress: bool = True,
) -> list[CausalTrace]:
    """`causal_trace` of each fact, of the model's top token, with one noise level for all.

    Args:
        model: A HookedTransformer or TransformerBridge.
        facts: What to trace; see `facts_known_to`.
        kind: As for `causal_trace`, as are window, n_samples and seed.
        window: Layers restored at once, for "mlp" and "attn".
        noise_std: None: 3 times `subject_embedding_std` of these facts' subjects. The paper takes
            all of the known facts; give it if you trace them in parts.
        n_samples: How many noises are drawn.
        seed: For drawing them.
        folder: Where each trace is kept as soon as it is made. A second call with the same folder
            reads what is there and makes what is missing.
        progress: Show a progress bar.

    Raises:
        ValueError: the folder holds traces that were made with other options.
    """
    shared = _shared(model, facts, noise_std, n_samples, seed)
    own = {"kind": kind, "window": 1 if kind == "resid" else window}
    make = partial(causal_trace, **own, **shared)
    return _each(model, facts, make, CausalTrace, {**own, **shared}, folder, progress)


@model_call
def sever_facts(
    model: Any,
    facts: Sequence[KnownFact],
    *,
    sever: Sever = "mlp",
    noise_std: float | None = None,
    n_samples: int = 10,
    seed: int = 0,
    folder: Any = None,
    progress: bool = True,
) -> list[SeveredTrace]:
    """`severed_trace` of each fact; everything else as for `trace_facts`."""
    shared = _shared(model, facts, noise_std, n_samples, seed)
    make = partial(severed_trace, sever=sever, **shared)
    return _each(model, facts, make, SeveredTrace, {"sever": sever, **shared}, folder, progress)


def _shared(
    model: Any, facts: Sequence[KnownFact], noise_std: float | None, n_samples: int, seed: int
) -> dict[str, Any]:
    """The options that all facts share, with 3 sigma of their subjects where none is given."""
    if noise_std is None and facts:
        noise_std = 3 * subject_embedding_std(model, [fact.subject for fact in facts])
        logger.info("noise of standard deviation %.4g: 3 sigma of all subjects", noise_std)
    return {"noise_std": noise_std, "n_samples": n_samples, "seed": seed}


def _each(
    model: Any,
    facts: Sequence[KnownFact],
    make: Callable[..., T],
    result: type[T],
    options: dict[str, Any],
    folder: Any,
    progress: bool,
) -> list[T]:
    """Make or read the trace of each fact; of several occurrences the first, as released."""
    traces = []
    what = f"tracing {options.get('kind') or options['sever'] + ' severed'}"
    for fact in tqdm(facts, desc=what, disable=not progress):
        path = None if folder is None else Path(folder) / safe_name(f"{fact.known_id}.safetensors")
        if path is not None and path.is_file():
            traces.append(result.load(path))
            _check_same(traces[-1], model, fact, options, path)
            continue
        traces.append(make(model, fact.prompt, fact.subject, occurrence=0, progress=False))
        if path is not None:
            traces[-1].save(path)
    return traces


def _check_same(
    trace: CausalTrace | SeveredTrace,
    model: Any,
    fact: KnownFact,
    options: dict[str, Any],
    path: Path,
) -> None:
    """A trace that was kept is of this fact, with these options, on a model that answers alike."""
    has = {**vars(trace), **trace.info, "n_samples": len(trace.corrupted_samples)}
    wanted = {**options, "prompt": fact.prompt, "subject": fact.subject}
    other = [name for name, value in wanted.items() if has.get(name) != value]
    ((_, p),) = top_tokens(model, fact.prompt, 1)
    if abs(p - trace.p_clean) > 1e-3:
        other.append("model")
    if other:
        raise ValueError(f"{path} was made with another {', '.join(other)}; give another folder")
