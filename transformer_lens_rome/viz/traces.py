"""The views of traces and their averages: heat maps of indirect effects."""

from __future__ import annotations

import dataclasses
from functools import partial

from transformer_lens_rome.showing import view
from transformer_lens_rome.tracing.averages import CATEGORIES, AverageSevered, AverageTrace
from transformer_lens_rome.tracing.kinds import KINDS
from transformer_lens_rome.tracing.results import CausalTrace, SeveredTrace
from transformer_lens_rome.viz.findings import finding, restored, scored
from transformer_lens_rome.viz.heat import Panel, heat_map
from transformer_lens_rome.viz.page import View
from transformer_lens_rome.viz.words import readable, token_labels

_METRICS = {
    "probability": "probability",
    "log_probability": "log-probability",
    "logit_diff": "logit difference",
}


@view.register
def _(trace: CausalTrace, *others: CausalTrace, interactive: bool = True) -> View:
    """Show a heat map of tokens and layers; others are choices of the same map."""
    return heat_map(*map(trace_panel, (trace, *others)), interactive=interactive)


@view.register
def _(average: AverageTrace, *others: AverageTrace, interactive: bool = True) -> View:
    """Show a heat map of categories of tokens and layers; others are choices of the same map."""
    return heat_map(*map(_average_panel, (average, *others)), interactive=interactive)


@view.register
def _(severed: SeveredTrace, *others: SeveredTrace, interactive: bool = True) -> View:
    return heat_map(*map(_severed_panel, (severed, *others)), interactive=interactive)


@view.register
def _(severed: AverageSevered, *others: AverageSevered, interactive: bool = True) -> View:
    return heat_map(*map(_severed_panel, (severed, *others)), interactive=interactive)


def trace_panel(trace: CausalTrace, run: str = "") -> Panel:
    """Return the heat map of one trace; `run` tells it from another run of the same trace."""
    n, n_layers, _ = trace.samples.shape
    unit = scored(trace)
    return Panel(
        effects=trace.indirect_effect.T,
        half_width=trace.half_width.T,
        rows=token_labels(trace.tokens, trace.subject_positions),
        columns=[str(layer) for layer in range(n_layers)],
        cells=[restored(trace.kind, trace.window, layer, n_layers) for layer in range(n_layers)],
        unit=unit,
        colours=_colours(trace.kind),
        caption=f"{run and f'{run}: '}{finding(trace)} {unit} is {trace.p_clean:.3g} clean and "
        f"{trace.p_corrupted:.3g} corrupted, over {n} sample{'s' * (n > 1)} of noise.",
        choice={
            **({"run": run} if run else {"answer": readable(trace.answer.strip())}),
            **_setting(trace),
            "metric": _METRICS[trace.metric],
        },
        base=trace.p_corrupted,
        whole=trace.total_effect,
        samples=trace.samples.transpose(1, 2),
        bases=trace.corrupted_samples.tolist(),
        clean=trace.p_clean,
        metric=trace.metric,
        logarithm=trace.metric == "probability",
        tokens=True,
        kept=(*trace.subject_positions, len(trace.tokens) - 1),
        tops=None if trace.top is None else partial(_tops, trace),
    )


def _tops(trace: CausalTrace, position: int) -> list[str]:
    """Return, by layer, the three tokens that most runs of a position rank first, and how often."""
    texts = []
    for layer in range(trace.samples.shape[1]):
        top = trace.top_at(layer, position)
        some = [f"\u201c{readable(token)}\u201d {n}" for token, n in top[:3]]
        texts.append(", ".join([*some, "others"] if len(top) > 3 else some))
    return texts


def difference(before: CausalTrace, after: CausalTrace) -> Panel:
    """Return the heat map of how much more each state brings back after than before.

    Noise samples are compared pairwise, since both traces draw the same noise.
    """
    change = dataclasses.replace(
        after,
        samples=after.samples - before.samples,
        corrupted_samples=after.corrupted_samples - before.corrupted_samples,
        p_clean=after.p_clean - before.p_clean,
        top=None,
    )
    answers = f"{scored(after)} after, less {scored(before)} before"
    panel = trace_panel(change, "difference")
    return dataclasses.replace(
        panel,
        unit=answers,
        caption=f"difference: what restoring brings back of {answers}, on the same noise.",
        base=None,
        whole=None,
        logarithm=False,
    )


def _average_panel(average: AverageTrace) -> Panel:
    n_layers = average.scores.shape[1]
    layers = range(n_layers)
    unit = scored(average)
    return Panel(
        effects=average.indirect_effect,
        half_width=average.half_width,
        rows=[f"{name} (n = {n})" for name, n in zip(CATEGORIES, average.n.tolist(), strict=True)],
        columns=[str(layer) for layer in layers],
        cells=[restored(average.kind, average.window, layer, n_layers) for layer in layers],
        unit=unit,
        colours=_colours(average.kind),
        caption=f"{finding(average)} The mean {unit} is {average.p_clean:.3g} clean and "
        f"{average.p_corrupted:.3g} corrupted.",
        choice=_setting(average),
        axes="kind of token and layer",
        base=average.p_corrupted,
        whole=average.total_effect,
    )


def _severed_panel(severed: SeveredTrace | AverageSevered) -> Panel:
    name = KINDS[severed.sever].name
    layers = range(severed.effects.shape[1])
    answer = readable(severed.answer.strip()) if isinstance(severed, SeveredTrace) else "answer"
    unit = f"P({answer})"
    return Panel(
        effects=severed.effects,
        half_width=severed.half_width,
        rows=["ordinary", f"{name} severed"],
        columns=[str(layer) for layer in layers],
        cells=[f"the state after layer {layer} at the last subject token" for layer in layers],
        unit=unit,
        colours=_colours("resid"),
        caption=f"Effect of restoring the last subject token on {unit}, with paths ordinary and "
        f"with {name} severed.",
        choice={"severed": name},
        axes="path and layer",
        joins="with paths",
    )


def _setting(result: CausalTrace | AverageTrace) -> dict[str, str]:
    return {"kind": KINDS[result.kind].name, "window": str(result.window)}


def _colours(kind: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return KINDS[kind].colour, KINDS[kind].against
