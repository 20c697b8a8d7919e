"""Causal tracing: locate where a model recalls a fact (Meng et al. 2022, section 2 and App. B).

Three runs on one prompt: clean; corrupted, with noise on the subject's embeddings; and corrupted
with some states restored to their clean values. Each cell restores one set of states:

    kind      restored in the cell (layer l, position t)
    resid     the residual after block l, at t
    mlp       the MLPs' outputs at t in layers l - window//2 .. l + ceil(window/2) - 1
    attn      the same for attention

The score of a cell is the mean over noise samples of the answer's probability, as released. All
cells use the same noise. A restored state affects only later tokens in later layers, and
`PartialForward` runs only those. Restoring a position before the first corrupted one changes
nothing, so its score is that of the corrupted run.

Noise affects a model in ways that another subject does not (Zhang & Nanda, arXiv:2309.16042).
`other_subject=` corrupts with another subject of the same number of tokens instead.

Embeddings are corrupted at `hook_embed`: before positions are added, and in BLOOM after its
embedding norm.

`method="gradient"` estimates all cells from a few passes (see `gradient`), and runs some of them
exactly to tell how good the estimate is. `gradient_traces` estimates several kinds at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing.corrupted_run import Corruption, corrupted_run
from transformer_lens_rome.tracing.corruption import NoiseSource
from transformer_lens_rome.tracing.estimated_trace import EstimatedTrace, check_cells
from transformer_lens_rome.tracing.gradient import estimate_each
from transformer_lens_rome.tracing.kinds import Kind, layers_at_once
from transformer_lens_rome.tracing.question import Question
from transformer_lens_rome.tracing.results import CausalTrace, Metric, Sever, SeveredTrace
from transformer_lens_rome.tracing.runs import CorruptedRun, restore_each, sever_each


@model_call
def causal_trace(
    model: Model,
    prompt: str,
    subject: str,
    *,
    answer: str | None = None,
    kind: Kind = "resid",
    window: int = 10,
    noise: Float[Tensor, "n_samples n_subject_tokens d_model"] | NoiseSource | None = None,
    noise_std: float | None = None,
    replace: bool = False,
    other_subject: str | None = None,
    n_samples: int = 10,
    seed: int = 0,
    metric: Metric = "probability",
    foil: str | None = None,
    occurrence: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 180,
    progress: bool = True,
    method: Literal["exact", "gradient"] = "exact",
    steps: int = 5,
    verify: int = 20,
) -> CausalTrace:
    """Restore each state of a corrupted run in turn; the model is not changed.

    Args:
        model: A HookedTransformer or TransformerBridge.
        prompt: The text before the answer.
        subject: The part of the prompt to corrupt.
        answer: The continuation to score, of any number of tokens. None: the model's top token.
        kind: The states to restore, a key of `KINDS`; see the table in the module docstring.
        window: The number of layers restored at once, for a kind with a window (all but "resid").
        noise: The noise added to the subject's embeddings, or a source of noise (see `corruption`).
            None: normal with standard deviation `noise_std`.
        noise_std: None: 3 times `subject_embedding_std` of this subject. The paper takes sigma over
            all known facts: `noise_std=3 * subject_embedding_std(model, subjects)`.
        replace: Replace the embeddings by the noise instead of adding it.
        other_subject: Corrupt with this subject's tokens instead of noise; one sample.
        n_samples: The number of noise samples.
        seed: The seed of the noise.
        metric: The score: "probability", "log_probability" or "logit_diff".
        foil: The other answer of "logit_diff"; the first tokens are compared.
        occurrence: Index of the subject's occurrence in the prompt, from 0, if it has several.
        prepend_bos: Overrides the checkpoint's rule.
        batch_size: The number of rows in a batch; it changes only the speed.
        progress: Show a progress bar.
        method: "exact" runs every cell. "gradient" estimates them, and returns an `EstimatedTrace`.
        steps: For "gradient": the number of passes with a gradient.
        verify: For "gradient": the number of cells with the largest estimates that are run exactly,
            and of other cells, drawn at random.

    Raises:
        ValueError: the subject is not in the prompt or occurs twice, the answer has no token, or
            noise, window, metric or method do not fit; the message says what to do.
    """
    window = layers_at_once(kind, window)
    if method not in ("exact", "gradient"):
        raise ValueError(f"method must be 'exact' or 'gradient', got {method!r}")
    question = Question(prompt, subject, answer, foil, metric, occurrence)
    corruption = Corruption(noise, noise_std, replace, other_subject, n_samples, seed)
    corrupted, info = corrupted_run(model, question, corruption, prepend_bos)
    if method == "gradient":
        how = steps, verify, batch_size
        return _estimated(corrupted, info, {kind: window}, *how)[kind]
    found, base = restore_each(corrupted, kind, window, batch_size, progress)
    ids, top = found.top.unique(return_inverse=True)
    tokens = tuple(Encoder.of(model).tokenizer.decode([i]) for i in ids.tolist())
    known = _trace(corrupted, info, kind, window, found.metric, base)
    return CausalTrace(**known, top=top, top_tokens=tokens)


@model_call
def gradient_traces(
    model: Model,
    prompt: str,
    subject: str,
    *,
    kinds: Sequence[Kind] = ("resid", "mlp", "attn"),
    window: int = 10,
    answer: str | None = None,
    noise: Float[Tensor, "n_samples n_subject_tokens d_model"] | NoiseSource | None = None,
    noise_std: float | None = None,
    n_samples: int = 10,
    seed: int = 0,
    metric: Metric = "probability",
    foil: str | None = None,
    occurrence: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 180,
    steps: int = 5,
    verify: int = 20,
) -> dict[str, EstimatedTrace]:
    """Estimate traces of several kinds from the same passes; the model is not changed.

    The arguments are those of `causal_trace`; `verify` cells of each kind are run exactly.
    """
    windows: dict[str, int] = {kind: layers_at_once(kind, window) for kind in kinds}
    question = Question(prompt, subject, answer, foil, metric, occurrence)
    corruption = Corruption(noise, noise_std, n_samples=n_samples, seed=seed)
    corrupted, info = corrupted_run(model, question, corruption, prepend_bos)
    return _estimated(corrupted, info, windows, steps, verify, batch_size)


def _estimated(
    corrupted: CorruptedRun,
    info: dict[str, Any],
    windows: dict[str, int],
    steps: int,
    verify: int,
    batch_size: int,
) -> dict[str, EstimatedTrace]:
    """Return the estimated trace of each kind."""
    if steps < 1 or verify < 0:
        raise ValueError(f"steps must be at least 1 and verify at least 0: {steps}, {verify}")
    info = {**info, "method": "gradient", "steps": steps}
    estimates, base = estimate_each(corrupted, windows, steps)
    traces = {}
    for kind, window in windows.items():
        how = verify, batch_size, info["seed"]
        checked = check_cells(corrupted, kind, window, estimates[kind], *how)
        trace = _trace(corrupted, info, kind, window, estimates[kind], base)
        traces[kind] = EstimatedTrace(**trace, **checked)
    return traces


def _trace(
    corrupted: CorruptedRun,
    info: dict[str, Any],
    kind: str,
    window: int,
    samples: Float[Tensor, "sample layer pos"],
    base: Float[Tensor, "sample"],
) -> dict[str, Any]:
    """Return the fields of a `CausalTrace`."""
    run = corrupted.clean
    return {
        "samples": samples,
        "corrupted_samples": base,
        "p_clean": run.p_clean(),
        "tokens": run.tokens,
        "subject_positions": run.subject,
        "answer": run.answer,
        "kind": kind,
        "window": window,
        "metric": run.metric,
        "info": info,
    }


@model_call
def severed_trace(
    model: Model,
    prompt: str,
    subject: str,
    *,
    sever: Sever = "mlp",
    answer: str | None = None,
    noise: Float[Tensor, "n_samples n_subject_tokens d_model"] | NoiseSource | None = None,
    noise_std: float | None = None,
    n_samples: int = 10,
    seed: int = 0,
    occurrence: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 180,
    progress: bool = True,
) -> SeveredTrace:
    """Restore the last subject token at each layer with a path cut (Meng et al. 2022, fig. 3).

    The state after block l is restored. At that token, the MLPs (or attention) of the layers above
    keep their outputs of the corrupted run. The difference from an ordinary trace is the effect of
    these modules on the restored state. The arguments are those of `causal_trace`.
    """
    if sever not in ("mlp", "attn"):
        raise ValueError(f"sever must be 'mlp' or 'attn', got {sever!r}")
    question = Question(prompt, subject, answer, occurrence=occurrence)
    corruption = Corruption(noise, noise_std, n_samples=n_samples, seed=seed)
    corrupted, info = corrupted_run(model, question, corruption, prepend_bos)
    run = corrupted.clean
    ordinary, severed, base = sever_each(corrupted, sever, batch_size, progress)
    return SeveredTrace(ordinary, severed, base, run.p_clean(), sever, run.answer, info)
