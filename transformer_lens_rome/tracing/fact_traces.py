"""Trace many facts: select those that the model knows, and resume interrupted runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm.auto import tqdm

from transformer_lens_rome.files.cache import safe_name
from transformer_lens_rome.files.strict_json import stripped
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import top_tokens
from transformer_lens_rome.tracing.causal_trace import causal_trace, severed_trace
from transformer_lens_rome.tracing.corruption import subject_embedding_std
from transformer_lens_rome.tracing.estimated_trace import EstimatedTrace
from transformer_lens_rome.tracing.kinds import Kind, layers_at_once
from transformer_lens_rome.tracing.known_facts import KnownFact
from transformer_lens_rome.tracing.results import CausalTrace, Sever, SeveredTrace

logger = logging.getLogger(__name__)
T = TypeVar("T", CausalTrace, EstimatedTrace, SeveredTrace)


@model_call
def facts_known_to(
    model: Model, facts: Iterable[KnownFact], *, limit: int | None = None, progress: bool = True
) -> tuple[list[KnownFact], int]:
    """Return the facts whose attribute is the model's top token, and the number of rejected ones.

    As in the released code, an attribute of several tokens counts as not known.

    Args:
        model: A HookedTransformer or TransformerBridge.
        facts: The facts, tested in this order.
        limit: Stop after this many known facts.
        progress: Show a progress bar.
    """
    encoder, wrong = Encoder.of(model), 0
    known: list[KnownFact] = []
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
    model: Model,
    facts: Sequence[KnownFact],
    *,
    kind: Kind = "resid",
    window: int = 10,
    noise_std: float | None = None,
    n_samples: int = 10,
    seed: int = 0,
    folder: Any = None,
    progress: bool = True,
    method: Literal["exact", "gradient"] = "exact",
    verify: int = 20,
    n_verified: int = 20,
) -> list[CausalTrace]:
    """Run `causal_trace` on each fact for the model's top token, with one noise level for all.

    Args:
        model: A HookedTransformer or TransformerBridge.
        facts: The facts to trace; see `facts_known_to`.
        kind: The states to restore, as for `causal_trace`.
        window: The number of layers restored at once, for a kind with a window (all but "resid").
        noise_std: None: 3 times `subject_embedding_std` of these facts' subjects. The paper takes
            all known facts; pass the value if you trace them in parts.
        n_samples: The number of noise samples.
        seed: The seed of the noise.
        folder: Save each trace in this folder as soon as it is made. A second call with the same
            folder reads the saved traces and makes the missing ones.
        progress: Show a progress bar.
        method: As for `causal_trace`; "gradient" gives estimated traces.
        verify: For "gradient", as for `causal_trace`.
        n_verified: For "gradient", the number of facts, from the first, whose cells are verified.

    Raises:
        ValueError: the folder contains traces that were made with other options.
    """
    shared = _shared(model, facts, noise_std, n_samples, seed)
    window = layers_at_once(kind, window)
    make = partial(causal_trace, kind=kind, window=window, method=method, **shared)
    options = {"kind": kind, "window": window, **shared}
    if method == "exact":
        return _each(model, facts, make, CausalTrace, options, folder, progress)
    options["method"] = method
    traces: list[CausalTrace] = []
    for some, n in ((facts[:n_verified], verify), (facts[n_verified:], 0)):
        made = partial(make, verify=n)
        traces += _each(model, some, made, EstimatedTrace, options, folder, progress)
    return traces


@model_call
def sever_facts(
    model: Model,
    facts: Sequence[KnownFact],
    *,
    sever: Sever = "mlp",
    noise_std: float | None = None,
    n_samples: int = 10,
    seed: int = 0,
    folder: Any = None,
    progress: bool = True,
) -> list[SeveredTrace]:
    """Run `severed_trace` on each fact; the arguments are those of `trace_facts`."""
    shared = _shared(model, facts, noise_std, n_samples, seed)
    make = partial(severed_trace, sever=sever, **shared)
    return _each(model, facts, make, SeveredTrace, {"sever": sever, **shared}, folder, progress)


def _shared(
    model: Model, facts: Sequence[KnownFact], noise_std: float | None, n_samples: int, seed: int
) -> dict[str, Any]:
    """Return the options of all facts; the default noise is 3 sigma of their subjects."""
    if noise_std is None and facts:
        noise_std = 3 * subject_embedding_std(model, [fact.subject for fact in facts])
        logger.info("noise of standard deviation %.4g: 3 sigma of all subjects", noise_std)
    return {"noise_std": noise_std, "n_samples": n_samples, "seed": seed}


def _each(
    model: Model,
    facts: Sequence[KnownFact],
    make: Callable[..., T],
    result: type[T],
    options: dict[str, Any],
    folder: Any,
    progress: bool,
) -> list[T]:
    """Make or read the trace of each fact, at the first occurrence of its subject, as released."""
    traces: list[T] = []
    label = f"tracing {options.get('kind') or options['sever'] + ' severed'}"
    for fact in tqdm(facts, desc=label, disable=not progress):
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
    model: Model,
    fact: KnownFact,
    options: dict[str, Any],
    path: Path,
) -> None:
    """Raise ValueError if a saved trace has another fact, other options or another model."""
    has = {**vars(trace), **trace.info, "n_samples": len(trace.corrupted_samples)}
    wanted = {**options, "prompt": fact.prompt, "subject": fact.subject}
    differing = [name for name, value in wanted.items() if has.get(name) != value]
    ((_, p),) = top_tokens(model, fact.prompt, 1)
    if abs(p - trace.p_clean) > 1e-3:
        differing.append("model")
    if differing:
        names = ", ".join(differing)
        raise ValueError(f"{path} was made with another {names}; give another folder")
