"""Apply composable, undoable and measurable caching policies to diffusion pipelines.

Users of a pipeline need `apply` and what it returns, an `Attachment`; `remove`, `attachment` and `sites`; `estimate`,
`calibrate` and `tune`; `policies` and `adapters`, which list what is installed; and `demo_pipeline`, to try them on.
All other names are for writing policies and adapters.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cachekit.version import __version__ as __version__

if TYPE_CHECKING:
    from cachekit.applying import apply as apply
    from cachekit.applying import attachment as attachment
    from cachekit.applying import sites as sites
    from cachekit.attaching.attachment import Attachment as Attachment
    from cachekit.attaching.removal import remove as remove
    from cachekit.costs.estimate import Estimate as Estimate
    from cachekit.costs.estimate import estimate as estimate
    from cachekit.errors import AdapterError as AdapterError
    from cachekit.errors import AttachmentError as AttachmentError
    from cachekit.errors import BudgetError as BudgetError
    from cachekit.errors import CachekitError as CachekitError
    from cachekit.errors import CalibrationError as CalibrationError
    from cachekit.errors import ConflictError as ConflictError
    from cachekit.errors import CostError as CostError
    from cachekit.errors import GuidanceError as GuidanceError
    from cachekit.errors import IdleWarning as IdleWarning
    from cachekit.errors import PluginError as PluginError
    from cachekit.errors import PluginWarning as PluginWarning
    from cachekit.errors import PolicyError as PolicyError
    from cachekit.errors import PresetError as PresetError
    from cachekit.errors import PresetWarning as PresetWarning
    from cachekit.errors import SiteError as SiteError
    from cachekit.errors import SpecError as SpecError
    from cachekit.interface.adapter import Adapter as Adapter
    from cachekit.interface.adapter import Layout as Layout
    from cachekit.interface.beginning import Beginning as Beginning
    from cachekit.interface.indicators import Accumulating as Accumulating
    from cachekit.interface.indicators import Indicator as Indicator
    from cachekit.interface.indicators import Signal as Signal
    from cachekit.interface.indicators import relative_change as relative_change
    from cachekit.interface.moment import OPEN as OPEN
    from cachekit.interface.moment import Action as Action
    from cachekit.interface.moment import Entry as Entry
    from cachekit.interface.moment import History as History
    from cachekit.interface.moment import Moment as Moment
    from cachekit.interface.moment import Open as Open
    from cachekit.interface.moment import Streams as Streams
    from cachekit.interface.moment import Time as Time
    from cachekit.interface.observation import Observation as Observation
    from cachekit.interface.parts import BranchChange as BranchChange
    from cachekit.interface.parts import Choice as Choice
    from cachekit.interface.parts import Schedule as Schedule
    from cachekit.interface.parts import StandIn as StandIn
    from cachekit.interface.parts import Where as Where
    from cachekit.interface.parts import combine as combine
    from cachekit.interface.policy import Policy as Policy
    from cachekit.interface.presets import Preset as Preset
    from cachekit.interface.sites import DENOISER as DENOISER
    from cachekit.interface.sites import GUIDANCE as GUIDANCE
    from cachekit.interface.sites import LAYERS as LAYERS
    from cachekit.interface.sites import Kind as Kind
    from cachekit.interface.sites import Region as Region
    from cachekit.interface.sites import Site as Site
    from cachekit.interface.sites import SiteMap as SiteMap
    from cachekit.interface.sites import Target as Target
    from cachekit.models.demo import demo_pipeline as demo_pipeline
    from cachekit.parts.places import Features as Features
    from cachekit.parts.places import Guidance as Guidance
    from cachekit.parts.places import Modulated as Modulated
    from cachekit.parts.places import NestedRegion as NestedRegion
    from cachekit.parts.places import Sites as Sites
    from cachekit.parts.places import Span as Span
    from cachekit.parts.places import Tail as Tail
    from cachekit.parts.places import WholeDenoiser as WholeDenoiser
    from cachekit.parts.schedules import After as After
    from cachekit.parts.schedules import Every as Every
    from cachekit.parts.schedules import Mask as Mask
    from cachekit.parts.schedules import Quadratic as Quadratic
    from cachekit.parts.schedules import Window as Window
    from cachekit.parts.schedules import ends_row as ends_row
    from cachekit.parts.standins import Chebyshev as Chebyshev
    from cachekit.parts.standins import Drop as Drop
    from cachekit.parts.standins import Extrapolation as Extrapolation
    from cachekit.parts.standins import Hermite as Hermite
    from cachekit.parts.standins import Linear as Linear
    from cachekit.parts.standins import Reuse as Reuse
    from cachekit.parts.standins import Taylor as Taylor
    from cachekit.planning.plan import Plan as Plan
    from cachekit.registry.catalog import Catalog as Catalog
    from cachekit.registry.catalog import installed as installed
    from cachekit.registry.hookspecs import hookimpl as hookimpl
    from cachekit.registry.listing import adapters as adapters
    from cachekit.registry.listing import policies as policies
    from cachekit.runs.report import Report as Report
    from cachekit.tools.calibrating.calibrate import calibrate as calibrate
    from cachekit.tools.calibrating.calibration import Calibration as Calibration
    from cachekit.tools.calibrating.measured import Measured as Measured
    from cachekit.tools.calibrating.standins import Calibrated as Calibrated
    from cachekit.tools.tuning.tune import Tuned as Tuned
    from cachekit.tools.tuning.tune import tune as tune
    from cachekit.upstream.attention import attends as attends
    from cachekit.upstream.attention import module_sites as module_sites
    from cachekit.upstream.compiling import without_compiler as without_compiler

#: The module that defines each public name.
_HOMES = {
    "applying": ["apply", "attachment", "sites"],
    "attaching.attachment": ["Attachment"],
    "attaching.removal": ["remove"],
    "costs.estimate": ["Estimate", "estimate"],
    "errors": [
        "AdapterError",
        "AttachmentError",
        "BudgetError",
        "CachekitError",
        "CalibrationError",
        "ConflictError",
        "CostError",
        "GuidanceError",
        "IdleWarning",
        "PluginError",
        "PluginWarning",
        "PolicyError",
        "PresetError",
        "PresetWarning",
        "SiteError",
        "SpecError",
    ],
    "interface.adapter": ["Adapter", "Layout"],
    "interface.beginning": ["Beginning"],
    "interface.indicators": ["Accumulating", "Indicator", "Signal", "relative_change"],
    "interface.observation": ["Observation"],
    "interface.moment": ["OPEN", "Action", "Entry", "History", "Moment", "Open", "Streams", "Time"],
    "interface.parts": ["BranchChange", "Choice", "Schedule", "StandIn", "Where", "combine"],
    "interface.policy": ["Policy"],
    "interface.presets": ["Preset"],
    "interface.sites": ["DENOISER", "GUIDANCE", "LAYERS", "Kind", "Region", "Site", "SiteMap", "Target"],
    "models.demo": ["demo_pipeline"],
    "parts.places": ["Features", "Guidance", "Modulated", "NestedRegion", "Sites", "Span", "Tail", "WholeDenoiser"],
    "parts.schedules": ["After", "Every", "Mask", "Quadratic", "Window", "ends_row"],
    "parts.standins": ["Chebyshev", "Drop", "Extrapolation", "Hermite", "Linear", "Reuse", "Taylor"],
    "planning.plan": ["Plan"],
    "registry.catalog": ["Catalog", "installed"],
    "registry.hookspecs": ["hookimpl"],
    "registry.listing": ["adapters", "policies"],
    "runs.report": ["Report"],
    "tools.calibrating.calibrate": ["calibrate"],
    "tools.calibrating.calibration": ["Calibration"],
    "tools.calibrating.measured": ["Measured"],
    "tools.calibrating.standins": ["Calibrated"],
    "tools.tuning.tune": ["Tuned", "tune"],
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
