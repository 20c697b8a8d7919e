"""MEMIT: write many facts at once into several MLPs (Meng et al. 2023, arXiv:2210.07229v2).

    z*  = z0 + delta for each fact, by gradient descent; z is the residual after the last layer
    for each layer, ascending, with m layers left, on the model with the layers below written:
        K = the keys of all facts; R = (z* - z) / m
        W_out  <-  W_out + (λ C + μ I + H + K Kᵀ)⁻¹ K Rᵀ        H = sum of k kᵀ over earlier batches

EMMET and AlphaEdit differ in the solve (`mass_solve`), NAS in z* (`mass_targets`); the history H is
a value (`mass_history`). Where paper, released programs and this package differ:

    what                     paper          released programs        here
    key of a fact            mean           1/2 bare, 1/2 others     the same
    residual z* - z          -              of the bare prompt       with the keys' prefixes
    prefixes                 sampled        five, not seeded         five, seeded, in the edit
    subject, target          -              string pieces            character offsets, no BOS
    logits of the search     the model's    without a soft cap       the model's
    C, solve                 -              float32 C, inverses      float64, Cholesky, Woodbury
    λ                        per model      1.5e4; 2e4 for GPT-2 XL  d_mlp
    H                        none (MEMIT)   AlphaEdit, ENCORE        if a history is given
    ε of EMMET               0              0.1, absolute            0, or relative
    null space of AlphaEdit  small values   below 0.02, in float32   half of the dimensions
    L2 of AlphaEdit          -              10                       tr(P C)
    ENCORE's stop            -              without the bare prompt, with it, steps in a row
                                            any steps
    a norm after the MLP     -              not considered           z is the value; one layer

`MemitConfig()` is the last column; `MemitConfig.released()` the one before it, except for texts,
tokens and the precision of C, which are always those of the last column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformer_lens_rome.edits.kinds import EditRequest, FactoredEdit
from transformer_lens_rome.edits.ledger import AppliedEdit, apply_edit
from transformer_lens_rome.methods.mass_config import MemitConfig
from transformer_lens_rome.methods.mass_history import History
from transformer_lens_rome.methods.mass_method import Memit
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.statistics.second_moment import SecondMoment

__all__ = ["Memit", "compute_memit_edit", "memit_edit"]

Request = EditRequest | Mapping[str, Any]


@model_call
def memit_edit(
    model: Model,
    requests: Sequence[Request],
    *,
    layers: Sequence[int] | None = None,
    second_moments: Mapping[int, SecondMoment] | None = None,
    prefixes: Sequence[str] | None = None,
    history: History | None = None,
    config: MemitConfig = MemitConfig(),
    seed: int = 0,
    batch_size: int | None = None,
    skip_failed: bool = False,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> AppliedEdit:
    """Write many facts at once into some MLPs of the model, in place.

    The arguments are those of `compute_memit_edit`. Use the result in a `with` statement, or call
    its `revert()`, to restore exactly the old weights.
    """
    edit = compute_memit_edit(
        model,
        requests,
        layers=layers,
        second_moments=second_moments,
        prefixes=prefixes,
        history=history,
        config=config,
        seed=seed,
        batch_size=batch_size,
        skip_failed=skip_failed,
        prepend_bos=prepend_bos,
        progress=progress,
    )
    return apply_edit(model, edit)


@model_call
def compute_memit_edit(
    model: Model,
    requests: Sequence[Request],
    *,
    layers: Sequence[int] | None = None,
    second_moments: Mapping[int, SecondMoment] | None = None,
    prefixes: Sequence[str] | None = None,
    history: History | None = None,
    config: MemitConfig = MemitConfig(),
    seed: int = 0,
    batch_size: int | None = None,
    skip_failed: bool = False,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> FactoredEdit:
    """Compute one edit that writes many facts at once; the model stays unchanged.

    Args:
        model: A HookedTransformer or TransformerBridge.
        requests: The facts, as in `rome_edit`; no two of them with the same text.
        layers: The blocks whose W_out changes, in ascending order, from 0. None: the published
            ones, or a guess from the model's shape.
        second_moments: C of each layer, from `collect_second_moment(model, texts, layers)`. None:
            a default source for each (`default_second_moment`).
        prefixes: Texts that are put before the prompts, "" (the bare prompt) first. A key is half
            that of the bare prompt, half the mean of the others. None: five are sampled.
        history: The keys of earlier batches, from `extended_history`, which this edit preserves.
        config: The constants.
        seed: The seed of the sampled prefixes.
        batch_size: The number of requests whose searches share passes. None: as many as fit into
            a quarter of the free memory, up to 64. A batch that does not fit is halved.
        skip_failed: Leave out requests that fail, instead of raising an error.
        prepend_bos: Overrides the checkpoint's BOS rule.
        progress: Show progress bars.

    Raises:
        ValueError: There are no requests, or two of them have the same text; there are more than
            d_mlp; requests fail (the message names them); or an option does not fit the model: a
            layer, C, the history.
        NotImplementedError: The model cannot be edited; or a norm follows the MLP, and there are
            several layers.
    """
    method = Memit(
        layers,
        second_moments,
        prefixes,
        history,
        config,
        skip_failed=skip_failed,
        prepend_bos=prepend_bos,
        progress=progress,
    )
    return method.compute_many(model, requests, seed=seed, batch_size=batch_size)
