"""`cachekit doctor`: checks of the installation."""

from __future__ import annotations

import importlib
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import typer

from cachekit.cli.output import JsonFile, json_results, say
from cachekit.errors import CachekitError

_LIBRARIES = ("torch", "diffusers", "transformers", "pluggy", "pydantic")


def doctor(json_file: JsonFile = None) -> None:
    """Check versions, plugins and the embedded model; exit with code 1 where a check fails."""
    from cachekit.version import __version__

    lines: list[Line] = []
    with json_results(json_file) as give:
        for line in (_found(f"python {platform.python_version()}"), _found(f"cachekit {__version__}"), *_checked()):
            say(f"{'ok' if line.ok else 'FAILED':8}{line.text}")
            lines.append(line)
        give([asdict(line) for line in lines])
    raise typer.Exit(0 if all(line.ok for line in lines) else 1)


@dataclass(frozen=True)
class Line:
    """One check."""

    ok: bool
    text: str


def _found(text: str) -> Line:
    return Line(True, text)


def _failed(reason: str) -> Line:
    return Line(False, " ".join(reason.split()))


def _checked() -> Iterator[Line]:
    """Make every check, even after one has failed."""
    yield from map(_library, _LIBRARIES)
    yield from _plugins()
    yield from _weights()


def _library(name: str) -> Line:
    try:
        importlib.import_module(name)
        return _found(f"{name} {version(name)}")
    except (ImportError, PackageNotFoundError, OSError) as error:
        return _failed(f"{name}: {error}")


def _plugins() -> Iterator[Line]:
    from cachekit.registry.catalog import installed

    try:
        with warnings.catch_warnings():
            # The failures are printed below.
            warnings.simplefilter("ignore")
            catalog = installed()
    except CachekitError as error:
        yield _failed(str(error))
        return
    for plugin, distribution in sorted(catalog.plugins.items()):
        owned = ", ".join(what for what, owner in sorted(catalog.owners.items()) if owner == plugin)
        yield _found(f"plugin {plugin} of {distribution}: {owned or 'registers nothing'}")
    for reason in (*map(str, catalog.failures), *catalog.clashes.values()):
        yield _failed(reason)


def _weights() -> Iterator[Line]:
    from cachekit.models.demo.pipeline import WEIGHTS, WeightsError, verify

    folders = sorted(path for path in WEIGHTS.glob("*") if path.is_dir())
    if not folders:
        yield _failed("demo model: no weights; reinstall cachekit")
    for folder in folders:
        try:
            verify(folder)
            yield _found(f"demo model {folder.name}: every file has its SHA-256")
        except WeightsError as error:
            yield _failed(str(error))
