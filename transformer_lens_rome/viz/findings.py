"""The finding of a result in one sentence, made by rule.

The rule for a trace: of the cells whose 95% interval does not contain 0, the one with the largest
effect, at the subject and after it. The largest of many cells is large partly by chance, and its
interval does not account for that. A restored state at the last token gives back the answer in any
case, so a trace of states names the subject's best cell only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edit_report import EditReport
from transformer_lens_rome.evaluation.metrics import Estimate
from transformer_lens_rome.evaluation.results import Results, common_cases
from transformer_lens_rome.tracing.averages import AverageTrace
from transformer_lens_rome.tracing.estimated_trace import EstimatedTrace
from transformer_lens_rome.tracing.kinds import KINDS
from transformer_lens_rome.tracing.patching import window_of
from transformer_lens_rome.tracing.results import CausalTrace
from transformer_lens_rome.viz.words import layer_names, readable

_METRICS = {
    "probability": "P({})",
    "log_probability": "log P({})",
    "logit_diff": "logit difference of {}",
}
_Place = tuple[int, int]


@singledispatch
def finding(result: Any, *others: Any) -> str:
    """Return the finding of a result in one sentence, by rule.

    Args:
        result: A `CausalTrace`, `AverageTrace`, `EditReport` or `Results`.
        others: Other runs to compare, if the result is a `Results`.

    Raises:
        ValueError: There is no rule for such a thing.
    """
    raise ValueError(f"there is no rule for the finding of a {type(result).__name__}")


@finding.register
def _(trace: CausalTrace) -> str:
    begin, end = trace.subject_positions[0], trace.subject_positions[-1] + 1
    names = [f"{readable(token.strip())!r}" for token in trace.tokens]
    groups = ([*range(begin, end)], [*range(end, len(names))])
    said = _effects_said(trace, trace.indirect_effect.T, trace.half_width.T, names, groups)
    return said[0].upper() + said[1:]


@finding.register
def _(trace: EstimatedTrace) -> str:
    """Say what the estimate is worth, and name the best of the cells that were run exactly."""
    said = f"{str(trace)[0].upper()}{str(trace)[1:]}."
    if not trace.top_exact:
        return said
    layer, position, score = trace.top_exact[0]
    token = readable(trace.tokens[position].strip())
    window = f", the middle of {trace.window} layers," if trace.window > 1 else ""
    return (
        f"{said} Of the cells that were run exactly, layer {layer}{window} at {token!r} has the "
        f"highest {scored(trace)}, {score:.3g}."
    )


@finding.register
def _(average: AverageTrace) -> str:
    names = [f"the {name}" for name in average.categories]
    groups = ([0, 1, 2], [3, 4, 5])
    effects, half = average.indirect_effect, average.half_width
    how = ""
    if average.info.get("method") == "gradient":
        how = ", estimated from gradients and no causal effects unless exact runs agree"
    return f"Over {average.n_facts} facts{how}: " + _effects_said(
        average, effects, half, names, groups
    )


def scored(result: CausalTrace | AverageTrace) -> str:
    """Return the name of the quantity that is scored, such as "P(Seattle)"."""
    if isinstance(result, AverageTrace):
        metric = str(result.info.get("metric"))
        return _METRICS.get(metric, _METRICS["probability"]).format("answer")
    return _METRICS[result.metric].format(readable(result.answer.strip()))


def restored(kind: str, window: int, layer: int, n_layers: int) -> str:
    """Return what the cells of one layer restore, such as "MLP outputs of layers 1 to 7"."""
    state = KINDS[kind]
    if not state.windowed:
        return f"the {state.name} after layer {layer}"
    layers = window_of(layer, window, n_layers)
    several = f"s {layers[0]} to {layers[-1]}" if len(layers) > 1 else f" {layers[0]}"
    return f"{state.states} of layer{several}"


def _effects_said(
    result: CausalTrace | AverageTrace,
    effects: Float[Tensor, "row layer"],
    half_width: Float[Tensor, "row layer"],
    names: Sequence[str],
    groups: tuple[Sequence[int], Sequence[int]],
) -> str:
    """Return the sentence about the best cells at the subject, and after it."""
    unit, total = scored(result), result.total_effect
    if not total > 0:
        return f"the corruption does not lower {unit}, so there is nothing to bring back."

    def said(place: _Place) -> tuple[str, str]:
        row, layer = place
        what = restored(result.kind, result.window, layer, effects.shape[1])
        return f"{what} at {names[row]}", _share(effects[place] / total, half_width[place] / total)

    subject, later = (_best(effects, half_width, rows) for rows in groups)
    if subject is None:
        text = f"restoring {KINDS[result.kind].states} at the subject brings back none of {unit}"
    else:
        what, share = said(subject)
        text = f"restoring {what} brings back {share} of the lost {unit}"
    if later is not None and KINDS[result.kind].windowed:
        what, share = said(later)
        text += f"; after the subject, {what} bring back {share}"
    return f"{text}."


def _best(
    effects: Float[Tensor, "row layer"], half_width: Float[Tensor, "row layer"], rows: Sequence[int]
) -> _Place | None:
    """Return the cell with the largest effect above 0 whose interval does not contain 0, if any."""
    clear = (effects > 0) & ~(effects <= half_width)
    found = torch.where(clear, effects, -torch.inf)[list(rows)]
    if not len(found) or not found.isfinite().any():
        return None
    row, layer = divmod(int(found.argmax()), effects.shape[1])
    return rows[row], layer


def _share(share: Tensor, half_width: Tensor) -> str:
    """Return a share in percent, with half its interval if that is known."""
    if share < 0.005:
        return "less than 1%"
    interval = "" if half_width.isnan() else f" ± {half_width.item() * 100:.0f}"
    return f"{share.item():.0%}{interval}"


@finding.register
def _(report: EditReport) -> str:
    edited, *others = report.prompts
    changed = sum(one.top_before[0][0] != one.top_after[0][0] for one in others)
    elsewhere = f" The top token changes at {changed} of {len(others)} other prompts."
    return (
        f"The edit of {layer_names(report.layers)} takes P({_target(report)}) at the edited prompt "
        f"from {edited.p_before:.2g} to {edited.p_after:.2g}; the top token was "
        f"{_top(edited.top_before)} and is {_top(edited.top_after)}."
        f"{elsewhere if others else ''}"
    )


def _target(report: EditReport) -> str:
    return readable(report.request.target_new.strip())


def _top(top: Sequence[tuple[str, float]]) -> str:
    return f"{readable(top[0][0].strip())!r}"


@finding.register
def _(results: Results, *others: Results) -> str:
    runs = [run for run in (results, *others) if run.after]
    if not runs:
        return "This is the unedited model; there is no method to judge."
    cases = common_cases((results, *others))
    scores = {readable(run.name): run.scores(cases=cases) for run in runs}
    unedited = results.scores(edited=False, cases=cases)
    of, said = results.benchmark, []
    for metric in ("S",) if "S" in unedited else of.s_of or tuple(of.panels):
        known = {name: one[metric] for name, one in scores.items() if metric in one}
        if known and metric in unedited:
            best = max(known, key=lambda name: known[name].mean)
            said.append(
                f"the highest {metric} is {best}'s, {_percent(known[best])} (unedited "
                f"{unedited[metric].mean:.1f})"
            )
    if not said:
        return "There is no metric that all runs have."
    return f"Of {len(runs)} method{'s' * (len(runs) > 1)}, {'; '.join(said)}."


def _percent(estimate: Estimate) -> str:
    interval = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.1f}"
    return f"{estimate.mean:.1f}{interval}"
