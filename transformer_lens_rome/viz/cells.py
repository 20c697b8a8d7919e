"""The view of each kind of result, in a notebook cell and on a page."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edit_report import EditReport, PromptChange
from transformer_lens_rome.edits.base import Edit
from transformer_lens_rome.edits.context_edit import ContextEdit
from transformer_lens_rome.edits.health import EditHealth, said
from transformer_lens_rome.evaluation.qualitative import Generations
from transformer_lens_rome.evaluation.results import Results
from transformer_lens_rome.showing import view
from transformer_lens_rome.tracing.averages import CATEGORIES, AverageSevered, AverageTrace
from transformer_lens_rome.tracing.kinds import KINDS
from transformer_lens_rome.tracing.results import CausalTrace, SeveredTrace
from transformer_lens_rome.viz.interactive import (
    attention_before_and_after,
    log_probs_before_and_after,
    tokens_by_layer,
)
from transformer_lens_rome.viz.page import (
    View,
    beside,
    heat_map,
    layer_names,
    stack,
    table,
    token_labels,
)


@view.register
def _(trace: CausalTrace, *, interactive: bool = True) -> View:
    """Show the heat map, and tokens coloured by indirect effect with a choice of the layer."""
    kind = KINDS[trace.kind]
    restored = kind.states + (f" in {trace.window} layers" if trace.window > 1 else "")
    shown = heat_map(
        trace.scores.T,
        token_labels(trace.tokens, trace.subject_positions),
        colour=kind.colour,
        low=trace.p_corrupted,
        high=trace.scores.max().item(),
        caption=f"{trace.answer.strip()!r}: clean {trace.p_clean:.3g}, corrupted "
        f"{trace.p_corrupted:.3g}, and with {restored} restored",
        unit=trace.metric.replace("_", " "),
    )
    if not interactive:
        return shown
    return stack(shown, "Indirect effect; choose a layer:", tokens_by_layer(trace))


@view.register
def _(average: AverageTrace, *, interactive: bool = True) -> View:
    """Show a heat map: one row per category of token, one column per layer."""
    rows = [f"{name} (n = {n})" for name, n in zip(CATEGORIES, average.n.tolist(), strict=True)]
    return heat_map(
        average.indirect_effect,
        rows,
        colour=KINDS[average.kind].colour,
        low=0.0,
        high=average.indirect_effect.nan_to_num(0.0).max().item(),
        caption=f"{KINDS[average.kind].name}, window {average.window}: mean over "
        f"{average.n_facts} facts, clean {average.p_clean:.3g}, "
        f"corrupted {average.p_corrupted:.3g}",
        unit="average indirect effect",
    )


@view.register
def _(severed: SeveredTrace, *, interactive: bool = True) -> View:
    return _paths(severed.effects, severed.sever)


@view.register
def _(severed: AverageSevered, *, interactive: bool = True) -> View:
    return _paths(severed.effects, severed.sever)


def _paths(effects: Float[Tensor, "2 layer"], sever: str) -> View:
    """Show a heat map of the effects of restoring, with ordinary and with severed paths."""
    return heat_map(
        effects,
        ["ordinary", f"{sever} severed"],
        colour=KINDS["resid"].colour,
        low=0.0,
        high=effects.max().item(),
        caption="effect of restoring the last subject token, with paths ordinary and severed",
        unit="indirect effect",
    )


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
def _(results: Results, *, interactive: bool = True) -> View:
    rows = [(name, str(value)) for name, value in results.scores().items()]
    return table([("method", results.name), *rows])


@view.register
def _(texts: Generations, *, interactive: bool = True) -> View:
    return table(texts.rows(), ("prompt", "model", "goes on"))


@view.register
def _(report: EditReport, *, interactive: bool = True) -> View:
    """Show traces, answers and neurons, then interactive log-probabilities and attention."""
    prompts = [
        (
            one.prompt,
            _likeliest(one.top_before),
            _likeliest(one.top_after),
            f"{one.p_before:.3g} to {one.p_after:.3g}",
            f"{one.divergence:.3g}",
            _shift(one, len(report.layers) > 1),
        )
        for one in report.prompts
    ]
    header = ("prompt", "before", "after", "P(target)", "KL", "largest change of a value")
    shown = stack(
        f"{report.request.text} -> {report.request.target_new} ({layer_names(report.layers)})",
        beside(*(view(trace, interactive=False) for trace in (report.before, report.after))),
        table(prompts, header),
        _neurons(report),
    )
    return stack(shown, _explored(report)) if interactive else shown


def _shift(change: PromptChange, several: bool) -> str:
    """Describe the largest change of a value; with its layer if the edit is in several."""
    if change.value_shift is None:
        return "no W_out changes"
    place = f" in layer {change.layer}" if several else ""
    return f"{change.value_shift:.2f} at {change.token!r}{place}"


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
        f"Attention in layer {report.attention_layer}, where it changed most (the edit is in "
        f"{layer_names(report.layers)}):",
        attention_before_and_after(list(report.tokens), *report.attention),
        "Log-probability of each token; point at a token to see the model's predictions there:",
        log_probs_before_and_after(report.ids, before, after, text),
    )


def _likeliest(top: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(f"{token.strip()} {p:.2f}" for token, p in top)
