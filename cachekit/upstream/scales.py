"""The guidance scale of a pipeline's call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachekit.upstream.calling import SCALE
from cachekit.upstream.guidance import has_true_guidance

_TRUE = "true_cfg_scale"
#: Arguments that hold the scale, the first of them that a call has.
_SCALES = (SCALE, "max_guidance_scale")
#: Other arguments that change how branches are combined, or what the denoiser is given.
_BESIDE = (SCALE, "min_guidance_scale", "image_guidance_scale", "guidance_rescale", "pag_scale")


def scale_argument(arguments: Mapping[str, Any]) -> str:
    """Name the argument of a call that holds its guidance scale: that of true guidance, where there is any."""
    if has_true_guidance({**arguments, _TRUE: arguments.get(_TRUE) or 2.0}) and _TRUE in arguments:
        return _TRUE
    return next((name for name in _SCALES if name in arguments), _SCALES[0])


def scale_of(arguments: Mapping[str, Any]) -> float | None:
    """Read the guidance scale of a call; None where it has none."""
    value = arguments.get(scale_argument(arguments))
    return float(value) if isinstance(value, (int, float)) else None


def scales_beside(arguments: Mapping[str, Any]) -> dict[str, float]:
    """Read the other scales of a call, by name."""
    own = scale_argument(arguments)
    found = {name: arguments.get(name) for name in _BESIDE if name != own}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
