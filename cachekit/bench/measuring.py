"""Draw one image with one configuration of a pipeline, and measure what it took and how it compares."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachekit.errors import SpecError

if TYPE_CHECKING:
    from PIL.Image import Image

    from cachekit.reports.report import Count, Report

__all__ = ["Configuration", "ImageRunner", "RunResult", "Stopwatch", "likeness", "silent_log", "steps_at"]

#: Return the arguments of the pipeline's call for a prompt.
Arguments = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Configuration:
    """Say which specs are applied and how many steps are run; without specs it is the plain pipeline."""

    steps: int
    specs: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, steps: int) -> Configuration:
        """Return the configuration of specs joined by `+`, such as `tgate:m=10+deepcache:interval=3`."""
        # The sign of an exponent, as in 1e+3, joins nothing: names begin with a letter.
        specs = tuple(spec.strip() for spec in re.split(r"\+(?!\d)", text))
        if not all(specs):
            raise SpecError(f"spec {text!r}: nothing on one side of '+'; write 'name:key=value', joined by '+'")
        return cls(steps, specs)

    @property
    def label(self) -> str:
        """Return what tables and pictures call it."""
        return " + ".join(self.specs) or f"{self.steps} plain step{'s' * (self.steps != 1)}"


@dataclass(frozen=True)
class RunResult:
    """Hold one result of a pipeline and what it took, before it is compared.

    `image` is None for a result that is no picture; `cache_bytes` is None where nobody counts them, and
    `peak_memory` where there is no device to ask.
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
    """Measure the time of a block, by events where the device is a GPU, and the peak of its memory."""

    def __init__(self, device: Any) -> None:
        """Measure on `device`."""
        import torch

        self._cuda = torch.cuda if device is not None and torch.device(device).type == "cuda" else None
        self._device = device
        self.seconds = 0.0
        self.peak_memory: int | None = None

    def __enter__(self) -> Stopwatch:
        """Start once all earlier work is done."""
        if self._cuda is not None:
            self._cuda.synchronize(self._device)
            self._cuda.reset_peak_memory_stats(self._device)
            self._events = [self._cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop once all work of the block is done."""
        self.seconds = time.perf_counter() - self._start
        if self._cuda is not None:
            self._events[1].record()
            self._cuda.synchronize(self._device)
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
            self.peak_memory = self._cuda.max_memory_allocated(self._device)


class ImageRunner:
    """Draw with one pipeline, and count costs once for all runs that took the same actions."""

    def __init__(self, pipe: Any, arguments: Arguments) -> None:
        """Draw with `pipe`; nothing stays attached to it between images."""
        self._pipe = pipe
        self._arguments = arguments
        self._costs: dict[tuple[Any, ...], int] = {}

    def draw(self, made: Configuration, prompt: str, seed: int) -> RunResult:
        """Return the image of `prompt`; only the pipeline's call is timed."""
        if made.specs or made not in self:
            return self._attached(made, prompt, seed)
        image, watch = run(self._pipe, self._call(made, prompt), seed)
        return RunResult(image, watch.seconds, self._costs[made,], peak_memory=watch.peak_memory)

    def __contains__(self, made: Configuration) -> bool:
        """Tell whether a plain configuration has run before, so that its costs are known."""
        return (made,) in self._costs

    def _attached(self, made: Configuration, prompt: str, seed: int) -> RunResult:
        from cachekit.applying import apply

        # Without specs the attachment only counts: that run is the warm-up, and never timed.
        with apply(self._pipe, made.specs) as attachment:
            image, watch = run(self._pipe, self._call(made, prompt), seed)
            report = attachment.report()
        return RunResult(
            image=image,
            seconds=watch.seconds,
            macs=self._macs(made, report),
            cache_bytes=report.cache_bytes,
            deciding_seconds=report.deciding_seconds,
            peak_memory=watch.peak_memory,
            counts=tuple(report.counts),
            warnings=tuple(report.warnings),
        )

    def _call(self, made: Configuration, prompt: str) -> dict[str, Any]:
        return {"num_inference_steps": made.steps, **self._arguments(prompt)}

    def _macs(self, made: Configuration, report: Report) -> int:
        actions = [call.signature for call in report.record.calls]
        key = (made, *actions) if made.specs else (made,)
        if key not in self._costs:
            self._costs[key] = report.macs
        return self._costs[key]


def run(call: Any, arguments: dict[str, Any], seed: int) -> tuple[Image | None, Stopwatch]:
    """Return the first image of a pipeline's call, None where it gives latents, and the stopwatch of the call."""
    import torch
    from PIL.Image import Image

    generator = torch.Generator().manual_seed(seed)
    pipe = getattr(call, "__self__", call)
    with Stopwatch(getattr(pipe, "device", None)) as watch:
        output = call(**arguments, generator=generator)
    first = output.images[0]
    return (first if isinstance(first, Image) else None), watch


def steps_at(share: float, steps: int) -> int:
    """Return how many plain steps cost most nearly `share` of what `steps` of them do."""
    return max(1, round(share * steps))


def likeness(image: Image, reference: Image) -> tuple[float, float]:
    """Return PSNR and SSIM of 8-bit colour images."""
    import numpy as np
    import skimage.metrics

    metrics: Any = skimage.metrics
    pixels, wanted = np.asarray(image), np.asarray(reference)
    if np.array_equal(pixels, wanted):
        return math.inf, 1.0
    ssim = metrics.structural_similarity(wanted, pixels, channel_axis=-1, data_range=255)
    return float(metrics.peak_signal_noise_ratio(wanted, pixels, data_range=255)), float(ssim)


@contextmanager
def silent_log() -> Iterator[None]:
    """Keep the warnings of runs, which their results hold, from being logged once per image as well."""
    log = logging.getLogger("cachekit")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
