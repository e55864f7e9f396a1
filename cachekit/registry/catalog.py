"""Find plugins by entry point, and hold what they register in one immutable, checked catalog."""

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

#: The group of entry points that name plugins.
GROUP = "cachekit"
#: The environment variable with the names of plugins that are not loaded, separated by commas.
DISABLE = "CACHEKIT_DISABLE"


@dataclass(frozen=True)
class Failure:
    """A plugin that failed to load: its name, its distribution, and the reason in one line."""

    plugin: str
    distribution: str
    reason: str

    def __str__(self) -> str:
        """Describe the failure in one line, with what to do about it."""
        return f"plugin {self.plugin!r} of {self.distribution} failed to load: {self.reason} {_remedy(self.plugin)}"


@dataclass(frozen=True)
class Catalog:
    """The policies and adapters that plugins have registered, by name.

    `owners` maps each of them, as "policy 'tgate'" or "adapter 'unet'", to the plugin that registered it. `plugins`
    maps each loaded plugin to its distribution, and `failures` has those that could not be loaded. `apply` takes the
    catalog of everything installed unless it is given another. A catalog is never changed, so copies of a model
    share it.
    """

    policies: dict[str, type[Policy]]
    adapters: dict[str, Adapter]
    owners: dict[str, str]
    plugins: dict[str, str]
    failures: tuple[Failure, ...]
    manager: pluggy.PluginManager = field(repr=False)

    def adapter_for(self, denoiser: Any) -> Adapter:
        """Find the one adapter that matches `denoiser`, a `torch.nn.Module`.

        Raises `AdapterError` where none does, or more than one, and `PluginError` where an adapter raises.
        """
        found = [adapter for adapter in self.adapters.values() if self._matches(adapter, denoiser)]
        name = type(denoiser).__name__
        if not found:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise AdapterError(f"no adapter matches {name}; adapters: {known}; install or write one that does")
        if len(found) > 1:
            names = " and ".join(repr(adapter.name) for adapter in found)
            raise AdapterError(f"adapters {names} both match {name}; disable one with {DISABLE}=its plugin")
        return found[0]

    def check_plan(self, plan: Plan) -> None:
        """Raise `ConflictError` with the first reason that a plugin gives against `plan`, if there is any.

        Raises `PluginError` where a plugin raises.
        """
        for plugin, call in self._calls("cachekit_check_plan"):
            try:
                answers = call(plan=plan)
            except Exception as error:
                raise PluginError(_failed(plugin, "cachekit_check_plan", error)) from error
            for reason in (reason for reasons in answers for reason in reasons):
                raise ConflictError(reason)

    def run_finished(self, report: Any) -> None:
        """Pass the report of a finished run to every plugin; one that raises causes a warning, as the images exist."""
        for plugin, call in self._calls("cachekit_run_finished"):
            try:
                call(report=report)
            except Exception as error:  # noqa: BLE001 - a plugin must not cost the user an image
                warnings.warn(_failed(plugin, "cachekit_run_finished", error), PluginWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Catalog:
        """Share the catalog: it is never changed."""
        return self

    def _matches(self, adapter: Adapter, denoiser: Any) -> bool:
        try:
            return adapter.matches(denoiser)
        except Exception as error:
            plugin = self.owners.get(f"adapter {adapter.name!r}", adapter.name)
            raise PluginError(_failed(plugin, f"its adapter {adapter.name!r}", error)) from error

    def _calls(self, hook: str) -> Iterator[tuple[str, Callable[..., list[Any]]]]:
        """Yield each plugin with this hook, sorted by name, and a caller of it alone: an error then has one origin."""
        found = {impl.plugin_name: impl.plugin for impl in getattr(self.manager.hook, hook).get_hookimpls()}
        for name in sorted(found):
            yield name, _alone(self.manager, hook, found[name])


@functools.cache
def installed() -> Catalog:
    """Build the catalog of everything installed, once; warn of each plugin that failed to load."""
    disabled = [name.strip() for name in os.environ.get(DISABLE, "").split(",")]
    catalog = build(entry_points(group=GROUP), disabled)
    for failure in catalog.failures:
        warnings.warn(str(failure), PluginWarning, stacklevel=2)
    return catalog


def build(points: Iterable[EntryPoint], disabled: Iterable[str] = ()) -> Catalog:
    """Build the catalog of these entry points; a plugin that fails is recorded and left out.

    Raises `PluginError` where two plugins register the same name.
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


class _Registry:
    """What plugins have passed to their `register` callback so far, checked."""

    def __init__(self) -> None:
        self.policies: dict[str, type[Policy]] = {}
        self.adapters: dict[str, Adapter] = {}
        self.owners: dict[str, str] = {}

    def collect(self, manager: pluggy.PluginManager, plugins: dict[str, str]) -> list[Failure]:
        """Collect from each plugin; one that fails is unregistered, and moves from `plugins` to the failures."""
        failures = []
        for name, distribution in list(plugins.items()):
            module = manager.get_plugin(name)
            try:
                self._register_all(manager, module, name)
            except PluginError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a plugin raises must not take the others down
                manager.unregister(name=name)
                del plugins[name]
                failures.append(Failure(name, distribution, _one_line(error)))
        return failures

    def _register_all(self, manager: pluggy.PluginManager, module: Any, plugin: str) -> None:
        policies: list[type[Policy]] = []
        adapters: list[Adapter] = []
        # One plugin at a time, so that the owner of each name is certain.
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


def _load(manager: pluggy.PluginManager, point: EntryPoint) -> str:
    """Import and register a plugin; return the reason why it failed, or an empty string."""
    module = None
    try:
        module = point.load()
        manager.register(module, name=point.name)
        manager.check_pending()
    except Exception as error:  # noqa: BLE001 - whatever a plugin raises must not take the others down
        # The name may belong to another plugin, which stays.
        if module is not None and manager.get_plugin(point.name) is module:
            manager.unregister(name=point.name)
        return _one_line(error)
    return ""


def _check_policy(policy: Any) -> None:
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise TypeError(f"{policy!r} is not a subclass of cachekit.Policy")
    if not is_name(policy.name):
        raise ValueError(f"{policy.__name__}.name is {policy.name!r}; use lower case, digits and underscores")
    if not policy.kinds:
        raise ValueError(f"{policy.__name__}.kinds is empty; name the kinds of sites that it acts on")


def _alone(manager: pluggy.PluginManager, hook: str, plugin: Any) -> Callable[..., list[Any]]:
    """Make a caller of one plugin's implementation of a hook."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    return manager.subset_hook_caller(hook, others)


def _failed(plugin: str, hook: str, error: Exception) -> str:
    return f"plugin {plugin!r} failed in {hook}: {_one_line(error)} {_remedy(plugin)}"


def _remedy(plugin: str) -> str:
    return f"(fix or uninstall it, or set {DISABLE}={plugin})"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"
