"""Inspect the guidance of diffusers pipelines: properties, call arguments and attention processors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from cachekit.upstream.arguments import PAIR
from cachekit.upstream.modules import modules_by_name

#: Pipelines whose own property is False whatever they are given.
_SILENT = ("StableDiffusionPanoramaPipeline",)
#: Arguments of guidance that has a branch beside the two.
_THIRD_BRANCH = ("image_guidance_scale", "sld_guidance_scale")
#: Properties of a pipeline that its batch depends on, and that may change from step to step.
_STATE = ("do_classifier_free_guidance", "do_perturbed_attention_guidance")
#: Arguments that make masks of the attention of every step.
_MASKS = ("use_cross_attn_mask", "use_intersect_mask")


def is_guided(pipe: Any, arguments: Mapping[str, Any], denoiser: nn.Module, context: str | None) -> bool | None:
    """Whether the pipeline's present run is guided; None if that is not known yet.

    The pipeline's own property is right from the first denoiser call on. Without one, true guidance means more than one
    branch, and else a call that is named after a branch (`context`) leaves it open until the second. A guidance scale
    above 1 may mean two branches, or feed an embedding; guidance by an image means more than one; anything else one.
    """
    if type(pipe).__name__ in _SILENT:
        return _above(1, arguments, "guidance_scale")
    stated = getattr(pipe, "do_classifier_free_guidance", None)
    if stated is not None:
        return bool(stated)
    if has_true_guidance(arguments):
        return True
    if context in PAIR:
        return None
    embedded = (getattr(denoiser, "config", None) or {}).get("guidance_embeds")
    scales = [name for name in arguments if name.endswith("guidance_scale")]  # of a prior and a decoder
    own = ["guidance_scale"] if "guidance_scale" in scales else scales
    if embedded or not any(_above(1, arguments, name) for name in own):
        return False
    return True if any(name in arguments for name in _THIRD_BRANCH) else None


def has_true_guidance(arguments: Mapping[str, Any]) -> bool:
    """Whether a pipeline's arguments ask for guidance beside an embedded scale."""
    negative = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    return negative and _above(1, arguments, "true_cfg_scale")


def guidance_properties(pipe: Any) -> tuple[str, ...]:
    """List the properties by which a running pipeline shows its guidance; a callback may change their values."""
    return tuple(name for name in _STATE if hasattr(type(pipe), name) or name in vars(pipe))


def perturbs_attention(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether attention is perturbed for a branch: by the running pipeline, or by processors in a bare loop."""
    if pipe is not None:
        return bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    processors = (vars(module).get("processor") for module in modules_by_name(denoiser).values())
    return any(type(processor).__name__.startswith("PAG") for processor in processors)


def will_perturb_attention(pipe: Any, arguments: Mapping[str, Any], denoiser: nn.Module) -> bool:
    """Whether a call of `pipe` will add a perturbed branch to two others, judging by its arguments."""
    guided = _above(1, arguments, "guidance_scale") and not _embeds_scale(denoiser)
    return guided and _above(0, arguments, "pag_scale") and bool(getattr(pipe, "pag_applied_layers", ()))


def takes_scale(denoiser: nn.Module) -> bool:
    """Whether the guidance scale is an input of the denoiser, so that a run has no branches."""
    config = getattr(denoiser, "config", None) or {}
    return _embeds_scale(denoiser) or bool(config.get("guidance_embeds"))


def attention_processors(denoiser: nn.Module) -> dict[str, Any]:
    """Collect the attention processors of a denoiser, by name; none where it has no way to set them."""
    return dict(getattr(denoiser, "attn_processors", {})) if hasattr(denoiser, "set_attn_processor") else {}


def put_processors_back(denoiser: nn.Module, processors: Mapping[str, Any]) -> None:
    """Set the attention processors that a denoiser had before, unless it has them, or other modules of attention."""
    present = attention_processors(denoiser)
    if present.keys() == processors.keys() and any(present[name] is not one for name, one in processors.items()):
        setter: Any = denoiser
        setter.set_attn_processor(dict(processors))


def reads_attention(arguments: Mapping[str, Any]) -> str:
    """Why a pipeline call with these arguments reads the attention of every step, with the remedy, or ""."""
    if (arguments.get("sag_scale") or 0) > 0:
        return "self-attention guidance reads the attention of every step; set sag_scale=0"
    if any(arguments.get(name) for name in _MASKS):
        return "its masks are made of every step's attention; set use_cross_attn_mask and use_intersect_mask to False"
    return ""


def _embeds_scale(denoiser: nn.Module) -> bool:
    """Whether a distilled denoiser takes the guidance scale as an embedding."""
    return (getattr(denoiser, "config", None) or {}).get("time_cond_proj_dim") is not None


def _above(bound: float, arguments: Mapping[str, Any], name: str) -> bool:
    scale = arguments.get(name)
    return isinstance(scale, (int, float)) and scale > bound
