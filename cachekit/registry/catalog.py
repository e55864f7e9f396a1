"""Find plugins by entry point, and hold what they register in one immutable, checked catalog."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import pluggy

from cachekit.errors import GROUP, AdapterError, ConflictError, PluginError, PluginWarning, nearest
from cachekit.interface.adapter import Adapter
from cachekit.interface.parts import Part, Schedule, StandIn, Where
from cachekit.interface.policy import PARTS, Policy
from cachekit.interface.presets import WORD
from cachekit.interface.specs import is_name
from cachekit.parts import registration
from cachekit.planning.plan import Plan
from cachekit.registry import hookspecs, notices
from cachekit.registry.guarding import GuardedAdapter

#: The environment variable with the names of plugins that are not loaded, separated by commas.
DISABLE = "CACHEKIT_DISABLE"
#: The name under which cachekit registers its own parts.
BUILT_IN = "parts"
#: The distributions whose names no plugin can take.
_OWN = ("cachekit", "cachekit-diffusion")
_UNKNOWN = "an unknown distribution"


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
    """The policies, parts and adapters that plugins have registered, by name: the vocabulary of specs.

    `places`, `schedules` and `stand_ins` are the parts: what `where=`, `when=` and `what=` can be. `owners` maps each
    of them all, as "policy 'tgate'" or "schedule 'every'", to the plugin that registered it. `plugins`
    maps each loaded plugin to its distribution, and `failures` has those that could not be loaded. `clashes` has a line
    for each name that several plugins have registered, as "policy 'calm'": it stands for none of theirs. `apply` takes
    the catalog of everything installed unless it is given another. A catalog is never changed, so copies of a model
    share it.

    >>> catalog = installed()
    >>> catalog.schedules["every"].summary, catalog.owners["schedule 'every'"]
    ('full every n steps', 'parts')
    """

    policies: dict[str, type[Policy]]
    places: dict[str, type[Where]]
    schedules: dict[str, type[Schedule]]
    stand_ins: dict[str, type[StandIn]]
    adapters: dict[str, Adapter]
    owners: dict[str, str]
    plugins: dict[str, str]
    failures: tuple[Failure, ...]
    clashes: dict[str, str]
    manager: pluggy.PluginManager = field(repr=False)

    def adapter_for(self, denoiser: Any) -> Adapter:
        """Find the one adapter that matches `denoiser`, a `torch.nn.Module`.

        Raises `AdapterError` where none does, or more than one, and `PluginError` where an adapter raises, as do the
        methods of what is returned.
        """
        found = [adapter for adapter in map(self._guarded, self.adapters.values()) if adapter.matches(denoiser)]
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

        Raises `PluginError` where a plugin raises, or returns anything else.
        """
        for plugin, call in self._calls("cachekit_check_plan"):
            try:
                answers = call(plan=plan)
            except Exception as error:
                raise PluginError(self._failed(plugin, "cachekit_check_plan", error)) from error
            for reasons in answers:
                if not isinstance(reasons, (list, tuple)) or not all(isinstance(reason, str) for reason in reasons):
                    wrong = TypeError(f"it returned {reasons!r}, which is not a list of texts")
                    raise PluginError(self._failed(plugin, "cachekit_check_plan", wrong))
                for reason in reasons:
                    raise ConflictError(reason)

    def run_finished(self, report: Any) -> None:
        """Pass the report of a finished run to every plugin; one that raises causes a warning, as the images exist."""
        for plugin, call in self._calls("cachekit_run_finished"):
            try:
                call(report=report)
            except Exception as error:  # noqa: BLE001 - a plugin must not cost the user an image
                warnings.warn(self._failed(plugin, "cachekit_run_finished", error), PluginWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Catalog:
        """Share the catalog: it is never changed."""
        return self

    def _guarded(self, adapter: Adapter) -> GuardedAdapter:
        plugin = self.owners.get(f"adapter {adapter.name!r}", adapter.name)
        return GuardedAdapter(adapter, plugin, self.plugins.get(plugin, _UNKNOWN), _remedy(plugin))

    def _failed(self, plugin: str, hook: str, error: Exception) -> str:
        source = self.plugins.get(plugin, _UNKNOWN)
        return f"plugin {plugin!r} of {source} failed in {hook}: {_one_line(error)} {_remedy(plugin)}"

    def _calls(self, hook: str) -> Iterator[tuple[str, Callable[..., list[Any]]]]:
        """Yield each plugin with this hook, sorted by name, and a caller of it alone: an error then has one origin."""
        found = {impl.plugin_name: impl.plugin for impl in getattr(self.manager.hook, hook).get_hookimpls()}
        for name in sorted(found):
            yield name, _alone(self.manager, hook, found[name])


@functools.cache
def installed() -> Catalog:
    """Build the catalog of everything installed, once; warn of each plugin that failed to load and of each clash.

    It can be given to what takes a `catalog`, and knows each policy's class:

        cachekit.installed().policies["tgate"].model_fields
    """
    disabled = [name for name in map(str.strip, os.environ.get(DISABLE, "").split(",")) if name]
    points = entry_points(group=GROUP)
    catalog = build(points, disabled)
    known = sorted({point.name for point in points})
    for name in (name for name in disabled if name not in known):
        warnings.warn(
            f"CACHEKIT_DISABLE names {name!r}, which is no plugin{nearest(name, known)}; plugins: {', '.join(known)}",
            PluginWarning,
            stacklevel=2,
        )
    for line in (*map(str, catalog.failures), *catalog.clashes.values()):
        warnings.warn(line, PluginWarning, stacklevel=2)
    return catalog


def build(points: Iterable[EntryPoint], disabled: Iterable[str] = ()) -> Catalog:
    """Build the catalog of these entry points; a plugin that fails is recorded and left out.

    A name that two plugins register is left out too. What ships is registered first, and keeps its names.
    """
    manager = pluggy.PluginManager("cachekit")
    manager.add_hookspecs(hookspecs)
    manager.register(notices, name="notices")
    manager.register(registration, name=BUILT_IN)
    plugins: dict[str, str] = {BUILT_IN: "cachekit"}
    failures: list[Failure] = []
    for point in sorted(points, key=lambda point: (_distribution(point) not in _OWN, point.name)):
        if point.name in set(disabled):
            continue
        reason = _load(manager, point)
        if reason:
            failures.append(Failure(point.name, _distribution(point), reason))
        else:
            plugins[point.name] = _distribution(point)
    registry = _Registry(plugins)
    failures += registry.collect(manager)
    return Catalog(
        **registry.found,
        owners={what: plugin for what, plugin in registry.owners.items() if what not in registry.clashes},
        plugins=plugins,
        failures=tuple(failures),
        clashes=registry.clashes,
        manager=manager,
    )


class _Registry:
    """What plugins have passed to their `register` callback so far, checked."""

    def __init__(self, plugins: dict[str, str]) -> None:
        #: The distribution of each plugin.
        self.plugins = plugins
        #: What has been registered, by the field of the catalog and by name.
        self.found: dict[str, dict[str, Any]] = {kind.field: {} for kind in _KINDS}
        self.owners: dict[str, str] = {}
        self.clashes: dict[str, str] = {}

    def collect(self, manager: pluggy.PluginManager) -> list[Failure]:
        """Collect from each plugin; one that fails is unregistered, and moves from `plugins` to the failures."""
        failures = []
        for name, distribution in list(self.plugins.items()):
            module = manager.get_plugin(name)
            try:
                self._register_all(manager, module, name)
            except Exception as error:  # noqa: BLE001 - whatever a plugin raises must not take the others down
                manager.unregister(name=name)
                del self.plugins[name]
                failures.append(Failure(name, distribution, _one_line(error)))
        return failures

    def _register_all(self, manager: pluggy.PluginManager, module: Any, plugin: str) -> None:
        registered: dict[str, list[Any]] = {}
        # One plugin at a time, so that the owner of each name is certain.
        for kind in _KINDS:
            registered[kind.field] = []
            _alone(manager, f"cachekit_register_{kind.field}", module)(register=registered[kind.field].append)
        for kind in _KINDS:
            for one in registered[kind.field]:
                _check(one, kind)
        claims = [(kind, one) for kind in _KINDS for one in registered[kind.field]]
        self._refuse_taken([_claimed(*claim) for claim in claims])
        for kind, one in claims:
            self._own(kind, one, plugin)

    def _refuse_taken(self, claimed: list[str]) -> None:
        for what in claimed:
            if claimed.count(what) > 1:
                raise ValueError(f"{what} is registered twice; rename one")
            if what in self.owners and self.plugins[self.owners[what]] in _OWN:
                raise ValueError(f"{what} ships with cachekit; choose another name")

    def _own(self, kind: _Kind, one: Any, plugin: str) -> None:
        what = _claimed(kind, one)
        if what not in self.owners:
            self.owners[what] = plugin
            self.found[kind.field][one.name] = one
            return
        # Neither is taken: which of them a spec means can't be known.
        self.found[kind.field].pop(one.name, None)
        first, second = (f"plugin {name!r} of {self.plugins[name]}" for name in (self.owners[what], plugin))
        line = f"{what} is registered by {first} and by {second}; uninstall one or set {DISABLE}={plugin}"
        self.clashes.setdefault(what, line)


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


class _Kind(NamedTuple):
    """A kind of thing that plugins register: the field of the catalog, its noun, and its base class if it has one."""

    field: str
    noun: str
    base: type[Part] | None = None
    #: The method that gives it a meaning.
    method: str = ""


def _claimed(kind: _Kind, one: Any) -> str:
    return f"{kind.noun} {one.name!r}"


_KINDS = (
    _Kind("policies", "policy", Policy, "choices"),
    _Kind("places", "place", Where, "find"),
    _Kind("schedules", "schedule", Schedule),
    _Kind("stand_ins", "stand-in", StandIn),
    _Kind("adapters", "adapter"),
)


def _check(registered: Any, kind: _Kind) -> None:
    """Refuse what is no class of its kind, or would never work: a bad name, missing methods, misspelt ones."""
    if kind.base is None:
        _refuse_half_adapter(registered)
        return
    if not (isinstance(registered, type) and issubclass(registered, kind.base)):
        raise TypeError(f"{registered!r} is not a subclass of cachekit.{kind.base.__name__}")
    name = registered.__name__
    if not is_name(registered.name):
        raise ValueError(f"{name}.name is {registered.name!r}; use lower case, digits and underscores")
    if registered.name == WORD:
        raise ValueError(f"{name}.name is {WORD!r}, which stands for files of specs; use another")
    needed = {Schedule: ("full", "action"), StandIn: ("weights", "predict")}.get(kind.base, (kind.method,))
    if all(getattr(registered, method) is getattr(kind.base, method) for method in needed):
        raise ValueError(f"{name} has no {' or '.join(needed)}; write it")
    _refuse_misspelt(registered, kind.base)


def _refuse_half_adapter(registered: Any) -> None:
    """Refuse what lacks a part of an adapter: it would fail for each denoiser that is looked up."""
    if isinstance(registered, type):
        raise TypeError(f"{registered!r} is a class; register an instance, as in {registered.__name__}()")
    texts = [name for name in ("name", "summary") if not isinstance(getattr(registered, name, None), str)]
    methods = [name for name in ("matches", "sites", "layout") if not callable(getattr(registered, name, None))]
    if texts or methods:
        raise TypeError(f"{registered!r} has no {' or '.join([*texts, *methods])}; an adapter has them all")


def _refuse_misspelt(registered: type[Part], base: type[Part]) -> None:
    """Refuse class variables and methods that are nearly those of the base class: nothing would ever read them."""
    known = [name for name in dir(base) if not name.startswith(("_", "model_"))]
    for name, value in vars(registered).items():
        if name.startswith("_") or name in known or name in registered.model_fields or name in PARTS:
            continue
        suggestion = nearest(name, known)
        if suggestion and not isinstance(value, property):
            raise ValueError(f"{registered.__name__}.{name} means nothing to cachekit{suggestion}; rename it")


def _alone(manager: pluggy.PluginManager, hook: str, plugin: Any) -> Callable[..., list[Any]]:
    """Make a caller of one plugin's implementation of a hook."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    return manager.subset_hook_caller(hook, others)


def _remedy(plugin: str) -> str:
    return f"(fix or uninstall it, or set {DISABLE}={plugin})"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else _UNKNOWN
