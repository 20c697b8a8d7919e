"""Write many facts layer by layer: each is solved on the model with those below it written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.health import FactHealth
from transformer_lens_rome.edits.kinds import EditRequest, FactoredEdit, Factors
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.methods.mass_health import fact_healths
from transformer_lens_rome.methods.mass_history import fact_rows, mean_over
from transformer_lens_rome.methods.mass_solve import Solved, check_room
from transformer_lens_rome.methods.mass_targets import Target, key_weights, read_at_subject
from transformer_lens_rome.model.adapter import Point, Weight
from transformer_lens_rome.model.keys import check_value
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import score_rows

logger = logging.getLogger(__name__)


def check_size(weight: Float[Tensor, "d_mlp d_model"], n: int) -> None:
    """Check that so many facts fit into one edit; log if their factors exceed the matrix."""
    m, d = weight.shape
    check_room(m, n)
    if n * (m + d) > m * d:
        logger.warning(
            "%d facts have larger factors than the matrix itself, of which the limit is %d",
            n,
            m * d // (m + d),
        )


def check_distinct(requests: Sequence[EditRequest]) -> None:
    """Raise ValueError if there are no requests, or if two of them write after the same text."""
    if not requests:
        raise ValueError("the list of requests is empty; give at least one EditRequest")
    seen: dict[str, int] = {}
    for i, request in enumerate(requests):
        if (j := seen.setdefault(request.text, i)) != i:
            other = requests[j].target_new
            if request.target_new == other:
                raise ValueError(f"requests {j} and {i} are the same, {request}; leave one out")
            raise ValueError(
                f"requests {j} and {i} contradict each other: {request.text!r:.200} should "
                f"continue with {other!r:.80} and with {request.target_new!r:.80}; leave one out"
            )


class Written(NamedTuple):
    """The result of writing all layers.

    Attributes:
        factors: The factors of the change of each W_out, in float32.
        keys: K of each layer, `[d_mlp, n]`.
        facts: The measurements of each fact.
    """

    factors: dict[Weight, Factors]
    keys: dict[int, Float[Tensor, "d_mlp n"]]
    facts: list[FactHealth]


def write_layers(
    model: Model,
    encoder: Encoder,
    requests: Sequence[EditRequest],
    targets: Sequence[Target],
    *,
    prefixes: Sequence[str],
    point: Point,
    hashes: Mapping[Weight, str],
    weights: Float[Tensor, "prefix"],
    solve: Callable[[int, Float[Tensor, "d_mlp n"]], Solved],
) -> Written:
    """Solve the layers in ascending order; the model stays unchanged.

    Args:
        model: The model.
        encoder: Encodes the texts.
        requests: The facts.
        targets: The result of the search for each.
        prefixes: The texts before the prompt.
        point: The point of z.
        hashes: sha256 of the W_out of each layer, in ascending order.
        weights: The weights of the prefixes in the mean of z.
        solve: The solve of a layer, from its keys.
    """
    flat = [row for rows in fact_rows(encoder, requests, prefixes) for row in rows]
    bare = [encoder.templated_row(one.prompt, one.subject, "", one.target_new) for one in requests]
    z_star = torch.stack([target.start + target.delta for target in targets])
    written, s, norms, before = Written({}, {}, []), [], [], score_rows(model, bare)
    with ExitStack() as stack:
        for i, (where, digest) in enumerate(hashes.items()):
            points = [Point("key", where.layer), Point("value", where.layer), point]
            key, value, z = read_at_subject(model, flat, points)
            check_value(model, where.layer, key, value)
            K, missing = (
                mean_over(key_weights(len(prefixes)), key).T,
                z_star - mean_over(weights, z),
            )
            solved = solve(where.layer, K)
            right = missing / (len(hashes) - i)  # Rᵀ: each layer takes its share
            factors = solved.left.float().cpu(), right.cpu()
            one = FactoredEdit.of({where: factors}, {where: digest}, request=requests[0])
            stack.enter_context(applied(model, one))
            written.factors[where], written.keys[where.layer] = factors, K
            s.append(solved.s.cpu())
            norms.append(missing.norm(dim=1).cpu())
        (z,) = read_at_subject(model, flat, [point])
        norms.append((z_star - mean_over(weights, z)).norm(dim=1).cpu())
        scores = before, score_rows(model, bare)
    facts = fact_healths(encoder, bare, targets, scores, torch.stack(s), torch.stack(norms))
    return written._replace(facts=facts)
