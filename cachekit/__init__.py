"""Apply composable, undoable and measurable caching policies to diffusion pipelines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachekit.applying import apply as apply
    from cachekit.attaching.attachment import Attachment as Attachment
    from cachekit.attaching.removal import remove as remove
    from cachekit.costs.estimate import Estimate as Estimate
    from cachekit.costs.estimate import estimate as estimate
    from cachekit.errors import AdapterError as AdapterError
    from cachekit.errors import AttachmentError as AttachmentError
    from cachekit.errors import BudgetError as BudgetError
    from cachekit.errors import CachekitError as CachekitError
    from cachekit.errors import ConflictError as ConflictError
    from cachekit.errors import CostError as CostError
    from cachekit.errors import GuidanceError as GuidanceError
    from cachekit.errors import PluginError as PluginError
    from cachekit.errors import PluginWarning as PluginWarning
    from cachekit.errors import SiteError as SiteError
    from cachekit.errors import SpecError as SpecError
    from cachekit.interface.adapter import Adapter as Adapter
    from cachekit.interface.adapter import Layout as Layout
    from cachekit.interface.observation import Observation as Observation
    from cachekit.interface.policy import OPEN as OPEN
    from cachekit.interface.policy import Action as Action
    from cachekit.interface.policy import BranchChange as BranchChange
    from cachekit.interface.policy import Moment as Moment
    from cachekit.interface.policy import Policy as Policy
    from cachekit.interface.policy import Streams as Streams
    from cachekit.interface.sites import GUIDANCE as GUIDANCE
    from cachekit.interface.sites import Kind as Kind
    from cachekit.interface.sites import Region as Region
    from cachekit.interface.sites import Site as Site
    from cachekit.interface.sites import SiteMap as SiteMap
    from cachekit.interface.sites import Target as Target
    from cachekit.models.demo import demo_pipeline as demo_pipeline
    from cachekit.planning.plan import Plan as Plan
    from cachekit.registry.catalog import Catalog as Catalog
    from cachekit.registry.hookspecs import hookimpl as hookimpl
    from cachekit.registry.listing import adapters as adapters
    from cachekit.registry.listing import policies as policies
    from cachekit.reports.report import Report as Report
    from cachekit.upstream.attention import attends as attends
    from cachekit.upstream.attention import module_sites as module_sites
    from cachekit.upstream.compiling import without_compiler as without_compiler

__version__ = "0.1.0"

#: The module that defines each public name.
_HOMES = {
    "applying": ["apply"],
    "attaching.attachment": ["Attachment"],
    "attaching.removal": ["remove"],
    "costs.estimate": ["Estimate", "estimate"],
    "errors": [
        "AdapterError",
        "AttachmentError",
        "BudgetError",
        "CachekitError",
        "ConflictError",
        "CostError",
        "GuidanceError",
        "PluginError",
        "PluginWarning",
        "SiteError",
        "SpecError",
    ],
    "interface.adapter": ["Adapter", "Layout"],
    "interface.observation": ["Observation"],
    "interface.policy": ["OPEN", "Action", "BranchChange", "Moment", "Policy", "Streams"],
    "interface.sites": ["GUIDANCE", "Kind", "Region", "Site", "SiteMap", "Target"],
    "models.demo": ["demo_pipeline"],
    "planning.plan": ["Plan"],
    "registry.catalog": ["Catalog"],
    "registry.hookspecs": ["hookimpl"],
    "registry.listing": ["adapters", "policies"],
    "reports.report": ["Report"],
    "upstream.attention": ["attends", "module_sites"],
    "upstream.compiling": ["without_compiler"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Load a public name on first use: `import cachekit` loads neither torch nor diffusers."""
    if name not in _HOME:
        raise AttributeError(f"module 'cachekit' has no attribute {name!r}")
    value = getattr(import_module(f"cachekit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
