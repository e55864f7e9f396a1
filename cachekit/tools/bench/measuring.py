"""Generate one image with one configuration of a pipeline, and measure its costs and its similarity to another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachekit.errors import SpecError
from cachekit.interface.specs import joined
from cachekit.upstream.calling import STEPS

if TYPE_CHECKING:
    from PIL.Image import Image

    from cachekit.runs.report import Count

__all__ = [
    "Configuration",
    "ImageRunner",
    "RunResult",
    "Stopwatch",
    "similarity",
    "steps_at",
    "timed_call",
]

#: Maps a prompt to the arguments of the pipeline's call.
Arguments = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Configuration:
    """The specs that are applied and the number of steps; without specs the plain pipeline."""

    steps: int
    specs: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, steps: int) -> Configuration:
        """Parse specs joined by `+`, such as `tgate:m=10+deepcache:interval=3`."""
        specs = tuple(joined(text))
        if not all(specs):
            raise SpecError(f"spec {text!r}: no policy; write 'name:key=value', joined by '+'")
        return cls(steps, specs)

    @property
    def label(self) -> str:
        """The name in tables and pictures."""
        return " + ".join(self.specs) or f"{self.steps} plain step{'s' * (self.steps != 1)}"


@dataclass(frozen=True)
class RunResult:
    """One result of a pipeline and its costs, before any comparison.

    `image` is None where the pipeline returned latents, `cache_bytes` where the cached bytes are not counted, and
    `peak_memory` (bytes) where there is no GPU.
    """

    image: Image | None
    seconds: float
    macs: int
    cache_bytes: int | None = 0
    deciding_seconds: float = 0.0
    peak_memory: int | None = None
    counts: tuple[Count, ...] = ()
    warnings: tuple[str, ...] = ()


class Stopwatch:
    """Times a block, by CUDA events where the device is a GPU, and records its peak memory there."""

    def __init__(self, device: Any) -> None:
        """Time work on `device`; None is the CPU."""
        import torch

        self._cuda = torch.cuda if device is not None and torch.device(device).type == "cuda" else None
        self._device = device
        self.seconds = 0.0
        self.peak_memory: int | None = None

    def __enter__(self) -> Stopwatch:
        """Start the clock after all work queued earlier has finished."""
        if self._cuda is not None:
            self._cuda.synchronize(self._device)
            self._cuda.reset_peak_memory_stats(self._device)
            self._events = [self._cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the clock after all work of the block has finished."""
        self.seconds = time.perf_counter() - self._start
        if self._cuda is not None:
            self._events[1].record()
            self._cuda.synchronize(self._device)
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
            self.peak_memory = self._cuda.max_memory_allocated(self._device)


class ImageRunner:
    """Runs one pipeline, and counts MACs once for all runs that took the same actions."""

    def __init__(self, pipe: Any, arguments: Arguments) -> None:
        """Run `pipe`; nothing stays attached to it between images."""
        from cachekit.costs.known import KnownCosts

        self._pipe = pipe
        self._arguments = arguments
        self._costs = KnownCosts()
        self._plain: dict[Configuration, int] = {}

    def run(self, configuration: Configuration, prompt: str, seed: int) -> RunResult:
        """Generate the image of `prompt`; only the pipeline's call is timed."""
        if configuration.specs or configuration not in self:
            return self._attached(configuration, prompt, seed)
        image, watch = timed_call(self._pipe, self._call(configuration, prompt), seed)
        return RunResult(image, watch.seconds, self.plain_macs(configuration), peak_memory=watch.peak_memory)

    def __contains__(self, configuration: Configuration) -> bool:
        """Whether a plain configuration has run before, so that its MACs are known."""
        return configuration in self._plain

    def plain_macs(self, configuration: Configuration) -> int:
        """MACs of a plain configuration that has run before."""
        return self._plain[configuration]

    def _attached(self, configuration: Configuration, prompt: str, seed: int) -> RunResult:
        from cachekit.applying import attach

        # Without specs the attachment only counts: that run is the warm-up, and never timed.
        with attach(self._pipe, configuration.specs, cost=self._costs) as attachment:
            image, watch = timed_call(self._pipe, self._call(configuration, prompt), seed)
            report = attachment.report()
        if not configuration.specs:
            self._plain[configuration] = report.macs
        return RunResult(
            image=image,
            seconds=watch.seconds,
            macs=report.macs,
            cache_bytes=report.cache_bytes + report.memory_bytes,
            deciding_seconds=report.deciding_seconds,
            peak_memory=watch.peak_memory,
            counts=tuple(report.counts),
            warnings=tuple(report.warnings),
        )

    def _call(self, configuration: Configuration, prompt: str) -> dict[str, Any]:
        return {STEPS: configuration.steps, **self._arguments(prompt)}


def timed_call(call: Any, arguments: dict[str, Any], seed: int) -> tuple[Image | None, Stopwatch]:
    """Call a pipeline once with a generator of that seed.

    The image is the first of the output, or None where the output holds latents.
    """
    import torch
    from PIL.Image import Image

    generator = torch.Generator().manual_seed(seed)
    pipe = getattr(call, "__self__", call)
    with Stopwatch(getattr(pipe, "device", None)) as watch:
        output = call(**arguments, generator=generator)
    first = output[0][0]  # videos aren't called images
    return (first if isinstance(first, Image) else None), watch


def steps_at(share: float, steps: int) -> int:
    """Find the number of plain steps, at least 1, that cost most nearly `share` of what `steps` of them cost."""
    return max(1, round(share * steps))


def similarity(image: Image, reference: Image) -> tuple[float, float]:
    """PSNR (dB, infinite for equal images) and SSIM of two 8-bit colour images."""
    import numpy as np
    import skimage.metrics

    metrics: Any = skimage.metrics
    pixels, wanted = np.asarray(image), np.asarray(reference)
    if np.array_equal(pixels, wanted):
        return math.inf, 1.0
    ssim = metrics.structural_similarity(wanted, pixels, channel_axis=-1, data_range=255)
    return float(metrics.peak_signal_noise_ratio(wanted, pixels, data_range=255)), float(ssim)
