"""The static figure of an edit: traces, answers, neurons and neighbours, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens_rome.edit_report import EditReport
from transformer_lens_rome.showing import figure as figure_of
from transformer_lens_rome.viz.figures import new_figure, plain, plot_trace
from transformer_lens_rome.viz.words import layer_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@figure_of.register(EditReport)
def plot_edit(report: EditReport) -> Figure:
    """Plot four panels: traces before and after, P(target) at each prompt, and neuron shares."""
    n = len(report.prompts)
    tokens = len(report.before.tokens)
    heights = (0.24 * tokens + 1.2, max(2.2, 0.42 * n + 1.2))
    figure = new_figure(11, sum(heights))
    (one, two), (three, four) = figure.subplots(2, 2, height_ratios=heights)
    traces = (report.before, report.after)
    scale = (
        min(trace.p_corrupted for trace in traces),
        max(trace.scores.max().item() for trace in traces),
    )
    plot_trace(report.before, ax=one, scale=scale)
    one.set_title("before the edit", fontsize=10)
    plot_trace(report.after, ax=two, scale=scale)
    two.set_title(f"after the edit of {layer_names(report.layers)}", fontsize=10)
    _answers(three, report)
    _neurons(four, report)
    return figure


def _answers(ax: Any, report: EditReport) -> None:
    """Plot two bars per prompt: the target's probability before and after."""
    target = plain(report.request.target_new.strip())
    for i, one in enumerate(report.prompts):
        first = i == 0
        ax.barh(i - 0.2, one.p_before, 0.36, color="0.7", label="before" if first else None)
        ax.barh(i + 0.2, one.p_after, 0.36, color="#20b020", label="after" if first else None)
        top = one.top_before[0][0].strip(), one.top_after[0][0].strip()
        words = plain(f"{top[0]} → {top[1]}   KL {one.divergence:.2g}")
        ax.text(max(one.p_before, one.p_after) + 0.02, i, words, va="center", fontsize=8)
    labels = [plain(_short(one.prompt)) for one in report.prompts]
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.8)
    ax.set_xticks([0, 0.5, 1])
    ax.set_xlabel(f"p({target}), and the top token before → after", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="lower right")


def _neurons(ax: Any, report: EditReport) -> None:
    """Plot the cumulative sum of the neurons' shares of the change, the largest first."""
    if report.shares is None:
        ax.axis("off")
        ax.text(0.5, 0.5, "the edit changes no W_out:\nneurons have no shares", ha="center")
        return
    shares = report.shares.sort(descending=True).values.cumsum(0)
    ax.plot(range(1, len(shares) + 1), shares.numpy(), color="#7261ab")
    ax.set_xscale("log")
    ax.axhline(1, color="black", linewidth=0.5)
    named = ", ".join(str(i) for i, _ in report.top_neurons(5))
    ax.set_title(f"neurons that carry the update: {named}, ...", fontsize=10)
    ax.set_xlabel(f"neurons of layer {report.shares_layer}, the largest first", fontsize=9)
    ax.set_ylabel("share of the value's change", fontsize=9)


def _short(text: str, length: int = 44) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
