"""Corrupt the subject of a question: with noise, or by another subject."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.changes import Noise
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing.corruption import (
    Gaussian,
    NoiseSource,
    Uniform,
    subject_embedding_std,
)
from transformer_lens_rome.tracing.question import Question
from transformer_lens_rome.tracing.runs import CleanRun, CorruptedRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corruption:
    """How the subject is corrupted; the fields are arguments of `causal_trace`."""

    noise: Float[Tensor, "n_samples n_subject_tokens d_model"] | NoiseSource | None = None
    noise_std: float | None = None
    replace: bool = False
    other_subject: str | None = None
    n_samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise is not None and self.noise_std is not None:
            raise ValueError("give noise= or noise_std=, not both")
        if self.n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {self.n_samples}")
        noisy = self.noise is not None or self.noise_std is not None or self.replace
        if self.other_subject is not None and noisy:
            raise ValueError("other_subject= replaces the noise; give no noise with it")

    def source(self, model: Model, subject: str, encoder: Encoder) -> Tensor | NoiseSource:
        """Return the noise or its source: by default, 3 sigma of the subject's tokens."""
        if self.noise is not None:
            return self.noise
        std = self.noise_std
        if std is None:
            std = 3 * subject_embedding_std(model, [subject], encoder=encoder)
            logger.info("noise of standard deviation %.4g: 3 sigma of this subject's tokens", std)
        return Gaussian(std)


def corrupted_run(
    model: Model, question: Question, corruption: Corruption, prepend_bos: bool | None
) -> tuple[CorruptedRun, dict[str, Any]]:
    """Return the corrupted run, which holds the clean one, and the options that reproduce both."""
    encoder = Encoder.of(model, prepend_bos)
    clean, noise = question.clean_run(model, encoder), None
    if corruption.other_subject is not None:
        run = _with_other_subject(clean, encoder, question, corruption.other_subject)
    else:
        noise = corruption.source(model, question.subject, encoder)
        run = _noisy(clean, noise, corruption)
    return run, {
        "model": adapter.model_name(model),
        "prompt": question.prompt,
        "subject": question.subject,
        "other_subject": corruption.other_subject,
        "occurrence": question.occurrence,
        "noise": _named(noise),
        "noise_std": noise.std if isinstance(noise, Gaussian) else None,
        "replace": corruption.replace,
        "seed": corruption.seed,
        "foil": question.foil,
        "prepend_bos": encoder.prepends_bos,
    }


def _named(noise: Tensor | NoiseSource | None) -> str | None:
    """Return the noise as text for `info`: in full if it is one number, else its type's name."""
    if noise is None:
        return None
    if isinstance(noise, (Gaussian, Uniform)):
        return repr(noise)
    return type(noise).__name__


def _noisy(clean: CleanRun, noise: Tensor | NoiseSource, corruption: Corruption) -> CorruptedRun:
    """Return one row per sample, with noise at the positions of the subject."""
    n_tokens, d_model = len(clean.subject), clean.model.cfg.d_model
    if not isinstance(noise, Tensor):
        generator = torch.Generator().manual_seed(corruption.seed)
        noise = noise(corruption.n_samples, n_tokens, d_model, generator)
    if noise.ndim != 3 or noise.shape[1:] != (n_tokens, d_model) or not len(noise):
        raise ValueError(
            f"noise must have the shape [n_samples, {n_tokens} subject tokens, {d_model}], got "
            f"{list(noise.shape)}"
        )
    if not torch.isfinite(noise).all():
        raise ValueError("the noise contains NaN or infinity")
    rows = torch.arange(len(noise)).repeat_interleave(n_tokens)
    positions = torch.tensor(clean.subject).repeat(len(noise))
    values = Noise(rows, positions, noise.float().flatten(0, 1), corruption.replace)
    return CorruptedRun(clean, [clean.ids] * len(noise), values)


def _with_other_subject(
    clean: CleanRun, encoder: Encoder, question: Question, other: str
) -> CorruptedRun:
    """Return one row, in which another subject replaces this one."""
    (start, end), prompt = question.span(), question.prompt
    text = prompt[:start] + other.strip() + prompt[end:]
    row = encoder.row(text, (start, start + len(other.strip())))
    if row.subject != clean.subject or len(row.ids) != clean.n_prompt:
        raise ValueError(
            f"the other subject {other!r} has tokens {list(row.subject)}, the subject has "
            f"{list(clean.subject)}: choose one of equal length"
        )
    return CorruptedRun(clean, [(*row.ids, *clean.ids[clean.n_prompt :])], None)
