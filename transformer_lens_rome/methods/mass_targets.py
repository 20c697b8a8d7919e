"""z*: for each fact, the vector at the subject with which the model predicts the target.

MEMIT searches it as ROME searches v* (`v_star`), but adds delta to the residual after the last
edited block: z* = z0 + delta. Each search uses the model before any weight changes. NAS scales what
the MLP adds at the subject, v0 + delta, to one norm for all facts. ENCORE stops a search once the
target is on top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.methods.batches import Shape, in_batches
from transformer_lens_rome.methods.mass_config import MemitConfig
from transformer_lens_rome.methods.v_star import Batch, Search, optimise, passes_of
from transformer_lens_rome.model import passes, refusals
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.default_layer import norm_follows_mlp
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.vocabulary import Losses
from transformer_lens_rome.prompts.encoder import Encoder, Row, pad

Site = Literal["value", "resid_post"]
"""The point at which delta is added; the value if a norm follows the MLP."""


class Target(NamedTuple):
    """The result of the search for one fact.

    Attributes:
        start: z0, the weighted mean over prefixes of the activation before any change.
        delta: What the fact adds to it; z* = start + delta.
        added: What the MLP adds at the subject, v0, in the same mean.
        losses: The objective at every step, before that step's update.
        clamp_hits: Number of steps after which delta was scaled down to the allowed norm.
    """

    start: Float[Tensor, "d_model"]
    delta: Float[Tensor, "d_model"]
    added: Float[Tensor, "d_model"]
    losses: tuple[float, ...]
    clamp_hits: int


def key_weights(n_prefixes: int) -> Float[Tensor, "prefix"]:
    """Return the weights of the mean over prefixes: half for the bare prompt, half for the others.

    The published programs average inside two groups of templates, then over the groups.
    """
    if n_prefixes == 1:
        return torch.ones(1)
    return torch.tensor([0.5] + [0.5 / (n_prefixes - 1)] * (n_prefixes - 1))


def residual_weights(n_prefixes: int, config: MemitConfig) -> Float[Tensor, "prefix"]:
    """Return the weights for z0, v0 and residuals: of keys, or as released the bare prompt."""
    if config.variant == "released":
        return torch.eye(n_prefixes)[0]
    return key_weights(n_prefixes)


class TargetSearch(Search):
    """A search that can require the target on top at several steps, ENCORE's early stop."""

    config: MemitConfig

    def _is_on_top(self) -> bool:
        """Return whether the target was on top often enough."""
        wanted = self.config.top_steps
        if self.config.variant == "released":  # counted over all steps, without the first prefix
            return sum(self._all_top) >= wanted
        return len(self._all_top) >= wanted and all(self._all_top[-wanted:])

    def _top(self, found: Losses) -> bool:
        """Return whether the target is on top after the counted prefixes."""
        if self.config.variant == "released":
            counted = self.batch.where[:-1].to(found.is_top.device) > 0
            return bool(found.is_top[counted].all())
        return super()._top(found)


