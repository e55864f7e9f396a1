"""Apply composable, undoable and measurable caching policies to diffusion pipelines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .adapter import Layout as Layout
    from .catalog import Catalog as Catalog
    from .demo import demo_pipeline as demo_pipeline
    from .engine import Attachment as Attachment
    from .engine import apply as apply
    from .engine import remove as remove
    from .errors import CachekitError as CachekitError
    from .estimating import Estimate as Estimate
    from .estimating import estimate as estimate
    from .guidance import Observation as Observation
    from .hookspecs import hookimpl as hookimpl
    from .listing import adapters as adapters
    from .listing import policies as policies
    from .policy import Action as Action
    from .policy import BranchChange as BranchChange
    from .policy import Moment as Moment
    from .policy import Policy as Policy
    from .sites import GUIDANCE as GUIDANCE
    from .sites import Kind as Kind
    from .sites import Region as Region
    from .sites import Site as Site
    from .sites import SiteMap as SiteMap

__version__ = "0.1.0"

_HOME = {
    "Action": "policy",
    "Adapter": "adapter",
    "Attachment": "engine",
    "BranchChange": "policy",
    "CachekitError": "errors",
    "Catalog": "catalog",
    "Estimate": "estimating",
    "GUIDANCE": "sites",
    "Kind": "sites",
    "Layout": "adapter",
    "Moment": "policy",
    "Observation": "guidance",
    "Policy": "policy",
    "Region": "sites",
    "Site": "sites",
    "SiteMap": "sites",
    "adapters": "listing",
    "apply": "engine",
    "demo_pipeline": "demo",
    "estimate": "estimating",
    "hookimpl": "hookspecs",
    "policies": "listing",
    "remove": "engine",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: importing cachekit loads neither torch nor diffusers."""
    if name not in _HOME:
        raise AttributeError(f"module 'cachekit' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
