"""`cachekit doctor`: checks of the installation."""

from __future__ import annotations

import importlib
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

import typer

from cachekit.cli.output import say

_LIBRARIES = ("torch", "diffusers", "transformers", "pluggy", "pydantic")


def doctor() -> None:
    """Check versions, plugins and the embedded model; exit with code 1 where a check fails."""
    from cachekit.version import __version__

    say(f"ok      python {platform.python_version()}")
    say(f"ok      cachekit {__version__}")
    # A list, so that every check runs even after one has failed.
    sound = [*map(_library, _LIBRARIES), _plugins(), _weights()]
    raise typer.Exit(0 if all(sound) else 1)


def _library(name: str) -> bool:
    try:
        importlib.import_module(name)
        say(f"ok      {name} {version(name)}")
    except (ImportError, PackageNotFoundError, OSError) as error:
        return _failed(f"{name}: {error}")
    return True


def _plugins() -> bool:
    from cachekit.registry.catalog import installed

    with warnings.catch_warnings():
        # The failures are printed below.
        warnings.simplefilter("ignore")
        catalog = installed()
    for plugin, distribution in sorted(catalog.plugins.items()):
        owned = ", ".join(what for what, owner in sorted(catalog.owners.items()) if owner == plugin)
        say(f"ok      plugin {plugin} of {distribution}: {owned or 'registers nothing'}")
    for reason in (*map(str, catalog.failures), *catalog.clashes.values()):
        _failed(reason)
    return not (catalog.failures or catalog.clashes)


def _weights() -> bool:
    from cachekit.models.demo.pipeline import WEIGHTS, WeightsError, verify

    folders = sorted(path for path in WEIGHTS.glob("*") if path.is_dir())
    if not folders:
        return _failed("demo model: no weights; reinstall cachekit")
    sound = True
    for folder in folders:
        try:
            verify(folder)
            say(f"ok      demo model {folder.name}: every file has its SHA-256")
        except WeightsError as error:
            sound = _failed(str(error))
    return sound


def _failed(reason: str) -> bool:
    say(f"FAILED  {' '.join(reason.split())}")
    return False
