"""The rating page: one HTML file that needs no network and tells raters no method.

Texts of models stand on it as JSON, which the page's program shows as plain text. The page's policy
(`Content-Security-Policy`) lets only that program run, by its sha256, and lets nothing be fetched
or sent.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from transformer_lens_rome.evaluation.results import Results
from transformer_lens_rome.rate.answers import FORMAT
from transformer_lens_rome.rate.items import Item, drawn_items
from transformer_lens_rome.rate.key import LETTERS, SAME, Key

_TITLE = "Which text is better?"
_ASKED = {
    "consistency": "Which text is {} consistent with the edited fact?",
    "fluency": "Which text is {} fluent?",
}


def build(
    *runs: Results,
    records: Sequence[Any],
    out: Any,
    n_items: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Key:
    """Write a page that asks people to compare generated texts of two to four runs, blind.

    Each item shows one text of each run about the same record, side by side in random order, and
    asks which is more consistent with the edited fact and which is more fluent. Raters answer in
    their browser and export a JSON file, which `analyse` reads with the key. The key is written
    beside the page, with the ending `.key.json`; it names the methods, so keep it from raters.

    Args:
        runs: Runs of one model and data set with generated text (`generate=True`).
        records: The records of the runs; they have the facts.
        out: The page's file, usually `.html`.
        n_items: The number of items, drawn from the records that have texts in all runs. None: all
            these.
        seed: The seed of the draws and orders. The same seed gives the same page.
        names: The names of the runs in the analysis. None: those of their methods.

    Raises:
        ValueError: The runs cannot be compared, their names do not tell them apart, or `out` has
            the key of another page, whose answers would be lost without it.
        OSError: The files cannot be written.
    """
    methods = tuple([run.name for run in runs] if names is None else names)
    if len(methods) != len(runs):
        raise ValueError(f"names has {len(methods)} names for {len(runs)} runs; give one each")
    if len(runs) < 2:
        raise ValueError(f"a page compares 2 to {len(LETTERS)} runs, got {len(runs)}")
    key_items, items = drawn_items(runs, records, n_items, seed)
    content = _content(items)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    key = Key(methods, key_items, digest, seed)
    path, key_path = Path(out), Path(out).with_suffix(".key.json")
    if key_path.exists() and Key.load(key_path) != key:
        raise ValueError(
            f"{key_path} is the key of another page, without which its answers cannot be read; "
            "give another file as out="
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    key.save(key_path)
    path.write_text(_document({"page": key.page, **content}), encoding="utf-8")
    return key


def _content(items: Sequence[Item]) -> dict[str, Any]:
    """Return everything that the page shows, but for the words that are part of its program."""
    n = len(items[0].texts)
    word = "more" if n == 2 else "most"
    return {
        "format": FORMAT,
        "questions": {name: text.format(word) for name, text in _ASKED.items()},
        "same": SAME,
        "letters": LETTERS[:n],
        "items": [asdict(item) for item in items],
    }


def _document(content: Mapping[str, Any]) -> str:
    """Return the page as HTML."""
    program, style = _asset("rate.js"), _asset("rate.css")
    allowed = (
        f"default-src 'none'; script-src '{_hash(program)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(content).replace("<", "\\u003c")  # no text may end the script
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(allowed)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{_TITLE}</title><link rel="icon" href="data:,"><style>{style}</style></head>\n'
        f"<body><main><h1>{_TITLE}</h1><noscript><p>This page needs JavaScript: it is off in this "
        "browser, so nothing can be shown or answered. The page works without a network and "
        "sends nothing.</p></noscript></main>\n"
        f'<script type="application/json" id="content">{data}</script>\n'
        f"<script>{program}</script></body></html>\n"
    )


@cache
def _asset(name: str) -> str:
    """Return a file of this package that goes into the page."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source expression that allows an inline text in the page's policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
