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
"""

from __future__ import annotations

import logging
import unicodedata
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.files.strict_json import check_edges
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.changes import Noise
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing.corruption import (
    Gaussian,
    NoiseSource,
    Uniform,
    subject_embedding_std,
)
from transformer_lens_rome.tracing.results import CausalTrace, Kind, Metric, Sever, SeveredTrace
from transformer_lens_rome.tracing.runs import CleanRun, CorruptedRun, restore_each, sever_each

logger = logging.getLogger(__name__)


@model_call
def causal_trace(
    model: Any,
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
) -> CausalTrace:
    """Restore each state of a corrupted run in turn; the model is not changed.

    Args:
        model: A HookedTransformer or TransformerBridge.
        prompt: The text before the answer.
        subject: The part of the prompt to corrupt.
        answer: The continuation to score, of any number of tokens. None: the model's top token.
        kind: The states to restore; see the table in the module docstring.
        window: The number of layers restored at once, for "mlp" and "attn".
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

    Raises:
        ValueError: the subject is not in the prompt or occurs twice, the answer has no token, or
            noise, window or metric do not fit; the message says what to do.
    """
    if kind not in ("resid", "mlp", "attn"):
        raise ValueError(f"kind must be 'resid', 'mlp' or 'attn', got {kind!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1 layer, got {window}")
    noise = _source(noise, noise_std)
    corrupted, info = _corrupted_run(
        model,
        prompt,
        subject,
        answer=answer,
        noise=noise,
        replace=replace,
        other_subject=other_subject,
        n_samples=n_samples,
        seed=seed,
        metric=metric,
        foil=foil,
        occurrence=occurrence,
        prepend_bos=prepend_bos,
    )
    run, window = corrupted.clean, 1 if kind == "resid" else window
    samples, base = restore_each(corrupted, kind, window, batch_size, progress)
    return CausalTrace(
        samples=samples,
        corrupted_samples=base,
        p_clean=run.p_clean,
        tokens=run.tokens,
        subject_positions=run.subject,
        answer=run.answer,
        kind=kind,
        window=window,
        metric=metric,
        info=info,
    )


@model_call
def severed_trace(
    model: Any,
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
    corrupted, info = _corrupted_run(
        model,
        prompt,
        subject,
        answer=answer,
        noise=_source(noise, noise_std),
        n_samples=n_samples,
        seed=seed,
        occurrence=occurrence,
        prepend_bos=prepend_bos,
    )
    run = corrupted.clean
    ordinary, severed, base = sever_each(corrupted, sever, batch_size, progress)
    return SeveredTrace(ordinary, severed, base, run.p_clean, sever, run.answer, info)


def subject_span(prompt: str, subject: str, occurrence: int | None = None) -> tuple[int, int]:
    """Return where the subject starts and ends in the prompt, in characters (end exclusive).

    Raises:
        ValueError: the subject does not occur, or occurs several times and none was chosen.
    """
    check_edges(subject)
    subject = subject.strip()
    starts = [i for i in range(len(prompt)) if subject and prompt.startswith(subject, i)]
    if not starts:
        same = unicodedata.normalize("NFC", subject) in unicodedata.normalize("NFC", prompt)
        raise ValueError(
            f"the subject {subject!r} does not occur in the prompt {prompt!r}"
            + ("; their accents are written differently (NFC and NFD)" if same and subject else "")
        )
    if occurrence is None and len(starts) > 1:
        raise ValueError(
            f"the subject {subject!r} occurs {len(starts)} times in {prompt!r}; choose one with "
            f"occurrence=0 to {len(starts) - 1}"
        )
    if not 0 <= (occurrence or 0) < len(starts):
        raise ValueError(f"occurrence {occurrence} of {subject!r}: there are {len(starts)}")
    start = starts[occurrence or 0]
    return start, start + len(subject)


def _source(
    noise: Tensor | NoiseSource | None, noise_std: float | None
) -> Tensor | NoiseSource | None:
    """Return the requested noise, or None if none was requested."""
    if noise is not None and noise_std is not None:
        raise ValueError("give noise= or noise_std=, not both")
    return Gaussian(noise_std) if noise_std is not None else noise


def _corrupted_run(
    model: Any,
    prompt: str,
    subject: str,
    *,
    answer: str | None,
    noise: Tensor | NoiseSource | None,
    n_samples: int,
    seed: int,
    occurrence: int | None,
    prepend_bos: bool | None,
    replace: bool = False,
    other_subject: str | None = None,
    metric: Metric = "probability",
    foil: str | None = None,
) -> tuple[CorruptedRun, dict[str, Any]]:
    """Return the clean and corrupted runs of a trace, and the options that reproduce them."""
    _check_options(model, metric, foil, n_samples)
    encoder = Encoder.of(model, prepend_bos)
    span = subject_span(prompt, subject, occurrence)
    run = CleanRun.of(model, encoder, prompt, span, answer=answer, foil=foil, metric=metric)
    if other_subject is not None:
        if noise is not None or replace:
            raise ValueError("other_subject= replaces the noise; give no noise with it")
        corrupted = _with_other_subject(run, encoder, prompt, span, other_subject)
    else:
        noise = _default_noise(model, subject, encoder) if noise is None else noise
        corrupted = _noisy(run, noise, n_samples, seed, replace)
    return corrupted, {
        "model": adapter.model_name(model),
        "prompt": prompt,
        "subject": subject,
        "other_subject": other_subject,
        "occurrence": occurrence,
        "noise": _named(noise),
        "noise_std": noise.std if isinstance(noise, Gaussian) else None,
        "replace": replace,
        "seed": seed,
        "foil": foil,
        "prepend_bos": encoder.prepends_bos,
    }


def _named(noise: Tensor | NoiseSource | None) -> str | None:
    """Return the noise as text for `info`: in full if it is one number, else its type's name."""
    if noise is None:
        return None
    if isinstance(noise, (Gaussian, Uniform)):
        return repr(noise)
    return type(noise).__name__


