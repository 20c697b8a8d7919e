"""HTML that needs no network: in a notebook cell, or as one saved file.

circuitsvis uses the network each time it renders, and its saved figures refer to a server. But its
package contains the whole program. A `View` includes that program once per notebook output and once
per saved file.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import circuitsvis
from circuitsvis.utils.render import RenderedHTML
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.showing import view

_STYLE = "background:white;color:#222;font:14px sans-serif;padding:4px 8px;overflow-x:auto"


@dataclass(frozen=True)
class View:
    """A piece of HTML that a notebook cell or a page shows.

    Attributes:
        body: The HTML.
        interactive: Whether it needs the circuitsvis program, which is not part of `body`.
    """

    body: str = field(repr=False)
    interactive: bool = False

    def _repr_html_(self) -> str:
        program = f"<script>{circuitsvis_program()}</script>" if self.interactive else ""
        return f'{program}<div style="{_STYLE}">{self.body}</div>'


@cache
def circuitsvis_program() -> str:
    """Return the JavaScript that defines `CircuitsVis`, escaped for an HTML file."""
    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    lines = path.read_text(encoding="utf-8").splitlines()
    program = "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))
    return program.replace("</", "<\\/")


def stack(*items: Any) -> View:
    """Arrange items below each other.

    Args:
        items: Text (a paragraph), matplotlib figures, circuitsvis figures, views, and results of
            this package.
    """
    views = [_view(item) for item in items]
    body = "".join(f'<div style="margin:12px 0">{view.body}</div>' for view in views)
    return View(body, any(view.interactive for view in views))


def beside(*items: View) -> View:
    """Arrange views next to each other, or below each other in a narrow window."""
    body = "".join(f'<div style="flex:1 1 320px;min-width:0">{item.body}</div>' for item in items)
    style = "display:flex;flex-wrap:wrap;gap:24px"
    return View(f'<div style="{style}">{body}</div>', any(item.interactive for item in items))


def save_html(path: Any, *items: Any, title: str = "transformer_lens_rome") -> None:
    """Write one file that shows items in any browser without a network.

    Args:
        path: The file, usually `.html`.
        items: As in `stack`.
        title: The page's title and heading.
    """
    heading, path = html.escape(title), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<title>{heading}</title><link rel="icon" href="data:,"></head>'
        f'<body style="margin:24px;max-width:1100px"><h2 style="font-family:sans-serif">{heading}'
        f"</h2>{stack(*items)._repr_html_()}</body></html>",
        encoding="utf-8",
    )


@view.register
def _(shown: View, *, interactive: bool = True) -> View:
    return shown


@view.register
def _(text: str, *, interactive: bool = True) -> View:
    return View(f"<p>{html.escape(text)}</p>")


@view.register
def _(rendered: RenderedHTML, *, interactive: bool = True) -> View:
    return component(rendered)


def _view(item: Any) -> View:
    """Return a view of any item of a page; this does not import matplotlib."""
    if hasattr(item, "savefig"):
        picture = io.BytesIO()
        item.savefig(picture, format="png", dpi=150)
        data = base64.b64encode(picture.getvalue()).decode()
        return View(f'<img style="max-width:100%" src="data:image/png;base64,{data}">')
    if view.dispatch(type(item)) is view.dispatch(object) and hasattr(item, "_repr_html_"):
        return View(item._repr_html_())
    return view(item)


def component(rendered: Any) -> View:
    """Return a view of a circuitsvis figure, without the program and references to a server.

    circuitsvis renders `<div id=ID/> <script> PROGRAM; CircuitsVis.render(ID, ...) </script>`.
    Browsers do not treat that `div` as closed.

    Raises:
        RuntimeError: The installed circuitsvis renders another form.
    """
    source = rendered.local_src
    match = re.match(r'<div id="([\w-]+)"', source)
    name = match[1] if match else None
    call = source.rfind(f'CircuitsVis.render(\n      "{name}"') if match else -1
    if call < 0:
        raise RuntimeError("this version of circuitsvis renders in another form; please report it")
    end = source.rindex("</script>")
    script = source[call:end].replace("<", "\\u003c")  # no text may end the script
    return View(f'<div id="{name}"></div><script type="module">{script}</script>', interactive=True)


# ---------------------------------------------------------------- static parts


def token_labels(tokens: Sequence[str], subject_positions: Sequence[int]) -> list[str]:
    """Return the labels of tokens in a figure; subject tokens get a star."""
    return [
        text.replace("\n", "\\n") + "*" * (i in subject_positions) for i, text in enumerate(tokens)
    ]


def layer_names(layers: Sequence[int]) -> str:
    """Return "layer 3" for one layer and "layers 3, 4" for several."""
    return f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers))}"


def heat_map(
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    *,
    colour: tuple[int, int, int],
    low: float,
    high: float,
    caption: str = "",
    unit: str = "",
) -> View:
    """Make a table of coloured cells, one column per layer; a cell shows its value on hover."""
    span = max(high - low, 0.0) or 1.0
    lines = []
    for name, line in zip(rows, values.tolist(), strict=True):
        cells = "".join(
            f'<td title="{html.escape(name)} layer {i}: {x:.4g}" style="min-width:14px;height:16px;'
            f'padding:0;background:{_mix(colour, (x - low) / span)}"></td>'
            for i, x in enumerate(line)
        )
        label = html.escape(name).replace(" ", "&nbsp;") or "&nbsp;"
        lines.append(
            f'<tr><td style="text-align:right;padding:0 6px;white-space:nowrap">{label}</td>'
            f"{cells}</tr>"
        )
    n = values.shape[1]
    ticks = "".join(
        f'<td style="padding:0;text-align:center;font-size:11px">{i if i % 5 == 0 else ""}</td>'
        for i in range(n)
    )
    scale = (
        f'<span style="display:inline-block;width:120px;height:10px;background:linear-gradient(to '
        f'right,{_mix(colour, 0)},{_mix(colour, 1)})"></span>'
    )
    return View(
        f'<div style="margin-bottom:4px">{html.escape(caption)}</div>'
        f'<table style="border-collapse:collapse;border:0">{"".join(lines)}<tr><td></td>{ticks}'
        f'</tr></table><div style="font-size:11px">layer &emsp; {html.escape(unit)} {low:.3g} '
        f"{scale} {high:.3g}</div>"
    )


def table(rows: Iterable[tuple[str, ...]], header: Sequence[str] = ()) -> View:
    """Make a table of plain text."""
    cell = '<{0} style="text-align:left;padding:1px 12px 1px 0;vertical-align:top">{1}</{0}>'
    lines = [
        "<tr>" + "".join(cell.format(tag, html.escape(text)) for text in row) + "</tr>"
        for tag, some in (("th", [tuple(header)] if header else []), ("td", rows))
        for row in some
    ]
    return View(f'<table style="border-collapse:collapse">{"".join(lines)}</table>')


def _mix(colour: tuple[int, int, int], share: float) -> str:
    """Mix white (share 0, or not a number) and a colour (share 1)."""
    share = min(max(share, 0.0), 1.0) if share == share else 0.0
    return "rgb({},{},{})".format(*(round(255 + (c - 255) * share) for c in colour))
