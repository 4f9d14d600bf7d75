"""The notebooks run from top to bottom without a network, end in an assertion, and are small."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NETWORK = "pretrained"  # the tag of a cell that takes published weights
MOST_BYTES = 150_000

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def offline(notebook):
    """The notebook without the cells that need a network, and without what they gave before."""
    notebook.cells = [cell for cell in notebook.cells if NETWORK not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def execute(notebook, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings = {"timeout": 240, "kernel_name": "python3", "resources": {"metadata": {"path": str(folder)}}}
    return NotebookClient(notebook, **settings).execute(env=environment)


def test_there_are_six():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"0{number}_" for number in range(1, 7)]


@each_notebook
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook_runs_and_gives_what_it_shows(path, tmp_path):
    shown, done = read(path), execute(offline(read(path)), tmp_path)
    expected = [kinds_of(cell) for cell in shown.cells if cell.cell_type == "code" and NETWORK not in tags(cell)]
    assert [kinds_of(cell) for cell in done.cells if cell.cell_type == "code"] == expected, (
        "run it again and commit its outputs"
    )


def tags(cell):
    return cell.metadata.get("tags", [])


def kinds_of(cell):
    """What a cell shows: pictures, tables, text; not what it says while it works."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return [sorted(output.get("data", {output.get("name"): None})) for output in outputs]


@each_notebook
def test_the_last_cell_asserts(path):
    last = [cell for cell in read(path).cells if cell.cell_type == "code"][-1]
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(last.source))) >= 1


@each_notebook
def test_a_committed_notebook_is_small_whole_and_of_no_machine(path):
    notebook, text = read(path), path.read_text(encoding="utf-8")
    nbformat.validate(notebook)
    assert len(text) < MOST_BYTES
    assert not re.search(r"/(home|tmp|root|Users|work)/", text)
    for cell in notebook.cells:
        if cell.cell_type == "code" and NETWORK not in tags(cell):
            assert all(output.output_type != "error" for output in cell.outputs)
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_published_weights_are_taken_by_one_marked_cell_alone():
    cells = [cell for path in NOTEBOOKS for cell in read(path).cells if cell.cell_type == "code"]
    marked = [cell for cell in cells if NETWORK in tags(cell)]
    assert len(marked) == 1
    assert not marked[0].outputs
    for cell in cells:
        if cell not in marked:
            assert not re.search(r'"(timm|hf|torchvision|open_clip):[^"]*"(?![^)]*pretrained=False)', cell.source)


def test_a_failing_assertion_is_seen(tmp_path):
    cells = [nbformat.v4.new_code_cell("assert 1 + 1 == 3")]
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(nbformat.v4.new_notebook(cells=cells), tmp_path)