def _check_options(model: Any, metric: str, foil: str | None, n_samples: int) -> None:
    if metric not in ("probability", "log_probability", "logit_diff"):
        raise ValueError(
            f"metric must be 'probability', 'log_probability' or 'logit_diff', got {metric!r}"
        )
    if (metric == "logit_diff") != (foil is not None):
        raise ValueError("foil= (the other answer) and metric='logit_diff' go together")
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")


def _default_noise(model: Any, subject: str, encoder: Encoder) -> Gaussian:
    std = 3 * subject_embedding_std(model, [subject], encoder=encoder)
    logger.info("noise of standard deviation %.4g: 3 sigma of this subject's tokens", std)
    return Gaussian(std)


def _noisy(
    run: CleanRun, noise: Tensor | NoiseSource, n_samples: int, seed: int, replace: bool
) -> CorruptedRun:
    """Return one row per sample, with noise at the positions of the subject."""
    n_tokens, d_model = len(run.subject), run.model.cfg.d_model
    if not isinstance(noise, Tensor):
        noise = noise(n_samples, n_tokens, d_model, torch.Generator().manual_seed(seed))
    if noise.ndim != 3 or noise.shape[1:] != (n_tokens, d_model) or not len(noise):
        raise ValueError(
            f"noise must have the shape [n_samples, {n_tokens} subject tokens, {d_model}], got "
            f"{list(noise.shape)}"
        )
    if not torch.isfinite(noise).all():
        raise ValueError("the noise contains NaN or infinity")
    rows = torch.arange(len(noise)).repeat_interleave(n_tokens)
    positions = torch.tensor(run.subject).repeat(len(noise))
    values = Noise(rows, positions, noise.float().flatten(0, 1), replace)
    return CorruptedRun(run, [run.ids] * len(noise), values)


def _with_other_subject(
    run: CleanRun, encoder: Encoder, prompt: str, span: tuple[int, int], other: str
) -> CorruptedRun:
    """Return one row, in which another subject replaces this one."""
    text = prompt[: span[0]] + other.strip() + prompt[span[1] :]
    row = encoder.row(text, (span[0], span[0] + len(other.strip())))
    if row.subject != run.subject or len(row.ids) != run.n_prompt:
        raise ValueError(
            f"the other subject {other!r} has tokens {list(row.subject)}, the subject has "
            f"{list(run.subject)}: choose one of equal length"
        )
    return CorruptedRun(run, [(*row.ids, *run.ids[run.n_prompt :])], None)
