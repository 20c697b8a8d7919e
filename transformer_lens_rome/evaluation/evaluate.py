"""Edit, score, undo (Meng et al. 2022, section 3.4).

Records are independent, unless `together` writes many facts by one edit. The edit of a record is
made on the unedited model, and all its prompts are scored before and after with both targets.
Several records may share passes, in which each edit acts on the prompts of its own record only.
Weights that were written are restored byte by byte. The raw log-probabilities are saved, so every
metric can be computed again without a run.

Choices that the paper and the released code leave open:

- Probabilities are geometric means over target tokens, as in the released code.
- Prompt and target are separated by character offsets in the tokens of the whole text.
- Attribute prompts are scored only with `attributes=True`.
- Intervals use the real number of records; S has a bootstrap interval.
- A record whose edit fails is saved with the reason and counted; averages leave it out.
- The unedited model is scored once, for all methods.
- Text is generated with a seed. A record without generation prompts is continued from its prompt
  and paraphrases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from transformer_lens_rome.evaluation.benchmarks import Record, get_benchmark
from transformer_lens_rome.evaluation.counterfact import CounterFactScoring
from transformer_lens_rome.evaluation.generation import References
from transformer_lens_rome.evaluation.records import CounterFactRecord
from transformer_lens_rome.evaluation.results import Results
from transformer_lens_rome.evaluation.reversal import ReversalRecord, ReversalScoring
from transformer_lens_rome.evaluation.run import Run
from transformer_lens_rome.evaluation.zsre import ZsreRecord, ZsreScoring
from transformer_lens_rome.methods.base import EditMethod
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model


@model_call
def evaluate_benchmark(
    model: Model,
    benchmark: str,
    records: Sequence[Record],
    method: str | EditMethod | None,
    *,
    options: Mapping[str, Any] | None = None,
    out: Any = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    workers: int = 1,
    ray_address: str | None = None,
    progress: bool = True,
    batch_size: int | None = None,
    together: int | None = None,
) -> Results:
    """Score a method on a registered benchmark; the model is left as it was.

    Args:
        model: A HookedTransformer or TransformerBridge without edits on it.
        benchmark: The benchmark's name, see `benchmark_names`.
        records: From the benchmark's loader, `get_benchmark(name).load`.
        method: A method or its registered name. None: the unedited model.
        options: The options of the benchmark's scoring, by name.
        out: As in `evaluate_counterfact`; so are the other arguments.
        seed: The seed of the method's draws.
        prepend_bos: Overrides the checkpoint's BOS rule, for scoring.
        workers: The number of copies of the model that run in parallel.
        ray_address: The address of an existing Ray cluster.
        progress: Show a progress bar.
        batch_size: The number of records that are edited and scored together.
        together: The number of records whose facts are written by one edit.

    Raises:
        ValueError: No benchmark has this name, it has no such option, or as in
            `evaluate_counterfact`.
    """
    scoring = get_benchmark(benchmark).scoring
    given = dict(options or {})
    known_options = {name for name in signature(scoring).parameters if not name.startswith("_")}
    if unknown := sorted(set(given) - known_options):
        raise ValueError(f"the benchmark {benchmark!r} has no option {', '.join(unknown)}")
    known = (out, seed, prepend_bos, workers, ray_address, progress, batch_size, together)
    return Run(model, records, method, scoring(**given), *known).results()


@model_call
def evaluate_counterfact(
    model: Model,
    records: Sequence[CounterFactRecord],
    method: str | EditMethod | None,
    *,
    out: Any = None,
    seed: int = 0,
    generate: bool = False,
    references: References | None = None,
    attributes: bool = False,
    prepend_bos: bool | None = None,
    workers: int = 1,
    ray_address: str | None = None,
    progress: bool = True,
    batch_size: int | None = None,
    counterfact_plus: bool = False,
    together: int | None = None,
) -> Results:
    """Score a method on CounterFact; the model is left as it was.

    Args:
        model: A HookedTransformer or TransformerBridge without edits on it.
        records: From `CounterFact.load`.
        method: A method or its registered name. None: the unedited model.
        out: A file (`.jsonl`) to which each record's numbers are written as soon as they are known.
            A stopped run continues from it, with the same or more records. Scores of the unedited
            model are saved in the same folder, in `unedited.jsonl`, for all methods.
        seed: The seed of the method's draws and of generated text.
        generate: Also generate text, for GE (needs the `generation` extra).
        references: Reference texts, for RS; without them there is no RS.
        attributes: Also score the attribute prompts.
        prepend_bos: Overrides the checkpoint's BOS rule, for scoring.
        workers: The number of copies of the model that run in parallel, on Ray (the `distributed`
            extra).
        ray_address: The address of an existing Ray cluster. None: the cluster that this process is
            connected to, or else a cluster on this machine for this call.
        progress: Show a progress bar.
        batch_size: The number of records whose edits are searched together and whose prompts are
            scored in shared passes; their rows are written together. The rows are those of a run
            with 1, up to rounding. None: as many as fit into memory, up to 16 on a CPU and 64 on
            a GPU; 1 for a method that computes single edits.
        counterfact_plus: Also score the neighbours' prompts with the edited fact in front (NS+,
            NM+), and the KL of the next token after both (NKL, NKL+); see `metrics`.
        together: Write so many facts by one edit, and score each of their records with that edit on
            the model; the method needs `compute_many`, such as MEMIT. A stopped run continues with
            the same records only, from the batches that are not complete. None: each record has an
            edit of its own.

    Raises:
        ValueError: There are no records, the method was trained on some of them, there are edits
            on the model, `out` contains another run, or the method writes single facts only but
            `together` is given.
        ImportError: An extra is not installed.
        RuntimeError: A weight has changed after a record; the run stops there.
    """
    if references is not None and not generate:
        raise ValueError("references are for generated text; pass generate=True too")
    scoring = CounterFactScoring(attributes, generate, references, seed, counterfact_plus)
    options = (out, seed, prepend_bos, workers, ray_address, progress, batch_size, together)
    return Run(model, records, method, scoring, *options).results()


@model_call
def evaluate_zsre(
    model: Model,
    records: Sequence[ZsreRecord],
    method: str | EditMethod | None,
    *,
    out: Any = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    workers: int = 1,
    ray_address: str | None = None,
    progress: bool = True,
    batch_size: int | None = None,
    together: int | None = None,
) -> Results:
    """Score a method on zsRE with its metrics; the arguments are as in `evaluate_counterfact`."""
    options = (out, seed, prepend_bos, workers, ray_address, progress, batch_size, together)
    return Run(model, records, method, ZsreScoring(), *options).results()


@model_call
def evaluate_reversal(
    model: Model,
    records: Sequence[ReversalRecord],
    method: str | EditMethod | None,
    *,
    both: bool = False,
    out: Any = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    workers: int = 1,
    ray_address: str | None = None,
    progress: bool = True,
    batch_size: int | None = None,
    together: int | None = None,
) -> Results:
    """Score how much a fact s -> o* changes what the model says about o*; see `reversal`.

    With `both`, the reverse fact o* -> s is written as a second request: together with the first
    by a method that has `compute_many`, else after it. The other arguments are as in
    `evaluate_counterfact`.
    """
    options = (out, seed, prepend_bos, workers, ray_address, progress, batch_size, together)
    return Run(model, records, method, ReversalScoring(both), *options).results()
