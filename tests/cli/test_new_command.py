"""New projects install and pass their own tests as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import commands

from cachekit.cli.new import _SCAFFOLDS

ROOT = Path(__file__).parents[2]
#: Command and options, by name of the project.
PROJECTS = {
    "calm_layers": ("new-policy",),
    "growing_gaps": ("new-policy", "--schedule"),
    "damped_line": ("new-policy", "--stand-in"),
    "rings": ("new-adapter",),
}
#: The checks of the kit that are run here; the kit's own tests run the others on like policies.
SOME = "not checks or undo or counts_match"


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of new projects."""
    here = tmp_path_factory.mktemp("projects")
    folders = {name: here / name for name in PROJECTS}
    for name, (command, *options) in PROJECTS.items():
        printed = commands.printed(command, name, *options, "--output", folders[name])
        assert f"wrote {folders[name]}" in printed
    return folders


def test_they_install_and_pass_their_tests(projects: dict[str, Path], tmp_path: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", tmp_path]
    subprocess.run([*pip, *projects.values()], check=True)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    tests = [str(folder / "tests") for folder in projects.values()]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", SOME]
    done = subprocess.run([*pytest_, *tests], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 12


def test_an_editable_install_needs_the_backend_alone(projects: dict[str, Path], tmp_path: Path) -> None:
    folder = projects["calm_layers"]
    code = "import sys; sys.modules['editables'] = None; from hatchling.build import build_editable as build;"
    made = [sys.executable, "-c", f"{code} print(build(sys.argv[1]))", str(tmp_path)]
    wheel = subprocess.run(made, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert archive.read(path).decode().split() == [str(folder)]


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
def test_they_are_clean(projects: dict[str, Path]) -> None:
    """No placeholder is left, and ruff and mypy find nothing with the rules of this project."""
    for folder in projects.values():
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {"README.md", "pyproject.toml", "test.yml", "py.typed"} <= {path.name for path in files}
        assert not any("PACKAGE" in str(path.relative_to(folder)) or path.suffix == ".in" for path in files)
        assert not any(re.search(r"\$(?!\{\{)", path.read_text()) for path in files)
        rules = ["--config", str(ROOT / "pyproject.toml"), "--ignore", "I001"]
        checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *rules, str(folder)])
        assert checked.returncode == 0


def test_their_workflow_installs_cachekit_first_from_one_variable(projects: dict[str, Path]) -> None:
    for folder in projects.values():
        workflow = (folder / ".github" / "workflows" / "test.yml").read_text()
        assert workflow.count("  CACHEKIT: ") == 1
        installed = re.findall(r"- run: pip install (.*)", workflow)
        assert installed == ['"${{ env.CACHEKIT }}"', '-e ".[test]"']


def test_every_kind_of_project_has_a_scaffold() -> None:
    kinds = {path.name for path in _SCAFFOLDS.iterdir() if path.is_dir()}
    assert kinds == {"common", "policy", "schedule", "stand_in", "adapter"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("new-policy", "Calm"), "policy name 'Calm': write lower case, digits and underscores, a letter first"),
        (("new-policy", "class"), "policy name 'class': write lower case"),
        (("new-policy", "tgate"), "policy name 'tgate' is taken by an installed plugin; choose another"),
        (("new-policy", "every", "--schedule"), "schedule name 'every' is taken by an installed plugin"),
        (("new-adapter", "dit"), "adapter name 'dit' is taken by an installed plugin"),
        (("new-policy", "a", "--schedule", "--stand-in"), "--schedule and --stand-in exclude each other"),
    ],
)
def test_names_that_can_not_be(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    result = commands.run(*words, "--output", tmp_path / "new")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert f"error: {line}" in result.output or line in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    result = commands.run("new-policy", "calm", "--output", tmp_path)
    assert result.exit_code == 2
    assert f"error: {str(tmp_path)!r} exists already; give another folder as --output" in result.output
    assert list(tmp_path.iterdir()) == []
