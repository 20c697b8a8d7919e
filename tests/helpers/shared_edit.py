"""An edit to share, and readers of its card."""

import dataclasses
from html.parser import HTMLParser

import yaml
from helpers.rome_setting import random_edit
from markdown_it import MarkdownIt

from transformer_lens_rome.edits.health import EditHealth


def edit_to_share(model):
    """An edit with what a real one has: health, and the origin of its statistics."""
    made = random_edit(model)
    health = EditHealth(" Needle", (3.0, 0.1), 0.01, 0.9, warnings=("its norm is large",))
    origin = {"model": "owner/tiny", "revision": "0123abc"}
    origin["second_moment"] = {"n_tokens": 4096, "source": "wikipedia"}
    return dataclasses.replace(made, health=health, provenance=origin)


class _Page(HTMLParser):
    """The tags of a page, and the text of each table cell and heading."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = set(), [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag in ("td", "h1"):
            self.open = ""

    def handle_endtag(self, tag):
        if tag in ("td", "h1"):
            self.texts.append(self.open)
            self.open = None

    def handle_data(self, data):
        if self.open is not None:
            self.open += data


def read(card):
    """The YAML of a card, and its page as a code host makes it."""
    start, front, body = card.split("---\n", 2)
    assert start == ""
    html = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
    return yaml.safe_load(front), _Page(html.enable("strikethrough").render(body))


def equal(one, other):
    """The same edit, field by field."""
    fields = [f.name for f in dataclasses.fields(one) if f.name not in one.tensors()]
    plain = [n for n in fields if n != "factors"]
    same = all(getattr(one, name) == getattr(other, name) for name in plain)
    return type(one) is type(other) and same and one.digest == other.digest
