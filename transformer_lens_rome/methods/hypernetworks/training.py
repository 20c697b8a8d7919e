"""The training loop of KE and MEND (Mitchell et al. 2022, section 3.3).

    L = c_edit * NLL(target | edited model) + c_loc * KL(model || edited model) on other text

Each step uses one edit and one other text. Gradients of ten steps are averaged and clipped before
Adam uses them. At each validation the state is written to a file, from which a stopped run resumes
with the same result; the best network so far is stored in a second file.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from transformer_lens_rome.methods.hypernetworks.hypernetwork import (
    MatrixName,
    Outcome,
    Text,
    gradient_factors,
    outcome,
)
from transformer_lens_rome.methods.hypernetworks.training_data import Corpus, Item
from transformer_lens_rome.methods.hypernetworks.training_state import State
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.protocol import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """Settings of a training run; the defaults are the published ones.

    Attributes:
        lr: Adam's learning rate.
        alpha_lr: Adam's learning rate for MEND's step sizes alpha; None: `lr`, as in the released
            code.
        n_labels: Number of last tokens of a text that are its target; None: a request's whole
            target.
        c_edit, c_loc: Weights of the two losses.
        accumulate: Number of steps for each update.
        clip: Largest norm of an update's gradient.
        max_steps: Largest number of steps; training ends at the last validation within it.
        validate_every: Steps between validations, a multiple of `accumulate`.
        n_validation: Largest number of edits in a validation.
        patience: Stop after this number of steps without a better validation.
        crop: Score the edited model on the text without some of its first tokens.
        locality_tokens: Length to which other texts are cut, in tokens.
        n_locality: Number of other texts for each validation edit; a training step has one.
        layers: Blocks to edit; None: the last three.
        matrices: Names of the matrices to edit; None: all matrices of the MLP.
        seed: Seed of the network's initial weights and of all other draws.
    """

    lr: float
    alpha_lr: float | None = None
    n_labels: int | None = None
    c_edit: float = 0.1
    c_loc: float = 1.0
    accumulate: int = 10
    clip: float = 100.0
    max_steps: int = 1_000_000
    validate_every: int = 5_000
    n_validation: int = 500
    patience: int = 20_000
    crop: bool = True
    locality_tokens: int = 200
    n_locality: int = 4
    layers: tuple[int, ...] | None = None
    matrices: tuple[MatrixName, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("lr", "accumulate", "max_steps", "validate_every", "n_validation", "n_locality")
        if low := [name for name in positive if getattr(self, name) <= 0]:
            raise ValueError(f"{', '.join(low)} must be positive")
        if self.validate_every % self.accumulate:
            raise ValueError(
                f"validate_every ({self.validate_every}) must be a multiple of accumulate "
                f"({self.accumulate})"
            )
        if self.max_steps < self.validate_every:
            raise ValueError(
                f"max_steps ({self.max_steps}) is less than validate_every ({self.validate_every}),"
                " and only validated networks are kept; increase max_steps"
            )

    def released(self) -> Training:
        """Return the released code's settings, in which alpha's learning rate has no effect."""
        return replace(self, alpha_lr=None)


def train(
    model: Model,
    matrices: Sequence[Weight],
    state: State,
    settings: Training,
    corpora: tuple[Corpus, Corpus],
    *,
    saved: Callable[[State], None],
    progress: bool,
) -> None:
    """Train until the validation loss stops improving (`patience`), or for `max_steps`.

    Args:
        model: The model to be edited; it stays unchanged.
        matrices: The matrices to edit.
        state: A new run, or one to resume.
        settings: See `Training`.
        corpora: For training and for validation.
        saved: Called after each validation.
        progress: Show progress bars.
    """
    train_on, validate_on = corpora
    last = settings.max_steps - settings.max_steps % settings.validate_every
    with tqdm(total=last, initial=state.step, disable=not progress) as bar:
        while True:
            if state.step % settings.validate_every == 0 and not _validated(state):
                start = time.perf_counter()
                entry = validate(model, matrices, state, settings, validate_on, progress)
                state.curve.append({"step": state.step, **entry})
                if state.best_step == state.step:
                    state.best = {k: v.clone() for k, v in state.network.state_dict().items()}
                state.seconds += time.perf_counter() - start
                bar.set_description(f"validation {entry['loss']:.3f}")
                saved(state)
            if state.step >= last:
                break
            if state.step - state.best_step >= settings.patience:
                logger.info("no better validation for %d steps", settings.patience)
                break
            start = time.perf_counter()
            _step(model, matrices, state, settings, train_on)
            state.seconds += time.perf_counter() - start
            bar.update()


def _validated(state: State) -> bool:
    """Return whether the current step has been validated already."""
    return bool(state.curve) and state.curve[-1]["step"] == state.step


def _step(
    model: Model, matrices: Sequence[Weight], state: State, settings: Training, corpus: Corpus
) -> None:
    """Add the gradient of one edit; update the network every `accumulate` steps."""
    state.network.train()
    item = corpus.item(_generator(settings.seed, 0, state.step), 1)
    result, _ = _edit_and_score(model, matrices, state.network, item)
    loss = settings.c_edit * result.edit + settings.c_loc * result.locality
    parameters = [p for group in state.adam.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if all(g is None or torch.isfinite(g).all() for g in gradients):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                share = gradient / settings.accumulate
                parameter.grad = share if parameter.grad is None else parameter.grad + share
    else:
        logger.warning("step %d gives gradients that are not finite; they are left out", state.step)
    state.step += 1
    if state.step % settings.accumulate == 0:
        nn.utils.clip_grad_norm_(parameters, settings.clip, error_if_nonfinite=True)
        state.adam.step()
        state.adam.zero_grad()


def _edit_and_score(
    model: Model, matrices: Sequence[Weight], network: nn.Module, item: Item
) -> tuple[Outcome, float]:
    """Return the effect of the network's edit, and the loss before the edit."""
    before, factors = gradient_factors(model, item.inner, matrices)
    changes = network(factors, Text.of(model, item.inner))
    return outcome(model, changes, item.outer, item.others), before


@torch.no_grad()
def validate(
    model: Model,
    matrices: Sequence[Weight],
    state: State,
    settings: Training,
    corpus: Corpus,
    progress: bool,
) -> dict[str, float]:
    """Return means over validation edits: `before`, `edit`, `locality`, in nats, and the `loss`.

    `before` is the loss without the edit, and `loss` the weighted sum of `edit` and `locality`.
    """
    state.network.eval()
    n = min(settings.n_validation, len(corpus.samples))
    rows = []
    for i in tqdm(range(n), desc="validation", disable=not progress, leave=False):
        item = corpus.item(_generator(settings.seed, 1, i), settings.n_locality, sample=i)
        result, before = _edit_and_score(model, matrices, state.network, item)
        rows.append((before, result.edit.item(), result.locality.item()))
    before, edit, locality = (math.fsum(column) / n for column in zip(*rows, strict=True))
    loss = settings.c_edit * edit + settings.c_loc * locality
    return {"before": before, "edit": edit, "locality": locality, "loss": loss}


def _generator(seed: int, purpose: int, index: int) -> torch.Generator:
    """Construct the generator of one draw; a run can thus resume at any step."""
    return torch.Generator().manual_seed((seed * 2 + purpose) * 1_000_000_007 + index)


def run_info(settings: Training) -> dict[str, Any]:
    """Return the settings that identify a run: all except `max_steps` and `patience`."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
    return {k: v for k, v in plain.items() if k not in ("max_steps", "patience")}
