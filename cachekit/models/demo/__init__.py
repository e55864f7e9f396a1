"""The embedded models, the scenes that they draw, and a checker and a classifier for the images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachekit.models.demo.checker import Verdict, shows
    from cachekit.models.demo.classifier import features
    from cachekit.models.demo.pipeline import WeightsError, demo_pipeline
    from cachekit.models.demo.scenes import heldout_captions

__all__ = [
    "DEMO_GUIDANCE",
    "DEMO_STEPS",
    "LCM_STEPS",
    "Verdict",
    "WeightsError",
    "demo_pipeline",
    "demo_steps",
    "features",
    "heldout_captions",
    "shows",
]

DEMO_GUIDANCE = 3.5
DEMO_STEPS = 25
LCM_STEPS = 4
_HOMES = {
    "Verdict": "checker",
    "WeightsError": "pipeline",
    "demo_pipeline": "pipeline",
    "features": "classifier",
    "heldout_captions": "scenes",
    "shows": "checker",
}


def demo_steps(model: str) -> int:
    """Choose the number of steps that an embedded model is made for, by its name or kind."""
    return LCM_STEPS if model in ("demo-lcm", "lcm") else DEMO_STEPS


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use: importing the package loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted([*globals(), *__all__])
