"""The notebooks run from the first cell to the last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

shells = pytest.importorskip("IPython.core.interactiveshell", reason="notebooks need ipykernel: pip install ipykernel")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def code(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "clear the outputs"
    return ["".join(cell["source"]) for cell in cells]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """The shell that runs the cells of a kernel, in this process: a kernel of its own would load torch anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    made = shells.InteractiveShell()
    yield made
    made.restore_sys_module_state()
    made.history_manager.end_session()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_run_and_hold_no_outputs(path, shell, capsys):
    results = [shell.run_cell(source) for source in code(path)]
    for result in results:
        result.raise_error()
    printed = capsys.readouterr().out
    if path.stem == "start":
        assert "plain steps:" in printed
        assert [type(result.result).__name__ for result in results].count("SVG") == 1
    else:
        assert "passed" in printed
        assert "edged  feed_forward" in printed


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["own_policy", "start"]
