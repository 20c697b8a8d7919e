"""The notebooks run from top to bottom, and are committed as they ran."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook extra is not installed")
NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
MAJOR = int(version("transformer-lens").split(".")[0])
VERSIONS = {
    "edit_a_fact": 4,
    "locate_a_fact": 4,
    "measure_an_edit": 2,
    "plugin_in_your_workflow": 3,  # it needs both model classes
    "share_an_edit": 4,
}
"""The version of TransformerLens that runs each notebook."""


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_as_it_ran(name):
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    text = "".join(str(cell.source) + str(cell.outputs) for cell in cells)
    assert str(Path.home()) not in text and str(NOTEBOOKS.parents[1]) not in text


@pytest.mark.every_version
@pytest.mark.real_model
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, gemma_moment):  # in the cache: no notebook samples anew
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    if name == "share_an_edit":
        pytest.importorskip("peft", reason="the share extra is not installed")
    if MAJOR != VERSIONS[name]:
        pytest.skip("to save time each is run on one version of TransformerLens only")
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
