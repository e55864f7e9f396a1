"""The built wheel holds everything, the tests see the installed one, and importing it stays light."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

import cachekit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
FOLDERS = ("plugins", "adapters")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel and return its files by name."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sources(package):
    files = (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to((ROOT / package).parent).as_posix() for path in files}


def test_every_package_is_listed():
    found = [f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).iterdir() if path.is_dir()]
    assert sorted(PACKAGES) == sorted(["cachekit", *(name for name in found if (ROOT / name / "__init__.py").exists())])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folders_of_plugins_and_adapters_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_has_every_file_of_a_package(wheel, package):
    assert sources(package) <= set(wheel)
    assert f"{Path(package).name}/py.typed" in wheel


def test_the_wheel_has_nothing_else(wheel):
    allowed = {Path(package).name for package in PACKAGES}
    others = {name.split("/")[0] for name in wheel} - allowed
    assert others == {f"cachekit_diffusion-{cachekit.__version__}.dist-info"}


def test_the_wheel_has_the_weights_that_the_manifests_name(wheel):
    manifests = [name for name in wheel if re.fullmatch(r"cachekit/models/demo/weights/\w+/manifest\.json", name)]
    assert manifests
    for manifest in manifests:
        for name in json.loads(wheel[manifest]):
            assert manifest.replace("manifest.json", name) in wheel


def test_the_wheel_has_the_entry_points(wheel):
    (name,) = (name for name in wheel if name.endswith(".dist-info/entry_points.txt"))
    text = wheel[name].decode()
    assert "[console_scripts]\ncachekit = cachekit.cli:app\n" in text
    registered = set(PROJECT["project"]["entry-points"]["cachekit"].values())
    assert registered == {Path(package).name for package in PACKAGES} - {"cachekit"}
    assert all(f"= {module}\n" in text for module in registered)


def test_versions_agree():
    assert PROJECT["project"]["version"] == cachekit.__version__


def test_every_direct_dependency_is_pinned():
    def names(requirements):
        return {re.split(r"[<>=;\[ ]", line)[0].lower() for line in requirements}

    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra), "hatchling"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = names(line for line in lines if line and not line.startswith("#"))
    assert names(needed) - {PROJECT["project"]["name"]} <= pinned


@pytest.mark.skipif("CACHEKIT_TEST_LOWEST" not in os.environ, reason="only `make test-lowest` installs them")
def test_the_lowest_versions_are_installed():
    extras = PROJECT["project"]["optional-dependencies"]
    for line in PROJECT["project"]["dependencies"] + extras["bench"]:
        name, bound = line.split(">=")
        assert name == "torch" or Version(version(name)) == Version(bound)


@pytest.mark.skipif("CACHEKIT_TEST_INSTALLED" not in os.environ, reason="only `make test` installs the wheel")
def test_the_tests_see_the_installed_wheel():
    assert "site-packages" in Path(cachekit.__file__).parts
    for module in PROJECT["project"]["entry-points"]["cachekit"].values():
        assert "site-packages" in Path(__import__(module).__file__).parts


@pytest.mark.parametrize("code", ["import cachekit", "import cachekit.cli", "import cachekit; cachekit.CachekitError"])
def test_importing_loads_neither_torch_nor_diffusers(code):
    check = f"{code}; import sys; assert not {{'torch', 'diffusers', 'transformers', 'numpy'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_module_hides_a_public_name():
    """An imported module becomes an attribute of its package, before anything of its own."""
    assert not {path.stem for path in Path(cachekit.__file__).parent.iterdir()} & set(cachekit.__all__)


@pytest.mark.parametrize("target", ["demo", "test", "test-lowest", "lint", "bench"])
def test_make_knows_its_targets(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
