"""HTML that needs no network: in a notebook cell, or as one saved file.

A `View` names the programs that make it explorable. A page holds each once. In a notebook, a view
with programs is a page in a frame, so its style and its programs meet nothing of the notebook's.

circuitsvis uses the network each time it renders, and its saved figures refer to a server. But its
package contains the whole program, which a page holds compressed.
"""

from __future__ import annotations

import base64
import gzip
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

from transformer_lens_rome.showing import view
from transformer_lens_rome.viz.words import readable


@dataclass(frozen=True)
class View:
    """A piece of HTML that a notebook cell or a page shows.

    Attributes:
        body: The HTML.
        programs: The programs that readers need to explore it, which are not part of `body`: "map"
            for heat maps, "circuits" for figures of circuitsvis.
    """

    body: str = field(repr=False)
    programs: frozenset[str] = frozenset()

    @property
    def interactive(self) -> bool:
        """Whether readers can explore it."""
        return bool(self.programs)

    def _repr_html_(self) -> str:
        if not self.programs:
            return f'<style>{asset("page.css")}</style><div class="tlr">{self.body}</div>'
        page = html.escape(_document(self, "a result"))
        style = "width:100%;height:600px;border:0"
        return f'<iframe title="a result" style="{style}" srcdoc="{page}"></iframe>'


@cache
def asset(name: str) -> str:
    """Return a file of this package that goes into pages."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


@cache
def circuitsvis_program() -> str:
    """Return the JavaScript that defines `CircuitsVis`, compressed, as base64 text."""
    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    lines = path.read_text(encoding="utf-8").splitlines()
    program = "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))
    return base64.b64encode(gzip.compress(program.encode(), mtime=0)).decode()


def _document(shown: View, title: str, heading: str = "") -> str:
    """Return a whole page that shows a view."""
    name = html.escape(readable(title))
    figures, scripts = "", []
    if shown.programs:
        scripts = [asset("page.js"), *(asset(f"{one}.js") for one in sorted(shown.programs))]
    if "circuits" in shown.programs:
        packed = f'<script type="text/plain" class="tlr-circuitsvis">{circuitsvis_program()}'
        figures = f"<script>const tlrFigures = [];</script>{packed}</script>"
    script = f"<script>{''.join(scripts)}</script>" if scripts else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{name}</title><link rel="icon" href="data:,"><style>{asset("page.css")}</style>'
        f'<script type="application/json" class="tlr-state">{{}}</script>{figures}</head>'
        f'<body><main class="tlr">{heading}{shown.body}</main>{script}</body></html>'
    )


def stack(*items: Any) -> View:
    """Arrange items below each other.

    Args:
        items: Text (a paragraph), matplotlib figures, circuitsvis figures, views, and results of
            this package.
    """
    views = [_view(item) for item in items]
    body = "".join(f'<div class="tlr-item">{view.body}</div>' for view in views)
    return View(body, _programs(views))


def beside(*items: View) -> View:
    """Arrange views next to each other, or below each other in a narrow window."""
    body = "".join(f"<div>{item.body}</div>" for item in items)
    return View(f'<div class="tlr-beside">{body}</div>', _programs(items))


def _programs(views: Iterable[View]) -> frozenset[str]:
    return frozenset().union(*(view.programs for view in views))


def save_html(path: Any, *items: Any, title: str = "transformer_lens_rome") -> None:
    """Write one file that shows items in any browser without a network.

    Args:
        path: The file, usually `.html`.
        items: As in `stack`.
        title: The page's title and heading.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    heading = f"<h1>{html.escape(readable(title))}</h1>"
    path.write_text(_document(stack(*items), title, heading), encoding="utf-8")


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
        return View(f'<img alt="figure" src="data:image/png;base64,{data}">')
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
    place = f'<div class="tlr-light"><div id="{name}"></div></div>'
    without = "<noscript>This figure needs JavaScript.</noscript>"
    body = f"{place}{without}<script>tlrFigures.push(() => {{ {script} }})</script>"
    return View(body, frozenset({"circuits"}))


# ---------------------------------------------------------------- static parts


def table(rows: Iterable[tuple[str, ...]], header: Sequence[str] = ()) -> View:
    """Make a table of plain text."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in header)
    cells = (
        "".join(f'<td dir="auto">{html.escape(readable(text))}</td>' for text in row)
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if header else ""
    return View(f'<table class="tlr-words">{top}<tbody><tr>{"<tr>".join(cells)}</tbody></table>')
