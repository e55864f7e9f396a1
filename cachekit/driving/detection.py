"""Detect how the guidance branches of a run reach the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from cachekit.errors import GuidanceError
from cachekit.interface.adapter import Layout
from cachekit.upstream.arguments import PAIR
from cachekit.upstream.guidance import reads_attention


class Obstacle(Enum):
    """Reasons why no branch of a run can be dropped, as the reason that its refusal gives."""

    MOMENTUM = "the guider adds up what branches differed by; set its momentum to None"
    WRITTEN_CACHE = "each call writes keys and values that later ones of its branch read"
    PERTURBED_ATTENTION = "perturbed-attention guidance adds a branch of its own; set pag_scale=0"


@dataclass(frozen=True)
class FirstCall:
    """What the first call of a run shows of its guidance.

    `guided` is None if it is not known yet; `context` is the name that the pipeline gives the call. Of several
    obstacles, `obstacle` is the first in the order of the enum.
    """

    sample: Tensor
    guided: bool | None
    context: str | None
    obstacle: Obstacle | None = None


def layout_of_run(first: FirstCall, layout: Layout) -> tuple[Layout, str]:
    """Detect the layout of a run's branches, and the reason why none can be dropped ("" where one can).

    A pipeline that names its calls after branches makes one call for each. Where a pipeline states that it is guided,
    the latents of the batch are checked to be equal; a bare loop states nothing, and there equal parts of the batch
    are its branches. Anything else (three branches, calls without names) counts as a single branch, because a wrong
    guess would mix images.
    """
    obstacle = first.obstacle
    if obstacle is Obstacle.MOMENTUM or (obstacle is Obstacle.WRITTEN_CACHE and first.guided is not False):
        return layout.alone, obstacle.value
    if first.context in PAIR and (first.guided is not False or first.context == PAIR[1]):
        other = PAIR[1 - PAIR.index(first.context)]
        return layout.by_calls((first.context, other)), ""
    if first.guided is False:
        return layout.alone, ""
    if obstacle is Obstacle.PERTURBED_ATTENTION:
        return layout.alone, obstacle.value
    if first.guided and layout.calls:
        return layout.by_calls(layout.calls), ""
    return _layout_of_batch(first, layout)


def _layout_of_batch(first: FirstCall, layout: Layout) -> tuple[Layout, str]:
    if branches_share(first.sample, layout):
        return layout, ""
    if not first.guided:
        return layout.alone, ""
    return layout.alone, _reason(first.sample.shape[0], layout)


def _reason(batch: int, layout: Layout) -> str:
    return f"a guided batch of {batch} is not {' and '.join(layout.order)} over the same latents"


def branches_share(sample: Tensor, layout: Layout) -> bool:
    """Whether a batch holds the same latents once for each branch, as batched guidance does.

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


def refuse_narrowing(name: str, reason: str) -> None:
    """Raise `GuidanceError`: no branch of the run of `name`, a pipeline or denoiser, can be dropped."""
    raise GuidanceError(
        f"{name}: {reason}; no branch of it can be dropped: this pipeline's guidance is not supported,"
        " call cachekit.remove(pipe), or apply policies that keep all branches"
    )


def refuse_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `GuidanceError` for a pipeline call that reads the attention of every step: none may be skipped."""
    reason = reads_attention(arguments)
    if reason:
        _refuse(pipe, reason)


def refuse_inputs(pipe: Any, sample: Tensor, timestep: Any) -> None:
    """Raise `GuidanceError` for a denoiser call that takes gradients or runs several steps at once."""
    if sample.requires_grad:
        _refuse(pipe, "gradients are taken through the denoiser; detach the sample")
    if _has_several_steps(timestep):
        _refuse(pipe, "one call holds several steps; denoise one in each call")


def _refuse(pipe: Any, reason: str) -> None:
    name = "a bare loop" if pipe is None else type(pipe).__name__
    raise GuidanceError(f"{name}: {reason}, or call cachekit.remove(pipe)")


def _has_several_steps(timestep: Any) -> bool:
    """Whether a batch holds different timesteps; a table of them by token, as in video, has two dimensions."""
    if not isinstance(timestep, Tensor) or timestep.dim() != 1 or timestep.numel() < 2 or timestep.is_meta:
        return False
    return timestep.stride(0) != 0 and bool((timestep != timestep[0]).any())
