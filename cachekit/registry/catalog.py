"""Find plugins by entry point and hold what they registered, checked, in one immutable catalog."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from cachekit.errors import AdapterError, ConflictError, PluginError, PluginWarning
from cachekit.interface.adapter import Adapter
from cachekit.interface.policy import Policy
from cachekit.interface.specs import is_name
from cachekit.planning.plan import Plan
from cachekit.registry import hookspecs, notices

GROUP = "cachekit"
#: Names of plugins that are not loaded, separated by commas.
DISABLE = "CACHEKIT_DISABLE"


@dataclass(frozen=True)
class Failure:
    """Say which plugin failed to load, from which distribution, and why."""

    plugin: str
    distribution: str
    reason: str

    def __str__(self) -> str:
        """Return one line with the cure."""
        return f"plugin {self.plugin!r} of {self.distribution} failed to load: {self.reason} {_cure(self.plugin)}"


@dataclass(frozen=True)
class Catalog:
    """Hold policies and adapters by name, who registered them, and the plugins that failed."""

    policies: dict[str, type[Policy]]
    adapters: dict[str, Adapter]
    owners: dict[str, str]
    plugins: dict[str, str]
    failures: tuple[Failure, ...]
    manager: pluggy.PluginManager = field(repr=False)

    def adapter_for(self, denoiser: Any) -> Adapter:
        """Return the one adapter that knows `denoiser`; raise `AdapterError` for none or several."""
        found = [adapter for adapter in self.adapters.values() if self._knows(adapter, denoiser)]
        name = type(denoiser).__name__
        if not found:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise AdapterError(f"no adapter knows {name}; adapters: {known}; install or write one that does")
        if len(found) > 1:
            names = " and ".join(repr(adapter.name) for adapter in found)
            raise AdapterError(f"adapters {names} both know {name}; disable one with {DISABLE}=its plugin")
        return found[0]

    def _knows(self, adapter: Adapter, denoiser: Any) -> bool:
        try:
            return adapter.matches(denoiser)
        except Exception as error:
            plugin = self.owners.get(f"adapter {adapter.name!r}", adapter.name)
            raise PluginError(_failed(plugin, f"its adapter {adapter.name!r}", error)) from error

    def check_plan(self, plan: Plan) -> None:
        """Raise `ConflictError` with the first reason that a plugin gives against `plan`."""
        for plugin, call in self._calls("cachekit_check_plan"):
            try:
                answers = call(plan=plan)
            except Exception as error:
                raise PluginError(_failed(plugin, "cachekit_check_plan", error)) from error
            for reason in (reason for reasons in answers for reason in reasons):
                raise ConflictError(reason)

    def run_finished(self, report: Any) -> None:
        """Tell every plugin that a run has ended; one that fails is warned of, for the images are made."""
        for plugin, call in self._calls("cachekit_run_finished"):
            try:
                call(report=report)
            except Exception as error:  # noqa: BLE001 - a plugin must not cost the user an image
                warnings.warn(_failed(plugin, "cachekit_run_finished", error), PluginWarning, stacklevel=2)

    def _calls(self, hook: str) -> Iterator[tuple[str, Callable[..., list[Any]]]]:
        """Yield each plugin that has this hook, by name, with what calls it alone: so it is known who fails."""
        found = {impl.plugin_name: impl.plugin for impl in getattr(self.manager.hook, hook).get_hookimpls()}
        for name in sorted(found):
            yield name, _alone(self.manager, hook, found[name])


def build(points: Iterable[EntryPoint], disabled: Iterable[str] = ()) -> Catalog:
    """Return the catalog of these entry points; a plugin that fails is recorded and left out.

    Raise `PluginError` where two plugins register the same name.
    """
    manager = pluggy.PluginManager("cachekit")
    manager.add_hookspecs(hookspecs)
    manager.register(notices, name="notices")
    plugins: dict[str, str] = {}
    failures: list[Failure] = []
    for point in sorted(points, key=lambda point: point.name):
        if point.name in set(disabled):
            continue
        reason = _load(manager, point)
        if reason:
            failures.append(Failure(point.name, _distribution(point), reason))
        else:
            plugins[point.name] = _distribution(point)
    registry = _Registry()
    failures += registry.collect(manager, plugins)
    return Catalog(registry.policies, registry.adapters, registry.owners, plugins, tuple(failures), manager)


@functools.cache
def installed() -> Catalog:
    """Return the catalog of everything installed, built once; warn of each plugin that failed."""
    disabled = [name.strip() for name in os.environ.get(DISABLE, "").split(",")]
    catalog = build(entry_points(group=GROUP), disabled)
    for failure in catalog.failures:
        warnings.warn(str(failure), PluginWarning, stacklevel=2)
    return catalog


def _load(manager: pluggy.PluginManager, point: EntryPoint) -> str:
    module = None
    try:
        module = point.load()
        manager.register(module, name=point.name)
        manager.check_pending()
    except Exception as error:  # noqa: BLE001 - whatever a plugin raises must not take the others down
        # Another plugin may own the name: that one stays.
        if module is not None and manager.get_plugin(point.name) is module:
            manager.unregister(name=point.name)
        return _one_line(error)
    return ""


def _alone(manager: pluggy.PluginManager, hook: str, plugin: Any) -> Callable[..., list[Any]]:
    others = [other for other in manager.get_plugins() if other is not plugin]
    return manager.subset_hook_caller(hook, others)


def _failed(plugin: str, hook: str, error: Exception) -> str:
    return f"plugin {plugin!r} failed in {hook}: {_one_line(error)} {_cure(plugin)}"


def _cure(plugin: str) -> str:
    return f"(mend or uninstall it, or set {DISABLE}={plugin})"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


class _Registry:
    """Check and remember what plugins hand to their `register` callback."""

    def __init__(self) -> None:
        self.policies: dict[str, type[Policy]] = {}
        self.adapters: dict[str, Adapter] = {}
        self.owners: dict[str, str] = {}

    def collect(self, manager: pluggy.PluginManager, plugins: dict[str, str]) -> list[Failure]:
        failures = []
        for name, distribution in list(plugins.items()):
            module = manager.get_plugin(name)
            try:
                self._ask(manager, module, name)
            except PluginError:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                manager.unregister(name=name)
                del plugins[name]
                failures.append(Failure(name, distribution, _one_line(error)))
        return failures

    def _ask(self, manager: pluggy.PluginManager, module: Any, plugin: str) -> None:
        policies: list[type[Policy]] = []
        adapters: list[Adapter] = []
        # One plugin at a time, so that the registry knows who registers what.
        _alone(manager, "cachekit_register_policies", module)(register=policies.append)
        _alone(manager, "cachekit_register_adapters", module)(register=adapters.append)
        for policy in policies:
            _check_policy(policy)
        for policy in policies:
            self._own(f"policy {policy.name!r}", plugin)
            self.policies[policy.name] = policy
        for adapter in adapters:
            self._own(f"adapter {adapter.name!r}", plugin)
            self.adapters[adapter.name] = adapter

    def _own(self, what: str, plugin: str) -> None:
        if what in self.owners:
            raise PluginError(
                f"{what} is registered by plugin {self.owners[what]!r} and by plugin {plugin!r};"
                f" uninstall one or set {DISABLE}={plugin}"
            )
        self.owners[what] = plugin


def _check_policy(policy: Any) -> None:
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise TypeError(f"{policy!r} is not a subclass of cachekit.Policy")
    if not is_name(policy.name):
        raise ValueError(f"{policy.__name__}.name is {policy.name!r}; use lower case, digits and underscores")
    if not policy.kinds:
        raise ValueError(f"{policy.__name__}.kinds is empty; name the kinds of sites that it acts on")
