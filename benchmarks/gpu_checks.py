"""Checks of `python -m benchmarks.gpu` that need an accelerator, and the compiled rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

import cachekit
from cachekit.tools.bench.peers import twin
from cachekit.upstream.pipelines import denoiser_of

from .gpu_models import Model
from .gpu_rows import LAST_CHECK, Row, compared, figures, repeats, specs

#: Gets a model by its name, and builds it at first use.
Models = Callable[[str], Model]
#: Steps of a run in a check.
STEPS = 8
#: Bytes that may differ before and after a run: workspaces of libraries, which are allocated once.
_SLACK = 1 << 20


class FailedCheckError(Exception):
    """A check that found something else than it should have."""


def check(name: str, models: Models) -> dict[str, Any]:
    """Run a check; raise `FailedCheckError` where it fails."""
    return {"detail": CHECKS[name](models)}


def _repeatable(models: Models) -> str:
    for name in ("pixart-alpha", "sdxl"):
        model = models(name)
        _same(name, model.run(model.pipe, STEPS).latents, model.run(model.pipe, STEPS).latents)
    return "pixart-alpha and sdxl, uncached"


def _cache_device(models: Models) -> str:
    """Compare runs whose kept tensors move to the CPU and back with runs whose kept tensors stay."""
    details = []
    for name, text in (("pixart-alpha", "taylorseer:interval=3"), ("sdxl", "tgate:m=4+deepcache:interval=3")):
        model = models(name)
        stayed, _ = _cached(model, model.pipe, text)
        moved, kept = _cached(model, model.pipe, text, cache_device="cpu")
        _same(f"{name}, {text}", stayed, moved)
        details.append(f"{name}: {kept / 2**20:,.0f} MiB kept on the CPU")
    return "; ".join(details)


def _byte_limit(models: Models) -> str:
    model = models("pixart-alpha")
    _, kept = _cached(model, model.pipe, "taylorseer:interval=3")
    limit = kept // 2
    latents, held = _cached(model, model.pipe, "taylorseer:interval=3", max_cache_bytes=limit)
    if held > limit or not latents.isfinite().all():
        raise FailedCheckError(f"{held} bytes kept at a limit of {limit}")
    return f"{held / 2**20:,.0f} MiB kept at a limit of {limit / 2**20:,.0f} MiB"


def _memory_returned(models: Models) -> str:
    """Compare the bytes allocated before and after a run, whose attachment is removed."""
    model = models("sdxl")
    if model.device == "cpu":
        raise FailedCheckError("needs an accelerator")
    _cached(model, model.pipe, "tgate:m=4+deepcache:interval=3")
    before = torch.cuda.memory_allocated()
    _cached(model, model.pipe, "tgate:m=4+deepcache:interval=3")
    left = torch.cuda.memory_allocated() - before
    if left > _SLACK:
        raise FailedCheckError(f"{left} bytes more allocated after a run")
    return f"{left} bytes more allocated after a run"


def _group_offloading(models: Models) -> str:
    """Compare blocks whose weights are moved, by streams on a GPU, with resident ones."""
    model, details = models("pixart-alpha"), []
    streams = model.device != "cpu"
    pipe = model.fresh()
    denoiser: Any = denoiser_of(pipe)
    denoiser.enable_group_offload(
        onload_device=torch.device(model.device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=streams,
    )
    for text in ("taylorseer:interval=3", "fbcache", "tgate:m=4"):
        resident, _ = _cached(model, model.pipe, text)
        offloaded, _ = _cached(model, pipe, text)
        _same(text, resident, offloaded)
        details.append(text)
    return f"pixart-alpha, {'with' if streams else 'without'} streams: {', '.join(details)}"


def _model_offloading(models: Models) -> str:
    model = models("pixart-alpha")
    if model.device == "cpu":
        raise FailedCheckError("needs an accelerator")
    pipe = model.fresh()
    pipe.enable_model_cpu_offload()
    for text in ("taylorseer:interval=3", "tgate:m=4"):
        resident, _ = _cached(model, model.pipe, text)
        offloaded, _ = _cached(model, pipe, text)
        _same(text, resident, offloaded)
    return "pixart-alpha"


def _graph(models: Models) -> str:
    """Replay a CUDA graph of the denoiser that was captured before a run with policies."""
    model = models("pixart-alpha")
    if model.device == "cpu":
        raise FailedCheckError("needs an accelerator")
    denoiser = denoiser_of(model.pipe)
    inputs = model.known.inputs(2, device=model.device, dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                denoiser(**inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = denoiser(**inputs, return_dict=False)[0]
        graph.replay()
        before = captured.clone()
        _cached(model, model.pipe, "taylorseer:interval=3")
        graph.replay()
        _same("graph before and after a run", before, captured)
        _same("graph and eager", captured, denoiser(**inputs, return_dict=False)[0])
    return "pixart-alpha: captured, a cached run, replayed"


CHECKS: dict[str, Callable[[Models], str]] = {
    "two uncached runs are equal to the bit": _repeatable,
    "cache_device=cpu changes no bit": _cache_device,
    "max_cache_bytes holds": _byte_limit,
    "memory is returned after a run": _memory_returned,
    "group offloading changes no bit": _group_offloading,
    "model offloading changes no bit": _model_offloading,
    LAST_CHECK: _graph,
}


def _cached(model: Model, pipe: Any, text: str, **options: Any) -> tuple[torch.Tensor, int]:
    with cachekit.apply(pipe, specs(text), **options) as attachment:
        latents = model.run(pipe, STEPS).latents
        return latents, attachment.report().cache_bytes


def _same(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    if not torch.equal(one, other):
        gap = (one.float() - other.float()).norm() / one.float().norm()
        raise FailedCheckError(f"{what}: the latents differ, by {gap.item():.2e} of their norm")


class Compiled:
    """Copies of models whose repeated blocks are compiled, once for all rows."""

    def __init__(self, backend: str) -> None:
        """Compile with this backend at first use."""
        self._backend = backend
        self._copies: dict[str, tuple[Any, list[float]]] = {}

    def measure(self, row: Row, model: Model) -> dict[str, Any]:
        """Measure a row with compiled blocks beside the compiled uncached pipeline; the first run compiles."""
        copy, uncached = self._copies.get(model.name) or self._compiled(model)
        times, _ = repeats(model.plain.seconds)
        if row.text != "uncached" and not uncached:
            uncached += [model.run(copy).seconds for _ in range(times + 1)][1:]
        begun, kept = time.perf_counter(), 0
        with cachekit.apply(copy, specs(row.text)) if specs(row.text) else nullcontext() as attachment:
            model.run(copy)
            compiling = time.perf_counter() - begun
            runs = [model.run(copy) for _ in range(times)]
            if attachment is not None:
                kept = attachment.report().cache_bytes
        seconds = [run.seconds for run in runs]
        if row.text == "uncached":
            uncached += seconds
        found = figures(model, seconds, uncached, None)
        # The speedup is over the compiled pipeline; this one is over the eager one.
        eager = median(model.plain_seconds) / median(seconds)
        return {
            **found,
            "eager_speedup": eager,
            "first_seconds": compiling,
            "kept_bytes": kept,
            **compared(runs[-1], model),
        }

    def _compiled(self, model: Model) -> tuple[Any, list[float]]:
        copy = twin(model.pipe)
        denoiser: Any = denoiser_of(copy)
        denoiser.compile_repeated_blocks(fullgraph=False, backend=self._backend)
        return self._copies.setdefault(model.name, (copy, []))
