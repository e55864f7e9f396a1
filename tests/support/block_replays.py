"""Caching of transformer blocks written out, without cachekit: all blocks run, and the exit is replaced."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from typing import Any

import torch
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline, WanPipeline
from diffusers.models.cache_utils import CacheMixin

import cachekit
from support import tiny

#: Arguments that give a Flux its true guidance, in two calls of the denoiser.
TRUE_GUIDANCE: dict[str, Any] = {
    "true_cfg_scale": 3.0,
    "negative_prompt_embeds": tiny.text(1, seed=4),
    "negative_pooled_prompt_embeds": tiny.text(1, seed=4)[:, 0],
}


def blocks_of(model: Any) -> list[Any]:
    """All blocks of a transformer in a row."""
    names = ("transformer_blocks", "single_transformer_blocks", "blocks")
    return [block for name in names for block in getattr(model, name, ())]


def image_of(output: Any) -> torch.Tensor:
    """The hidden states of what a block returns: here the text comes before them."""
    return output[-1] if isinstance(output, tuple) else output


def change(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new - old).abs().mean() / old.abs().mean())


class Replay:
    """A method that skips all blocks from `first` on, in a copy of a pipeline.

    Subclasses write `is_full`, which is asked once in each call and has `entered` and `left`: the hidden states before
    and after the block before them, or what enters the first attention if there is none. `memory` is that of the call's
    branch, `kept` the residuals of its full steps, the newest first.
    """

    def __init__(self, pipe: Any, first: int = 0, branches: int | None = None) -> None:
        self.pipe = copy.deepcopy(pipe)
        model, blocks = self.pipe.transformer, blocks_of(self.pipe.transformer)
        is_joint = isinstance(pipe, (FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline))
        self.streams = ["encoder_hidden_states", "hidden_states"] if is_joint else ["hidden_states"]
        self.branches = branches or (2 if isinstance(pipe, WanPipeline) else 1)
        self.call, self.steps, self.full = -1, 0, []
        self.memories: dict[int, dict[str, Any]] = defaultdict(dict)
        self.residuals: dict[int, list[Any]] = defaultdict(list)
        self.signature = inspect.signature(blocks[first].forward)
        model.register_forward_pre_hook(self._begin)
        if first:
            blocks[first - 1].register_forward_hook(self._probe, with_kwargs=True)
        else:
            (attention,) = [part for name, part in blocks[0].named_children() if name in ("attn", "attn1")]
            attention.register_forward_pre_hook(self._modulated, with_kwargs=True)
        blocks[first].register_forward_pre_hook(self._enter, with_kwargs=True)
        blocks[-1].register_forward_hook(self._leave)

    def is_full(self) -> bool:
        raise NotImplementedError

    def residual(self, kept: list[Any]) -> list[Any]:
        """What stands in for the blocks' residual of each stream."""
        return kept[0]

    def latents(self, steps: int, **changes: Any) -> torch.Tensor:
        self.steps = steps
        return tiny.latents(self.pipe, steps=steps, **changes)

    @property
    def step(self) -> int:
        return self.call // self.branches

    @property
    def memory(self) -> dict[str, Any]:
        return self.memories[self.call % self.branches]

    def _begin(self, _module: Any, _inputs: Any) -> None:
        self.call += 1

    def _probe(self, _module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.left = image_of(output)

    def _modulated(self, _module: Any, args: Any, kwargs: Any) -> None:
        self.entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def _enter(self, _module: Any, args: Any, kwargs: Any) -> None:
        given = self.signature.bind(*args, **kwargs).arguments
        self.entry = [given[name] for name in self.streams]

    def _leave(self, _module: Any, _inputs: Any, output: Any) -> Any:
        left = output if isinstance(output, tuple) else (output,)
        kept = self.residuals[self.call % self.branches]
        self.full.append(self.is_full())
        if self.full[-1]:
            kept.insert(0, [None if out is None else out - into for out, into in zip(left, self.entry)])
            return None
        streams = [None if one is None else into + one for into, one in zip(self.entry, self.residual(kept))]
        return tuple(streams) if isinstance(output, tuple) else streams[0]


def by_diffusers(pipe: Any, apply_hooks: Any, config: Any, steps: int, **changes: Any) -> torch.Tensor:
    """The latents of a copy of a pipeline with one of diffusers' own caches."""
    twin = copy.deepcopy(pipe)
    if isinstance(twin.transformer, CacheMixin):
        twin.transformer.enable_cache(config)
        return tiny.latents(twin, steps=steps, **changes)
    apply_hooks(twin.transformer, config)
    with CacheMixin.cache_context(twin.transformer, "all"):  # the pipeline names no calls
        return tiny.latents(twin, steps=steps, **changes)


def check_applied(pipe: Any, spec: Any, expected: torch.Tensor, steps: int, **changes: Any) -> Any:
    """Check that a policy gives these latents, twice, that the pipeline is as before, and the counts; its report."""
    plain = tiny.latents(pipe, steps=steps, **changes)
    for again in (False, True):
        with cachekit.apply(pipe, spec) as attachment:
            assert torch.equal(tiny.latents(pipe, steps=steps, **changes), expected)
            report = attachment.report()
        assert again or torch.equal(tiny.latents(pipe, steps=steps, **changes), plain)
    for count in report.counts:
        assert count.stored + count.computed + count.reused == count.targets * len(report.record.calls)
        assert count.missed == 0
    return report


def reused(report: Any) -> int:
    """In how many calls something was reused, by all targets together."""
    return sum(count.reused for count in report.counts)


def measured(pipe: Any, spec: Any, steps: int, **changes: Any) -> cachekit.Calibration:
    """What a policy measures of the run that `tiny.latents` makes."""
    given = {**tiny.arguments(pipe), **changes}
    left_out = ("num_inference_steps", "generator", "guidance_scale")
    own = {name: value for name, value in given.items() if name.endswith(("embeds", "mask"))}
    shared = {name: value for name, value in given.items() if name not in (*own, *left_out)}
    scale = given["guidance_scale"]
    return cachekit.calibrate(pipe, spec, [own], num_inference_steps=steps, guidance_scale=scale, **shared)
