"""Static figures with matplotlib (the `plot` extra), in the style of Meng et al. 2022.

Every function returns a `matplotlib.figure.Figure` and does not change matplotlib's global state. A
notebook shows the figure as the last value of a cell, and `.savefig(path)` writes it to a file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from transformer_lens_rome.extras import needed
from transformer_lens_rome.showing import figure as figure_of
from transformer_lens_rome.tracing.averages import AverageSevered, AverageTrace
from transformer_lens_rome.tracing.estimated_trace import EstimatedTrace
from transformer_lens_rome.tracing.kinds import KINDS
from transformer_lens_rome.tracing.results import CausalTrace, SeveredTrace
from transformer_lens_rome.viz.heat import holds_zero
from transformer_lens_rome.viz.words import token_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = ("C0", "C1", "C2", "C4", "C5", "C3")  # by category, as in the paper


@figure_of.register(CausalTrace)
def plot_trace(
    trace: CausalTrace, *, ax: Any = None, scale: tuple[float, float] | None = None
) -> Figure:
    """Plot a heat map of the scores, one row per token and one column per layer (figure 1).

    Stars mark subject tokens. Where the interval of the effect contains 0, the cell is hatched.

    Args:
        trace: The trace to draw.
        ax: Axes to draw on. None: a new figure.
        scale: The scores with the lightest and the darkest colour. None: the corrupted run's score
            and the highest one.
    """
    kind = KINDS[trace.kind]
    labels = [plain(label) for label in token_labels(trace.tokens, trace.subject_positions)]
    if ax is None:
        ax = new_figure(6.4, 1.2 + 0.24 * len(labels)).subplots()
    low, high = scale or (trace.p_corrupted, trace.scores.max().item())
    high = max(high, low + 1e-9)  # if no score is above the corrupted run's, the scale starts there
    drawn = ax.pcolor(trace.scores.T.numpy(), cmap=kind.colour_map, vmin=low, vmax=high)
    _hatch(ax, holds_zero(trace.indirect_effect, trace.half_width).T)
    ax.invert_yaxis()
    ax.set_yticks([i + 0.5 for i in range(len(labels))], labels, fontsize=8)
    _layer_ticks(ax, trace.scores.shape[0], offset=0.5)
    impact = "Estimated impact" if isinstance(trace, EstimatedTrace) else "Impact"
    ax.set_title(f"{impact} of restoring {kind.name} after corrupted input", fontsize=10)
    ax.set_xlabel(_restored(trace), fontsize=9)
    caption = {"probability": "p", "log_probability": "log p", "logit_diff": "logit difference"}
    bar = ax.figure.colorbar(drawn, ax=ax)
    bar.set_label(f"{caption[trace.metric]}({plain(trace.answer.strip())})", fontsize=9)
    return ax.figure


def plot_averages(averages: Sequence[AverageTrace]) -> Figure:
    """Plot heat maps of average indirect effects by the six categories of token (figure 2).

    The maps share a scale from 0 to the highest effect of the "resid" map, if there is one.
    """
    first = [a for a in averages if a.kind == "resid"] or averages
    high = max(float(a.indirect_effect.nan_to_num(0.0).max()) for a in first)
    figure = new_figure(4.6 * len(averages) + 1.2, 2.6)
    for i, (average, ax) in enumerate(_panels(figure, averages, sharey=True)):
        effect = average.indirect_effect.clamp(min=0).numpy()
        drawn = ax.pcolor(effect, cmap=KINDS[average.kind].colour_map, vmin=0, vmax=high)
        _hatch(ax, holds_zero(average.indirect_effect, average.half_width))
        if i == 0:
            names = average.categories
            ax.set_yticks([j + 0.5 for j in range(len(names))], names, fontsize=9)
            ax.invert_yaxis()
        _layer_ticks(ax, effect.shape[1], offset=0.5)
        _title_average(ax, average)
        figure.colorbar(drawn, ax=ax).set_label("AIE", fontsize=9)
    return figure


@figure_of.register
def _(average: AverageTrace) -> Any:
    return plot_averages([average])


def plot_lines(averages: Sequence[AverageTrace]) -> Figure:
    """Plot average indirect effects by layer, one line per category, 95% intervals (figure 7)."""
    figure = new_figure(3.8 * len(averages), 3.4)
    for i, (average, ax) in enumerate(_panels(figure, averages, sharey=True)):
        layers = range(average.scores.shape[1])
        rows = zip(
            average.categories, _LINES, average.indirect_effect, average.half_width, strict=True
        )
        for name, colour, effect, half in rows:
            ax.plot(layers, effect.numpy(), color=colour, label=name)
            low, high = (effect - half).numpy(), (effect + half).numpy()
            ax.fill_between(layers, low, high, color=colour, alpha=0.3, linewidth=0)
        _title_average(ax, average)
        _layer_ticks(ax, len(layers))
        if i == 0:
            ax.set_ylabel("average indirect effect")
            columns = 6 if len(averages) > 2 else 3
            figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def plot_severed(*severed: SeveredTrace | AverageSevered) -> Figure:
    """Plot bars of the effect of restoring the last subject token, paths severed or not (figure 3).

    Args:
        severed: Traces or averages, usually one with attention and one with MLPs severed. The
            ordinary bars are drawn once.
    """
    first = severed[0]
    rows = [("single state", KINDS["resid"], first, 0)]
    for one in severed:
        cut = KINDS[one.sever]
        rows.append((f"single state, {cut.name} severed", cut, one, 1))
    figure = new_figure(7.2, 2.8)
    ax = figure.subplots()
    for i, (label, kind, one, row) in enumerate(rows):
        effect = one.effects[row]
        places = torch.arange(len(effect)) + 0.3 * (i - (len(rows) - 1) / 2)
        error = getattr(one, "half_width", None)
        ax.bar(
            places.numpy(),
            effect.numpy(),
            width=0.3,
            color=kind.bar,
            label=label,
            yerr=None if error is None else error[row].numpy(),
            error_kw={"linewidth": 0.6},
        )
    _layer_ticks(ax, first.effects.shape[1])
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set_xlabel("layer at which the last subject token is restored", fontsize=9)
    ax.set_ylabel("indirect effect", fontsize=9)
    n = getattr(first, "n_facts", 1)
    ax.set_title(f"Effect of the last subject token with severed paths (n = {n})", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    return figure


@figure_of.register
def _(severed: SeveredTrace) -> Any:
    return plot_severed(severed)


@figure_of.register
def _(severed: AverageSevered) -> Any:
    return plot_severed(severed)


# ---------------------------------------------------------------- shared


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of a size in inches, which a notebook shows as a picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = needed("matplotlib.figure", "plot").Figure(
        figsize=(width, height), layout="constrained"
    )
    figure._repr_png_ = partial(_png, figure)
    return figure


def plain(text: str) -> str:
    """Escape dollar signs, so that matplotlib does not read the text as a formula."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _panels(figure: Figure, items: Sequence[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
    return zip(items, figure.subplots(1, len(items), squeeze=False, **options)[0], strict=True)


def _layer_ticks(ax: Any, n_layers: int, offset: float = 0.0) -> None:
    """Set a tick at every fifth layer."""
    layers = range(0, n_layers, 5)
    ax.set_xticks([layer + offset for layer in layers], [str(layer) for layer in layers])


def _hatch(ax: Any, cells: Bool[Tensor, "row column"]) -> None:
    """Draw some cells of a heat map white and hatched."""
    shown = torch.where(cells, 0.0, torch.nan).numpy()
    ax.pcolor(shown, cmap="Greys", vmin=0, vmax=1, hatch="//////", edgecolor="0.85", linewidth=0)


def _restored(result: CausalTrace | AverageTrace) -> str:
    """Return the label of the layer axis."""
    kind = KINDS[result.kind]
    if not kind.windowed:
        return "single restored layer"
    return f"centre of interval of {result.window} restored {kind.name} layers"


def _title_average(ax: Any, average: AverageTrace) -> None:
    name = KINDS[average.kind].name
    ax.set_title(f"AIE of restoring {name} over {average.n_facts} prompts", fontsize=10)
    ax.set_xlabel(_restored(average), fontsize=9)
