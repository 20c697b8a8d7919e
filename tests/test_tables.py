"""The tables of README and guide are those of the committed rows, by one command."""

import re
from pathlib import Path

import pytest
from conftest import newest

SCRIPTS = Path(__file__).parents[1] / "examples" / "scripts"


@pytest.fixture
def tables(monkeypatch):
    """The script, as `python examples/scripts/tables.py` imports it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tables

    return tables


@newest
@pytest.mark.slow
def test_the_command_changes_no_page(tables):
    marked = 0
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"run examples/scripts/tables.py: {page.name}"
        marked += len(tables.MARKED.findall(text))
        if first := tables.MARKED.search(text):  # control: another number is noticed
            other = re.sub(r"\d\.\d", "7.77", first[0], count=1)
            assert other != first[0] and tables.filled(text.replace(first[0], other)) == text
    assert marked >= 1
