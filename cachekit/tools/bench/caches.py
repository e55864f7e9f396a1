"""Run the caches of diffusers and of cache-dit, which correspond to no spec of cachekit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cachekit.tools.bench.cells import Method
from cachekit.tools.bench.measuring import Arguments, RunResult, timed_call
from cachekit.tools.bench.peers import counting, twin
from cachekit.upstream.calling import STEPS
from cachekit.upstream.modules import has_up_blocks
from cachekit.upstream.pipelines import denoiser_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Cache", "caches_for", "enabled"]

#: Each with its own defaults, or where there are none, the values of its documentation. FasterCache leaves the guidance
#: branches alone, because most pipelines no longer batch them; diffusers has magnitudes for MagCache for Flux only;
#: one block computed first (F1) is possible at any depth.
_CACHES = (
    (Method.DIFFUSERS, "FirstBlockCache:threshold=0.05"),
    (Method.DIFFUSERS, "TaylorSeerCache:cache_interval=5,disable_cache_before_step=3,max_order=1"),
    (Method.DIFFUSERS, "PyramidAttentionBroadcast:spatial_attention_block_skip_range=2"),
    (Method.DIFFUSERS, "FasterCache:is_guidance_distilled=true"),
    (Method.DIFFUSERS, "MagCache:threshold=0.06,max_skip_steps=3"),
    (Method.CACHE_DIT, "DBCache:Fn_compute_blocks=1,residual_diff_threshold=0.08,max_warmup_steps=8"),
)
_NEEDS_TIMESTEP = ("PyramidAttentionBroadcast", "FasterCache")


def caches_for(denoiser: nn.Module, pipeline: str) -> list[tuple[Method, str]]:
    """Find the caches that declare support for a denoiser in a pipeline of that class."""
    fits = {Method.DIFFUSERS: _fits_diffusers, Method.CACHE_DIT: _fits_cache_dit}
    return [(method, text) for method, text in _CACHES if fits[method](denoiser, pipeline, text.partition(":")[0])]


def _fits_diffusers(denoiser: nn.Module, pipeline: str, name: str) -> bool:
    import diffusers

    if not hasattr(denoiser, "enable_cache") or not hasattr(diffusers, f"{name}Config"):
        return False
    if name in _NEEDS_TIMESTEP:
        return hasattr(getattr(diffusers, pipeline), "current_timestep")
    return name != "MagCache" or type(denoiser).__name__ == "FluxTransformer2DModel"


def _fits_cache_dit(denoiser: nn.Module, pipeline: str, name: str) -> bool:
    # cache-dit supports no UNet, and takes seconds to import.
    if has_up_blocks(denoiser) or not find_spec("cache_dit"):
        return False
    with _quiet():
        import cache_dit
    return any(pipeline.startswith(known.rstrip("*")) for known in cache_dit.supported_pipelines()[1])


class Cache:
    """Runs a pipeline with one of these caches, on a copy; the pipeline itself is not changed."""

    def __init__(self, pipe: Any, method: Method, text: str, arguments: Arguments) -> None:
        """Copy `pipe`, with shared weights, for a cache such as `FirstBlockCache:threshold=0.05`."""
        self._twin = twin(pipe)
        self._method, self._text = method, text
        self._arguments = arguments

    def run(self, steps: int, prompt: str, seed: int) -> RunResult:
        """Generate the image of `prompt`, after an untimed run that counts its MACs: they depend on the image."""
        arguments = {STEPS: steps, **self._arguments(prompt)}
        cached = (self._twin, self._method, self._text, steps)
        with enabled(*cached), counting(denoiser_of(self._twin)) as count:
            timed_call(self._twin, arguments, seed)
        with enabled(*cached):
            image, watch = timed_call(self._twin, arguments, seed)
        return RunResult(image, watch.seconds, count.macs, cache_bytes=None, peak_memory=watch.peak_memory)


@contextmanager
def enabled(pipe: Any, method: Method, text: str, steps: int) -> Iterator[None]:
    """Enable a cache such as `FirstBlockCache:threshold=0.05` for a run of `steps` steps."""
    name, _, keys = text.partition(":")
    values = {key: json.loads(value) for key, value in (pair.split("=") for pair in keys.split(",") if pair)}
    cls = type(pipe)
    # cache-dit patches the class of a pipeline, so this one gets a class of its own.
    pipe.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
    try:
        with {Method.DIFFUSERS: _diffusers, Method.CACHE_DIT: _cache_dit}[method](pipe, name, values, steps):
            yield
    finally:
        pipe.__class__ = cls


@contextmanager
def _diffusers(pipe: Any, name: str, values: dict[str, Any], steps: int) -> Iterator[None]:
    import diffusers

    denoiser: Any = denoiser_of(pipe)
    more: dict[str, Any] = {}
    if name in _NEEDS_TIMESTEP:
        more["current_timestep_callback"] = lambda: pipe.current_timestep
    if name == "MagCache":
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        more |= {"mag_ratios": FLUX_MAG_RATIOS, STEPS: steps}
    with _quiet():
        denoiser.enable_cache(getattr(diffusers, f"{name}Config")(**values, **more))
    try:
        yield
    finally:
        denoiser.disable_cache()


@contextmanager
def _cache_dit(pipe: Any, name: str, values: dict[str, Any], steps: int) -> Iterator[None]:
    with _quiet():
        import cache_dit

        cache_dit.enable_cache(pipe, cache_config=getattr(cache_dit, f"{name}Config")(**values))
    try:
        yield
    finally:
        with _quiet():
            cache_dit.disable_cache(pipe)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what these packages log each time a cache is enabled or disabled."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
