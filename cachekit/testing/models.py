"""The models that policies are checked on: tiny pipelines, one for each way that guidance and text can arrive."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachekit.testing.tiny.calls import arguments, drawn, text
from cachekit.testing.tiny.dit import pixart
from cachekit.testing.tiny.joint import flux, sd3
from cachekit.testing.tiny.unet import sd, small
from cachekit.testing.tiny.video import wan
from cachekit.upstream.pipelines import denoiser_of, hide_progress

#: Arguments with embeddings of prompts; the pooled ones are derived from them.
_PROMPTS = ("prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True)
class Model:
    """A tiny pipeline: how it is built, whether it is guided, and arguments that give images of another size.

    `small` builds one of the same structure with fewer layers, for what takes long.
    """

    name: str
    summary: str
    make: Callable[[], Any]
    guided: bool = True
    size: dict[str, int] = field(default_factory=dict, hash=False)
    small: Callable[[], Any] | None = None


def _small_unet() -> Any:
    return small(layers_per_block=1)


def _smaller_unet() -> Any:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return sd(**blocks, mid_block_type="UNetMidBlock2DCrossAttn", block_out_channels=(8, 8), layers_per_block=1)


MODELS = {
    model.name: model
    for model in (
        Model("sd", "UNet, both branches in one batch", _small_unet, size={"height": 24, "width": 32},
              small=_smaller_unet),
        Model("pixart", "transformer with cross-attention, both branches in one batch", pixart,
              size={"height": 16, "width": 32}, small=functools.partial(pixart, layers=2)),
        Model("sd3", "transformer with joint attention, both branches in one batch", functools.partial(sd3, layers=3),
              size={"height": 24, "width": 16}),
        Model("wan", "video transformer with cross-attention, a call for each branch", functools.partial(wan, layers=3),
              size={"height": 48, "width": 32}),
        Model("flux", "transformer with joint attention, unguided", functools.partial(flux, layers=(2, 3)),
              guided=False, size={"height": 24, "width": 16}),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a pipeline, as seeds.

    `positive` and `negative` are those of the prompts, `seed` that of the first image's noise. `images` are the
    images of the batch: each has noise and a prompt of its own, which do not depend on the others. `resized` asks for
    the model's other size.
    """

    steps: int
    seed: int = 0
    positive: int = 3
    negative: int = 4
    images: tuple[int, ...] = (0,)
    resized: bool = False

    def arguments(self, model: Model, pipe: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Make the arguments, with floating point tensors of `dtype` where one is given."""
        given = arguments(pipe, steps=self.steps, batch=len(self.images))
        for key, seed in zip(_PROMPTS, (self.positive, self.negative)):
            if key in given:
                given[key] = text(2, seed=seed)[list(self.images)]
                pooled = key.replace("prompt_embeds", "pooled_prompt_embeds")
                given |= {pooled: given[key][:, 0]} if pooled in given else {}
        given["generator"] = [torch.Generator().manual_seed(self.seed + image) for image in self.images]
        given |= model.size if self.resized else {}
        if dtype is not None:
            given = {key: value.to(dtype) if _is_float(value) else value for key, value in given.items()}
        return given


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@functools.cache
def pipeline(name: str) -> Any:
    """Build a model's pipeline, once: checks share it until `forget`."""
    return MODELS[name].make()


@functools.cache
def in_bfloat16(name: str, call: Call) -> tuple[Any, torch.Tensor]:
    """Build a model's pipeline in bfloat16, once until `forget`, and draw with it; raises where it doesn't run."""
    pipe = MODELS[name].make()
    denoiser_of(pipe).to(torch.bfloat16)
    return pipe, drawn(pipe, call.arguments(MODELS[name], pipe, torch.bfloat16))


def forget() -> None:
    """Build pipelines anew when they are asked for next: a check that failed may have left something behind."""
    pipeline.cache_clear()
    in_bfloat16.cache_clear()


@functools.cache
def never_attached(name: str) -> Any:
    """Build a model's pipeline again, once, for what nothing may be applied to."""
    return MODELS[name].make()


@functools.cache
def uncached(name: str, call: Call) -> torch.Tensor:
    """Draw with a pipeline of the same weights that nothing was ever applied to."""
    pipe = never_attached(name)
    return drawn(pipe, call.arguments(MODELS[name], pipe))


def twin(pipe: Any) -> Any:
    """Make a pipeline that shares the models and has all else of its own, as threads need: scheduler, tokenizers."""
    parts = {n: part if isinstance(part, nn.Module) else copy.deepcopy(part) for n, part in pipe.components.items()}
    if "requires_safety_checker" in inspect.signature(type(pipe).__init__).parameters:
        parts["requires_safety_checker"] = False
    made = type(pipe)(**parts)
    hide_progress(made)
    return made
