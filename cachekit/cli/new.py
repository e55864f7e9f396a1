"""`cachekit new-policy` and `new-adapter`: a whole project that installs and passes its tests as it is."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Container
from importlib.metadata import Distribution, distribution
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from cachekit.cli.output import say
from cachekit.errors import CachekitError

#: Where the files of projects are: those of each kind of project, and those that all have.
_SCAFFOLDS = Path(__file__).with_name("scaffolds")
_SUFFIX = ".in"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
#: How pip calls cachekit.
DISTRIBUTION = "cachekit-diffusion"
#: What comes before the command that installs a project.
_NEEDED = """With cachekit installed (`cachekit-diffusion` for pip, which is on no package index: from a clone, a wheel,
or the address of a git repository):"""
#: Sentences for the README on where the workflow gets cachekit from, unless the author sets a variable.
_BY_DEFAULT = "By default that is `{}`."
_WITHOUT = "This project was made with a cachekit that came from a folder, so that the address is for you to set."

Name = Annotated[str, typer.Argument(help="Name in specs: lower case, digits, underscores.")]
Output = Annotated[Path | None, typer.Option(help="Folder to write; default: cachekit-NAME, here.")]


def new_policy(
    name: Name,
    output: Output = None,
    schedule: Annotated[bool, typer.Option("--schedule", help="Write a schedule instead, for when=.")] = False,
    stand_in: Annotated[bool, typer.Option("--stand-in", help="Write a stand-in instead, for what=.")] = False,
) -> None:
    """Write the project of a policy, or of a schedule or stand-in: code, tests, README and CI file."""
    if schedule and stand_in:
        raise CachekitError("new-policy: --schedule and --stand-in exclude each other; write two projects")
    kind = "schedule" if schedule else "stand_in" if stand_in else "policy"
    _write(kind, name, output)


def new_adapter(name: Name, output: Output = None) -> None:
    """Write the project of an adapter, with a small denoiser that isn't one of diffusers as its example."""
    _write("adapter", name, output)


def _write(kind: str, name: str, output: Path | None) -> None:
    _refuse_name(kind, name)
    folder = output or Path(f"cachekit-{name.replace('_', '-')}")
    if folder.exists():
        raise CachekitError(f"{str(folder)!r} exists already; give another folder as --output")
    for path, text in sorted(_files(kind, name).items()):
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        except OSError as error:
            raise CachekitError(f"cannot write {str(target)!r}: {error.strerror}; give another path") from error
    say(f"wrote {folder}")
    say(f"next: cd {folder} && pip install -e '.[test]' && pytest")


def _refuse_name(kind: str, name: str) -> None:
    """Raise `CachekitError` for a name that can't be one in specs, or that is taken."""
    from cachekit.registry.catalog import installed

    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise CachekitError(f"{kind} name {name!r}: write lower case, digits and underscores, a letter first")
    catalog = installed()
    taken: dict[str, Container[str]] = {
        "policy": catalog.policies,
        "schedule": catalog.schedules,
        "stand_in": catalog.stand_ins,
        "adapter": catalog.adapters,
    }
    if name in taken[kind]:
        raise CachekitError(f"{kind} name {name!r} is taken by an installed plugin; choose another")


def _address(installed: Distribution) -> str:
    """Find what pip can install this cachekit from on any machine; "" where it came from a folder or a file."""
    record = json.loads(installed.read_text("direct_url.json") or "{}")
    url, commit = record.get("url", ""), record.get("vcs_info", {}).get("commit_id", "")
    is_public = url.startswith("https://") and "@" not in url
    return f"{DISTRIBUTION} @ git+{url}@{commit}" if commit and is_public else ""


def _versions(installed: Distribution) -> str:
    """Bound the versions of cachekit: from the installed minor version to the next."""
    major, minor = re.findall(r"\d+", installed.version)[:2]
    return f">={major}.{minor},<{major}.{int(minor) + 1}"


def _files(kind: str, name: str) -> dict[Path, str]:
    """Make the text of each file of a project, by path; what all projects have of a file follows the project's own."""
    package, here = f"cachekit_{name}", distribution(DISTRIBUTION)
    address = _address(here)
    words = {
        "name": name,
        "package": package,
        "distribution": package.replace("_", "-"),
        "Class": "".join(part.capitalize() for part in name.split("_")),
        "kind": kind.replace("_", "-"),
        "address": address,
        "versions": _versions(here),
        "needed": _NEEDED,
        "source": _BY_DEFAULT.format(address) if address else _WITHOUT,
    }
    found: dict[Path, str] = {}
    for folder in (kind, "common"):
        root = _SCAFFOLDS / folder
        for source in root.rglob(f"*{_SUFFIX}"):
            path = str(source.relative_to(root)).removesuffix(_SUFFIX).replace("PACKAGE", package).replace("NAME", name)
            found[Path(path)] = found.get(Path(path), "") + Template(source.read_text()).substitute(words)
    return found
