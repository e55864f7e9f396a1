"""Call adapters of plugins: what one raises, and answers that are none, become errors of one line that name it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cachekit.errors import CachekitError, PluginError
from cachekit.interface.adapter import Adapter, Layout
from cachekit.interface.sites import SiteMap

_Answer = TypeVar("_Answer")


class GuardedAdapter:
    """An adapter whose methods raise `PluginError` for what the plugin's own code raises, or returns wrongly.

    `remedy` is what a user can do about it.
    """

    def __init__(self, adapter: Adapter, plugin: str, distribution: str, remedy: str) -> None:
        """Guard an adapter that `plugin` has registered."""
        self.name, self.summary = adapter.name, adapter.summary
        self._adapter, self._plugin, self._distribution, self._remedy = adapter, plugin, distribution, remedy

    def matches(self, denoiser: Any) -> bool:
        """Whether the adapter serves a denoiser."""
        return self._answer("matches", lambda one: bool(self._adapter.matches(one)), denoiser, bool)

    def sites(self, denoiser: Any) -> SiteMap:
        """Find the sites of a denoiser."""
        return self._answer("sites", self._adapter.sites, denoiser, SiteMap)

    def layout(self, denoiser: Any) -> Layout:
        """Describe how guidance branches reach a denoiser."""
        return self._answer("layout", self._adapter.layout, denoiser, Layout)

    def _answer(self, method: str, ask: Callable[[Any], object], denoiser: Any, wanted: type[_Answer]) -> _Answer:
        where = f"{method} of its adapter {self.name!r} for {type(denoiser).__name__}"
        try:
            found = ask(denoiser)
        except CachekitError:
            raise
        except Exception as error:
            raise self._failed(where, " ".join(f"{type(error).__name__}: {error}".split())) from error
        if not isinstance(found, wanted):
            raise self._failed(where, f"it returned {found!r}, which is no {wanted.__name__}")
        return found

    def _failed(self, where: str, reason: str) -> PluginError:
        return PluginError(
            f"plugin {self._plugin!r} of {self._distribution} failed in {where}: {reason} {self._remedy}"
        )
