"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "launch" / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def printed(notebook: nbformat.NotebookNode) -> str:
    """Everything that the cells wrote."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_notebooks_are_the_three(repository):
    assert [path.stem for path in NOTEBOOKS] == ["first_steps", "look_inside_one_update", "read_a_comparison"]


def test_notebooks_are_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []


SHOWN = {  # what a reader must find in the outputs, and how many pictures
    "first_steps": (["pass@1", "step 10:", "of the questions by SFT"], 1),
    "look_inside_one_update": (["of 8 solved -> SFT", "of 8 solved -> RL", "witness_mismatch: micro-batch 1"], 1),
    "read_a_comparison": (["hpt-seed1", "equal flops", "minus hpt"], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of jupyter's own libraries; the kernel is another process
def test_notebooks_run_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HPTJAX_OVERRIDES", f" --runs_dir {tmp_path / 'runs'}")
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as on a laptop
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[2]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises what a cell raises
    words, count = SHOWN[path.stem]
    text = printed(notebook)
    assert [word for word in words if word not in text] == []
    assert pictures(notebook) == count
    assert not (path.parents[2] / "runs" / "first-steps").exists()  # the test's runs are its own
