"""ROME: write one fact into one MLP (Meng et al. 2022, arXiv:2202.05262v5, section 3).

    k* = mean over prefixes of the key at the last subject token                          (Eq. 3)
    v* = the value with which the model predicts the target, by gradient descent          (Eq. 4)
    W_out  <-  W_out + u Λᵀ,   u = C⁻¹ k*,   Λ = (v* - value(k*)) / (u · k*)               (Eq. 2)

Where paper, released code and this module differ:

    what                     paper            released code            here
    key in u                 mean             mean over prefixes       mean over prefixes
    key in Λ                 the same         bare prompt's            mean over prefixes
    v* starts at             -                bare prompt's value      mean value over prefixes
    norm for decay, clamp    -                bare prompt's value      mean value over prefixes
    clamp ||delta||          none             4 (3 for GPT-2 M)        the same; 0.75 behind a norm
    prefixes                 50 of 2-10       1 + 10 of 5 + 10 of 10   1 + 10 of 5 + 10 of 10
    weight decay, KL factor  1.5e-3, 1e2      0.5, 0.0625              0.5, 0.0625
    stop                     at loss 5e-2     at loss 5e-2             the same, or target on top
    prefixes a step          all              all                      7, in turn
    steps                    20               20 losses, 19 updates    20 losses, 19 updates

`RomeConfig()` is the last column, `RomeConfig.released()` the one before it. If u and Λ use one
key, the mean key gets the value v* exactly. r-ROME (arXiv:2403.07175) showed that some edits
destroy the model because the released code mixes two keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, overload

from transformer_lens_rome.edits.kinds import EditRequest, RankOneEdit
from transformer_lens_rome.edits.ledger import AppliedEdit, apply_edit
from transformer_lens_rome.methods.rome_config import RomeConfig
from transformer_lens_rome.methods.rome_method import Rome
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.statistics.second_moment import SecondMoment

__all__ = ["Rome", "compute_rome_edit", "compute_rome_edits", "rome_edit"]

Request = EditRequest | Mapping[str, Any]


@model_call
def rome_edit(
    model: Model,
    request: Request | Sequence[Request],
    *,
    layer: int | None = None,
    second_moment: SecondMoment | None = None,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig = RomeConfig(),
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> AppliedEdit:
    """Write a fact, or a list of facts in order, into one MLP of the model, in place.

    The arguments are those of `compute_rome_edit`. Use the result in a `with` statement, or call
    its `revert()`, to restore exactly the old weights.
    """
    method = Rome(layer, second_moment, prefixes, config, prepend_bos, progress)
    edits = method.in_order(model, _as_list(request), seed)
    with ExitStack() as undo_on_error:
        done = [undo_on_error.enter_context(apply_edit(model, edit)) for edit in edits]
        undo_on_error.pop_all()
    return AppliedEdit.of(model, done)


@overload
def compute_rome_edit(
    model: Model,
    request: Request,
    *,
    layer: int | None = ...,
    second_moment: SecondMoment | None = ...,
    prefixes: Sequence[str] | None = ...,
    config: RomeConfig = ...,
    seed: int = ...,
    prepend_bos: bool | None = ...,
    progress: bool = ...,
) -> RankOneEdit: ...


@overload
def compute_rome_edit(
    model: Model,
    request: Sequence[Request],
    *,
    layer: int | None = ...,
    second_moment: SecondMoment | None = ...,
    prefixes: Sequence[str] | None = ...,
    config: RomeConfig = ...,
    seed: int = ...,
    prepend_bos: bool | None = ...,
    progress: bool = ...,
) -> list[RankOneEdit]: ...


@model_call
def compute_rome_edit(
    model: Model,
    request: Request | Sequence[Request],
    *,
    layer: int | None = None,
    second_moment: SecondMoment | None = None,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig = RomeConfig(),
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> RankOneEdit | list[RankOneEdit]:
    """Compute the rank-one edit that writes a fact; the model stays unchanged.

    Args:
        model: A HookedTransformer or TransformerBridge.
        request: An `EditRequest`, a dict in the released ROME format, or a list of them. For a
            list, each edit is computed with the edits before it applied, and a list is returned.
        layer: The block to edit, from 0. None: the model's default layer.
        second_moment: C at that layer. None: from the cache, the authors' files or a streamed
            corpus, see `default_second_moment`.
        prefixes: Texts to put before the prompt, `""` for the bare prompt. None: sampled from the
            model, as in the paper.
        config: The constants.
        seed: Seed of the sampled prefixes; nothing else is random.
        prepend_bos: Whether to prepend BOS. None: as the checkpoint's tokenizer does.
        progress: Show progress bars.

    Raises:
        ValueError: a request, layer, prefixes or statistics that do not fit.
        NotImplementedError: a model that cannot be edited.
    """
    method = Rome(layer, second_moment, prefixes, config, prepend_bos, progress)
    edits = method.in_order(model, _as_list(request), seed)
    return edits[0] if isinstance(request, (EditRequest, Mapping)) else edits


@model_call
def compute_rome_edits(
    model: Model,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    layer: int | None = None,
    second_moment: SecondMoment | None = None,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig = RomeConfig(),
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> list[RankOneEdit]:
    """Compute independent edits, each on the model as it is now; the model stays unchanged.

    The searches of many requests share their passes. An edit equals that of `compute_rome_edit` for
    its request, up to rounding.

    Args:
        model: A HookedTransformer or TransformerBridge.
        requests: Requests, as in `compute_rome_edit`.
        batch_size: The largest number of requests whose searches share passes. None: as many as
            fit into a quarter of the free memory, up to 64. A batch that does not fit is halved.
            On a CPU, requests share passes only if their lengths are alike.
        layer: As in `compute_rome_edit`.
        second_moment: As in `compute_rome_edit`.
        prefixes: As in `compute_rome_edit`.
        config: As in `compute_rome_edit`.
        seed: As in `compute_rome_edit`.
        prepend_bos: As in `compute_rome_edit`.
        progress: As in `compute_rome_edit`.

    Raises:
        ValueError: as in `compute_rome_edit`; or some requests fail, which the message names, after
            the others have been tried.
        NotImplementedError: a model that cannot be edited.
    """
    method = Rome(layer, second_moment, prefixes, config, prepend_bos, progress)
    each = method.compute_each(model, _as_list(requests), seed=seed, batch_size=batch_size)
    failed = [(i, error) for i, error in enumerate(each) if isinstance(error, Exception)]
    if failed:
        reasons = "; ".join(f"request {i}: {error}" for i, error in failed[:5])
        raise ValueError(f"{len(failed)} of {len(each)} requests failed ({reasons:.1000})")
    return [edit for edit in each if isinstance(edit, RankOneEdit)]


def _as_list(request: Request | Sequence[Request]) -> list[EditRequest]:
    """Return the requests of a list, or a single request as a list."""
    if isinstance(request, (EditRequest, Mapping, str)) or not isinstance(request, Iterable):
        return [EditRequest.of(request)]
    return [EditRequest.of(one) for one in request]
