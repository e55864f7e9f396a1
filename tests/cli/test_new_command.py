"""New projects install and pass their own tests as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
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
    """No placeholder is left, and ruff finds nothing with the rules of this project."""
    for folder in projects.values():
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {"README.md", "pyproject.toml", "test.yml", "py.typed"} <= {path.name for path in files}
        assert not any("PACKAGE" in str(path.relative_to(folder)) or path.suffix == ".in" for path in files)
        assert not any(re.search(r"\$(?!\{\{)", path.read_text()) for path in files)
        rules = ["--config", str(ROOT / "pyproject.toml"), "--ignore", "I001"]
        checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *rules, str(folder)])
        assert checked.returncode == 0


def installed_from(folder: Path, record: Any) -> Distribution:
    """A distribution with pip's record of where it came from; none for what came from an index."""
    folder.mkdir(exist_ok=True)
    if record is not None:
        (folder / "direct_url.json").write_text(json.dumps(record))
    return Distribution.at(folder)


GIT = {"vcs": "git", "commit_id": "0123abc"}
FOUND = "cachekit-diffusion @ git+https://host.example/cachekit@0123abc"


@pytest.mark.parametrize(
    ("record", "address"),
    [
        ({"url": "https://host.example/cachekit", "vcs_info": GIT}, FOUND),
        ({"url": "https://name:word@host.example/cachekit", "vcs_info": GIT}, ""),
        ({"url": "ssh://host.example/cachekit", "vcs_info": GIT}, ""),
        ({"url": "file:///home/me/cachekit", "dir_info": {"editable": True}}, ""),
        (None, ""),
    ],
)
def test_their_workflow_installs_cachekit_first_from_where_this_one_came(
    record: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = installed_from(tmp_path / "cachekit_diffusion-1.dist-info", record)
    (tmp_path / "cachekit_diffusion-1.dist-info" / "METADATA").write_text("Version: 1.2.3")
    monkeypatch.setattr("cachekit.cli.new.distribution", lambda name: origin)
    commands.printed("new-policy", "calm_layers", "--output", tmp_path / "new")
    workflow = yaml.safe_load((tmp_path / "new" / ".github" / "workflows" / "test.yml").read_text())
    assert workflow["env"] == {"CACHEKIT": f"${{{{ vars.CACHEKIT || '{address}' }}}}"}
    guard, *installs = [step for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert guard["if"] == "env.CACHEKIT == ''"
    shown = subprocess.run(["bash", "-c", guard["run"]], capture_output=True, text=True)
    assert (shown.returncode, "variable CACHEKIT" in shown.stdout) == (1, True)
    assert [step["run"] for step in installs] == [
        'pip install "${{ env.CACHEKIT }}"',
        'pip install -e ".[test]"',
        "pytest",
    ]
    readme = (tmp_path / "new" / "README.md").read_text()
    assert (address or "the address is for you to set") in readme
    assert "gh variable set CACHEKIT" in readme
    project = (tmp_path / "new" / "pyproject.toml").read_text()
    assert 'dependencies = ["cachekit-diffusion>=1.2,<1.3"]' in project


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
