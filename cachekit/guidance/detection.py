"""Detect how the guidance branches of a run reach the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachekit.errors import GuidanceError
from cachekit.interface.adapter import Layout
from cachekit.upstream.arguments import PAIR

#: Pipelines that say they are unguided whatever they are given.
_TELL_NOTHING = ("StableDiffusionPanoramaPipeline",)


#: Arguments of guidance that has a branch beside the two.
_THIRD_BRANCH = ("image_guidance_scale", "sld_guidance_scale")


def is_guided(pipe: Any, arguments: Mapping[str, Any], denoiser: Any, context: str | None) -> bool | None:
    """Tell whether the pipeline's present run is guided, or None when it does not say.

    The pipeline's own property is right from the first call of the denoiser on. Without one, the name of a call
    (`context`) leaves it open until the second. A guidance scale above 1 may mean two branches, or feed an
    embedding; true guidance beside it, or guidance by an image, mean more than one; anything else means one.
    """
    if type(pipe).__name__ in _TELL_NOTHING:
        return _above_one(arguments, "guidance_scale")
    told = getattr(pipe, "do_classifier_free_guidance", None)
    if told is not None:
        return bool(told)
    if context in PAIR:
        return None
    negative = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    if negative and _above_one(arguments, "true_cfg_scale"):
        return True
    embedded = (getattr(denoiser, "config", None) or {}).get("guidance_embeds")
    scales = [name for name in arguments if name.endswith("guidance_scale")]  # of a prior and a decoder
    own = ["guidance_scale"] if "guidance_scale" in scales else scales
    if embedded or not any(_above_one(arguments, name) for name in own):
        return False
    return True if any(name in arguments for name in _THIRD_BRANCH) else None


def _above_one(arguments: Mapping[str, Any], name: str) -> bool:
    scale = arguments.get(name)
    return isinstance(scale, (int, float)) and scale > 1


def refuse_unfit(pipe: Any, arguments: Mapping[str, Any], sample: Tensor, timestep: Any) -> None:
    """Raise `GuidanceError` for runs whose calls nobody may skip or narrow.

    A pipeline may itself read attention maps, take gradients through the denoiser, or run several steps at once.
    """
    reason = ""
    if (arguments.get("sag_scale") or 0) > 0:
        reason = "self-attention guidance reads the attention of every step; set sag_scale=0"
    elif arguments.get("use_cross_attn_mask") or arguments.get("use_intersect_mask"):
        reason = "its masks are made of every step's attention; set use_cross_attn_mask and use_intersect_mask to False"
    elif sample.requires_grad:
        reason = "gradients are taken through the denoiser; detach the sample"
    elif _has_several_steps(timestep):
        reason = "one call holds several steps; run them one by one"
    if reason:
        name = "a bare loop" if pipe is None else type(pipe).__name__
        raise GuidanceError(f"{name}: {reason}, or call cachekit.remove(pipe)")


def _has_several_steps(timestep: Any) -> bool:
    """Tell whether a batch holds different timesteps; a table of them by token, as in video, has two dimensions."""
    if not isinstance(timestep, Tensor) or timestep.dim() != 1 or timestep.numel() < 2 or timestep.is_meta:
        return False
    return timestep.stride(0) != 0 and bool((timestep != timestep[0]).any())


def branches_share(sample: Tensor, layout: Layout) -> bool:
    """Tell whether a batch holds the same latents once per branch, as batched guidance does.

    Where the condition is an image, it fills the second half of the sample's channels and differs.
    """
    count = len(layout.order)
    if sample.shape[0] % count:
        return False
    if sample.is_meta:
        return True
    if layout.condition == "image":
        sample = sample.narrow(2, 0, sample.shape[2] // 2)
    first, *others = sample.chunk(count)
    return all(torch.equal(first, other) for other in others)


@dataclass(frozen=True)
class FirstCall:
    """Hold what the first call of a run shows of its guidance.

    `told` is what the pipeline says, `context` the name that it gives the call, `narrows` whether any policy
    would drop a branch, `perturbed` whether attention is perturbed for one, `remembers` whether calls leave
    something behind in the denoiser's arguments, `momentum` whether guidance adds up earlier steps; `denoiser` is
    the name of its class, for errors.
    """

    told: bool | None
    sample: Tensor
    context: str | None
    narrows: bool
    denoiser: str
    perturbed: bool = False
    remembers: bool = False
    momentum: bool = False


def layout_of_run(first: FirstCall, layout: Layout) -> Layout:
    """Return how the branches of a run come, from what its first call shows.

    A pipeline that names its calls after branches makes one for each. A batch is what the pipeline told, checked
    against the latents themselves; a bare loop tells nothing (None), and there equal parts of the batch are its
    branches. Raise `GuidanceError` where a policy would drop a branch of something else (three branches, calls
    without names): guessing would mix images. Where no policy would, each call is a whole of its own.
    """
    if first.remembers and first.told is not False:
        return _refuse_or_alone(first, layout, "each call writes keys and values that later ones of its branch read")
    if first.momentum:
        return _refuse_or_alone(first, layout, "the guider adds up what branches differed by; set its momentum to None")
    if first.context in PAIR and (first.told is not False or first.context == PAIR[1]):
        other = PAIR[1 - PAIR.index(first.context)]
        return layout.by_calls((first.context, other))
    if first.told is False:
        return layout.alone
    if first.perturbed:
        return _refuse_or_alone(first, layout, "perturbed-attention guidance adds a branch of its own; set pag_scale=0")
    if first.told and layout.calls:
        return layout.by_calls(layout.calls)
    if branches_share(first.sample, layout):
        return layout
    if not first.told:
        return layout.alone
    batch = f"a guided batch of {first.sample.shape[0]} is not {' and '.join(layout.order)} over the same latents"
    return _refuse_or_alone(first, layout, batch)


def _refuse_or_alone(first: FirstCall, layout: Layout, reason: str) -> Layout:
    if not first.narrows:
        return layout.alone
    raise GuidanceError(
        f"{first.denoiser}: {reason}; no branch of it can be dropped: this pipeline's guidance is not supported,"
        " call cachekit.remove(pipe), or apply policies that keep all branches"
    )
