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

from transformer_lens_rome.showing import view
from transformer_lens_rome.viz.words import readable

_ASSETS = Path(__file__).parent / "assets"


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
        return f'{program}<style>{asset("page.css")}</style><div class="tlr">{self.body}</div>'


@cache
def asset(name: str) -> str:
    """Return a file of this package that goes into pages."""
    return (_ASSETS / name).read_text(encoding="utf-8")


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
    body = "".join(f'<div class="tlr-item">{view.body}</div>' for view in views)
    return View(body, any(view.interactive for view in views))


def beside(*items: View) -> View:
    """Arrange views next to each other, or below each other in a narrow window."""
    body = "".join(f"<div>{item.body}</div>" for item in items)
    return View(f'<div class="tlr-beside">{body}</div>', any(item.interactive for item in items))


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
        f"<body>{stack(View(f'<h1>{heading}</h1>'), *items)._repr_html_()}</body></html>",
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
    return View(f'{place}<script type="module">{script}</script>', interactive=True)


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