def search_targets(
    model: Model,
    encoder: Encoder,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    point: Point,
    config: MemitConfig,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[Target | Exception]:
    """Search z* of every request on the model as it is, or return why there is none.

    Args:
        model: The model.
        encoder: Encodes the texts.
        requests: The facts.
        prefixes: The texts before the prompt; the first one is empty.
        point: The point to which delta is added.
        config: The constants.
        batch_size: The number of requests whose searches share passes. None: as memory allows.
        progress: Show a progress bar.
    """

    def group(request: EditRequest) -> Batch:
        parts = request.prompt, request.subject
        rows = [encoder.templated_row(*parts, text, request.target_new) for text in prefixes]
        return Batch.of(rows, encoder.templated_row("{} is a", request.subject))

    def shape(request: EditRequest) -> Shape:
        one = group(request)
        pairs = [(len(ids), len(ids) - int(at)) for ids, at in zip(one.rows, one.lookup)]
        return Shape(len(one.rows), max(pairs)[0], max(tail for _, tail in pairs))

    def search(some: Sequence[EditRequest]) -> list[Target | Exception]:
        groups = [group(request) for request in some]
        return _searched(model, groups, point, config, progress)

    return in_batches(model, requests, shape, search, batch_size=batch_size)


def _searched(
    model: Model, groups: Sequence[Batch], point: Point, config: MemitConfig, progress: bool
) -> list[Target | Exception]:
    """Search the targets of some requests, whose rows share passes."""
    site: Site = "value" if point.name == "value" else "resid_post"
    forwards = passes_of(model, point.layer, [[one] for one in groups])
    added_at = Point("value" if site == "value" else "mlp_out", point.layer)
    read = forwards[0].read([added_at, point])
    if site == "value":
        read = [read[0], read[0]]
    weights = residual_weights(groups[0].n_prefixes, config)
    sizes = [len(one.rows) for one in groups]
    each = [
        tuple(weights.to(part.device) @ part[: len(weights)].float() for part in parts)
        for parts in zip(*(activation.split(sizes) for activation in read), strict=True)
    ]
    searches = [
        TargetSearch([one], start, config, site)
        for one, (_, start) in zip(groups, each, strict=True)
    ]
    optimise(forwards, point.layer, searches, progress=progress)
    results: list[Target | Exception] = []
    for (added, start), search in zip(each, searches, strict=True):
        try:
            delta, losses, clamp_hits = search.found
        except ValueError as error:
            results.append(error)
            continue
        if config.anchor is not None:
            delta = anchored(added, delta, config.anchor)
        results.append(Target(start, delta, added, losses, clamp_hits))
    return results


def anchored(
    added: Float[Tensor, "d_model"], delta: Float[Tensor, "d_model"], anchor: float
) -> Float[Tensor, "d_model"]:
    """Return delta with v = v0 + delta scaled to the norm of NAS; v is v0 if it is far too long.

    Such a fact is not written, but its key stays in the solve, which so preserves its old value.
    """
    v = added + delta
    norm = v.norm()
    return v * (anchor / (norm + 1e-10)) - added if norm <= 2 * anchor else torch.zeros_like(delta)


@model_call
def mean_value_norm(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    *,
    config: MemitConfig = MemitConfig(),
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> float:
    """Return an anchor for NAS: the mean norm of v0 + delta, without the largest twentieth.

    Args:
        model: The model, without edits.
        requests: Facts that are searched on their bare prompts; NAS's program takes 1,000.
        layer: The last of the edited layers.
        config: The constants of the search.
        prepend_bos: Overrides the checkpoint's BOS rule.
        progress: Show progress bars.

    Raises:
        ValueError: No search gives a target.
    """
    encoder = Encoder.of(model, prepend_bos)
    refusals.check_editable(model, [layer])
    point = Point("value" if norm_follows_mlp(model, layer) else "resid_post", layer)
    plain = dataclasses.replace(config, anchor=None)
    each = search_targets(model, encoder, requests, [""], point, plain, progress=progress)
    norms = sorted((t.added + t.delta).norm().item() for t in each if isinstance(t, Target))
    if not norms:
        raise ValueError(f"none of the {len(each)} requests gives a target; pass others")
    return fmean(norms[: len(norms) - len(norms) // 20])


def read_at_subject(
    model: Model, rows: Sequence[Row], points: Sequence[Point]
) -> list[Float[Tensor, "row d"]]:
    """Read activations at the last subject token of each row, without changes."""
    ids = [row.ids[: row.subject[-1] + 1] for row in rows]

    def shape(one: tuple[int, ...]) -> Shape:
        return Shape(1, len(one), len(one))

    def read(some: Sequence[tuple[int, ...]]) -> list[tuple[Tensor, ...]]:
        found = passes.read(model, pad([Row(one) for one in some]), points)
        each, last = torch.arange(len(some)), torch.tensor([len(one) - 1 for one in some])
        return list(zip(*(found[point][each, last] for point in points), strict=True))

    each = in_batches(model, ids, shape, read)
    for one in each:
        if isinstance(one, Exception):
            raise one
    return [torch.stack(list(some)) for some in zip(*each, strict=True)]
