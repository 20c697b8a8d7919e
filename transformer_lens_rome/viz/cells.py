"""The views of edits, their comparisons, and runs, in a notebook cell and on a page."""

from __future__ import annotations

from typing import Any

from transformer_lens_rome.edit_report import EditReport, PromptChange
from transformer_lens_rome.edits.base import Edit
from transformer_lens_rome.edits.context_edit import ContextEdit
from transformer_lens_rome.edits.health import EditHealth, said
from transformer_lens_rome.evaluation.qualitative import Generations
from transformer_lens_rome.showing import view
from transformer_lens_rome.viz.findings import finding
from transformer_lens_rome.viz.heat import heat_map
from transformer_lens_rome.viz.interactive import (
    attention_before_and_after,
    log_probs_before_and_after,
)
from transformer_lens_rome.viz.page import View, stack, table
from transformer_lens_rome.viz.traces import difference, trace_panel
from transformer_lens_rome.viz.words import layer_names


@view.register
def _(health: EditHealth, *, interactive: bool = True) -> View:
    return table(said(health))


@view.register
def _(edit: Edit, *, interactive: bool = True) -> View:
    layers = sorted({where.layer for where in edit.sizes()}) or [edit.layer]
    more = f", and {len(edit.requests) - 1} more facts" if len(edit.requests) > 1 else ""
    asked = f"{edit.request.text} -> {edit.request.target_new}{more} ({layer_names(layers)})"
    if not edit.health.facts:
        return stack(asked, view(edit.health))
    facts = [
        (
            f"{request.text} -> {request.target_new}",
            fact.subject_token,
            f"{fact.p_before:.3g} to {fact.p_after:.3g}",
            ", ".join(f"{s:.3g}" for s in fact.s),
            f"{sum(fact.absorbed):.0%}",
            "; ".join(fact.warnings),
        )
        for request, fact in zip(edit.requests, edit.health.facts)
    ]
    header = ("fact", "token", "P(target)", "s", "absorbed", "warnings")
    return stack(asked, view(edit.health), table(facts, header))


@view.register
def _(edit: ContextEdit, *, interactive: bool = True) -> View:
    return stack(f"before every prompt: {edit.text}")


@view.register
def _(texts: Generations, *, interactive: bool = True) -> View:
    return table(texts.rows(), ("prompt", "model", "goes on"))


@view.register
def _(report: EditReport, *, interactive: bool = True) -> View:
    """Show traces, answers and neurons, then interactive log-probabilities and attention."""
    prompts = [
        (
            f"{number}. {one.prompt}",
            _likeliest(one.top_before),
            _likeliest(one.top_after),
            f"{one.p_before:.3g} to {one.p_after:.3g}",
            f"{one.divergence:.3g}",
            _shift(one, len(report.layers) > 1),
        )
        for number, one in enumerate(report.prompts, 1)
    ]
    header = ("prompt", "before", "after", "P(target)", "KL", "the value that changes most")
    traces = [trace_panel(report.before, "before"), trace_panel(report.after, "after")]
    if interactive:
        traces.append(difference(report.before, report.after))
    shown = stack(
        f"{report.request.text} -> {report.request.target_new} ({layer_names(report.layers)})",
        finding(report),
        heat_map(*traces, interactive=interactive),
        table(prompts, header),
        *_lens(report),
        _neurons(report),
    )
    return stack(shown, _explored(report)) if interactive else shown


def _shift(change: PromptChange, several: bool) -> str:
    """Describe the largest change of a value; with its layer if the edit is in several."""
    if change.value_shift is None:
        return "no W_out changes"
    place = f" in layer {change.layer}" if several else ""
    return f"at {change.token!r}{place}, by {change.value_shift:.0%} of its norm"


def _lens(report: EditReport) -> list[Any]:
    """Return a table of the tokens that the change writes, and of those that get it."""
    if report.lens is None:
        return []
    lens = report.lens
    heard = (
        f"{one.token!r} of prompt {one.prompt + 1} ({one.share:.0%})"
        for one in lens.hears
        if one.share >= 0.01
    )
    target = f"{report.request.target_new.strip()!r} is raised as number {lens.target_rank:,}"
    rows = [
        ("raises", ", ".join(repr(token) for token, _ in lens.raises)),
        ("lowers", ", ".join(repr(token) for token, _ in lens.lowers)),
        ("the target", f"{target} of all tokens; the blocks above do the rest"),
        ("at (last subject token: 100%)", ", ".join(heard)),
    ]
    said = f"Edit lens: what the change of W_out in layer {lens.layer} writes, read as if it were"
    return [f"{said} the last state, and the tokens at which it writes:", table(rows)]


def _neurons(report: EditReport) -> str:
    """Describe the shares of neurons; with their layer if the edit is in several."""
    if report.shares is None:
        return "The edit changes no W_out, so neurons have no shares of a value's change."
    place = ""
    if len(report.layers) > 1:
        place = f" in layer {report.shares_layer}, where the subject's value changes most"
    neurons = ", ".join(f"{i} ({share:.1%})" for i, share in report.top_neurons())
    return (
        f"Neurons with the largest shares of the value's change{place}: {neurons}. Half of the "
        f"change comes from {report.neurons_for(0.5)} of {len(report.shares)} neurons."
    )


def _explored(report: EditReport) -> View:
    """Show log-probabilities, and the attention of the layer where it changed most."""

    def text(ids: list[int]) -> str:
        return report.texts.get(str(ids[0]), f"token {ids[0]}")

    before, after = report.log_probs
    return stack(
        "Log-probability of each token; point at a token to see the model's predictions there:",
        log_probs_before_and_after(report.ids, before, after, text),
        f"Attention in layer {report.attention_layer}, where it changed most (the edit is in "
        f"{layer_names(report.layers)}):",
        attention_before_and_after(list(report.tokens), *report.attention),
    )


def _likeliest(top: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(f"{token.strip()} {p:.2f}" for token, p in top)
