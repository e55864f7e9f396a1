"""Measure configurations of one pipeline side by side: cost, likeness to the uncached image, what is shown."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from .errors import SpecError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .report import Report

__all__ = ["HEADER", "Comparison", "Configuration", "Row", "Sample", "compare", "equal_cost"]

#: Tell whether an image shows what a prompt says.
Judge = Callable[["Image", str], bool]
#: Called after each run with the number of runs done and of all runs.
Progress = Callable[[int, int], None]

HEADER = ("configuration", "s/image", "faster", "GMACs", "fewer", "PSNR", "SSIM", "shown", "kept")


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
class Sample:
    """Hold one image, what it took, and how it compares; `shown` is None where nobody judged."""

    image: Image
    seconds: float
    macs: int
    cache_bytes: int
    psnr: float
    ssim: float
    shown: bool | None


@dataclass
class Row:
    """Hold the samples of one configuration, one per prompt; figures are medians over them.

    Multiply-accumulates are the mean, since they differ between images only where a policy decides during the run.
    """

    configuration: Configuration
    samples: list[Sample] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the median wall time of an image."""
        return median(sample.seconds for sample in self.samples)

    @property
    def macs(self) -> float:
        """Return the mean multiply-accumulates of an image."""
        return mean(sample.macs for sample in self.samples)

    @property
    def psnr(self) -> float:
        """Return the median PSNR to the uncached image in dB; infinite where most images are identical."""
        return median(sample.psnr for sample in self.samples)

    @property
    def ssim(self) -> float:
        """Return the median SSIM to the uncached image."""
        return median(sample.ssim for sample in self.samples)

    @property
    def shown(self) -> int | None:
        """Return how many images show what their prompt says."""
        verdicts = [sample.shown for sample in self.samples]
        return None if None in verdicts else sum(map(bool, verdicts))

    @property
    def cache_bytes(self) -> int:
        """Return the peak of bytes kept over all images."""
        return max(sample.cache_bytes for sample in self.samples)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, image by image, as plain data; an infinite PSNR is None, as JSON has no other word."""
        names = ("seconds", "macs", "cache_bytes", "psnr", "ssim", "shown")
        images = [{name: _finite(getattr(sample, name)) for name in names} for sample in self.samples]
        made = {"specs": list(self.configuration.specs), "steps": self.configuration.steps}
        return {**made, **{name: _finite(getattr(self, name)) for name in names}, "images": images}


@dataclass(frozen=True)
class Comparison:
    """Hold the rows of all configurations over the same prompts and seeds; the first one is uncached."""

    prompts: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def warnings(self) -> list[str]:
        """Return each warning of the runs' reports once."""
        return list(dict.fromkeys(warning for row in self.rows for warning in row.warnings))

    def label(self, row: Row) -> str:
        """Return the name of a row."""
        return f"uncached, {row.configuration.steps} steps" if row is self.rows[0] else row.configuration.label

    def cells(self, row: Row) -> tuple[str, ...]:
        """Return the texts of one row, in the order of `HEADER`."""
        uncached = self.rows[0]
        return (
            self.label(row),
            f"{row.seconds:.3f}",
            f"{uncached.seconds / row.seconds:.2f}x",
            f"{row.macs / 1e9:.3f}",
            f"{uncached.macs / row.macs:.2f}x",
            "-" if row is uncached else _decibel(row.psnr),
            "-" if row is uncached else f"{row.ssim:.3f}",
            "-" if row.shown is None else f"{row.shown}/{len(row.samples)}",
            _size(row.cache_bytes),
        )

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rule = ("---", *["---:"] * (len(HEADER) - 1))
        lines = [HEADER, rule, *(self.cells(row) for row in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as plain data for JSON."""
        return {"prompts": list(self.prompts), "rows": [row.as_dict() for row in self.rows]}


def compare(
    pipe: Any,
    configurations: Sequence[Configuration],
    prompts: Sequence[str],
    *,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    fewer_steps: bool = True,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Draw every prompt with every configuration, the first of which is uncached, and measure each image.

    All configurations run once before anything is timed, and then take turns prompt by prompt, so that neither
    a cold start nor a machine that grows slower favours one of them. With `fewer_steps` a last row is added: the
    plain pipeline with as many steps as the best cached configuration pays for. `arguments` go to the pipeline.
    """
    total = (len(configurations) + fewer_steps) * (1 + len(prompts))
    bench = _Bench(pipe, dict(arguments or {}), lambda done: progress(done, total))
    rows = [Row(configuration) for configuration in configurations]
    with _silent_log():
        macs = [bench.draw(row, prompts[0], seed).macs for row in rows]
        if fewer_steps:
            rows.append(Row(equal_cost(configurations, macs)))
            bench.draw(rows[-1], prompts[0], seed)
        for index, prompt in enumerate(prompts):
            _measure(bench, rows, prompt, seed + index, judge)
    return Comparison(tuple(prompts), tuple(rows))


def equal_cost(configurations: Sequence[Configuration], macs: Sequence[int]) -> Configuration:
    """Return the plain pipeline with the number of steps whose cost is nearest to the best cached configuration's.

    The best is the cheapest of those that compose several policies, or of all cached ones where none does.
    """
    composed = [cost for made, cost in zip(configurations, macs) if len(made.specs) > 1]
    cached = [cost for made, cost in zip(configurations, macs) if made.specs]
    per_step = macs[0] / configurations[0].steps
    return Configuration(max(1, round(min(composed or cached or macs) / per_step)))


@dataclass(frozen=True)
class _Drawn:
    """Hold one image and what it took, before it is compared."""

    image: Image
    seconds: float
    macs: int
    cache_bytes: int


class _Bench:
    """Draw images with one pipeline, count their costs, and tell how many are done."""

    def __init__(self, pipe: Any, arguments: dict[str, Any], progress: Callable[[int], None]) -> None:
        """Draw with `pipe`; nothing stays attached to it between images."""
        self._pipe = pipe
        self._arguments = arguments
        self._progress = progress
        self._done = 0
        self._costs: dict[tuple[Any, ...], int] = {}

    def draw(self, row: Row, prompt: str, seed: int) -> _Drawn:
        """Return the image of `prompt` with the row's configuration; only the pipeline's call is timed."""
        made = row.configuration
        if not made.specs and (made,) in self._costs:
            image, seconds = self._run(made, prompt, seed)
            drawn = _Drawn(image, seconds, self._costs[made,], 0)
        else:
            drawn = self._attached(row, prompt, seed)
        self._done += 1
        self._progress(self._done)
        return drawn

    def _attached(self, row: Row, prompt: str, seed: int) -> _Drawn:
        from .engine import apply

        # Without specs the attachment only counts: that run is the warm-up, and never timed.
        with apply(self._pipe, row.configuration.specs) as attachment:
            image, seconds = self._run(row.configuration, prompt, seed)
            report = attachment.report()
        row.warnings += report.warnings
        return _Drawn(image, seconds, self._macs(row.configuration, report), report.cache_bytes)

    def _run(self, made: Configuration, prompt: str, seed: int) -> tuple[Image, float]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        output = self._pipe(
            prompt=prompt, num_inference_steps=made.steps, generator=generator, output_type="pil", **self._arguments
        )
        return output.images[0], time.perf_counter() - start

    def _macs(self, made: Configuration, report: Report) -> int:
        """Return the run's cost, counted once for all runs that took the same actions."""
        actions = [(batch, row.signature) for batch, row in report.record.calls]
        key = (made, *actions) if made.specs else (made,)
        if key not in self._costs:
            self._costs[key] = report.macs
        return self._costs[key]


def _measure(bench: _Bench, rows: list[Row], prompt: str, seed: int, judge: Judge | None) -> None:
    """Append a sample to each row; each prompt begins with another configuration."""
    first = seed % len(rows)
    turns = [*range(first, len(rows)), *range(first)]
    drawn = {turn: bench.draw(rows[turn], prompt, seed) for turn in turns}
    for index, row in enumerate(rows):
        one = drawn[index]
        shown = None if judge is None else bool(judge(one.image, prompt))
        psnr, ssim = _likeness(one.image, drawn[0].image)
        row.samples.append(Sample(one.image, one.seconds, one.macs, one.cache_bytes, psnr, ssim, shown))


def _likeness(image: Image, reference: Image) -> tuple[float, float]:
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
def _silent_log() -> Iterator[None]:
    """Keep the warnings of runs, which the rows collect, from being logged once per image as well."""
    log = logging.getLogger("cachekit")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decibel(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "identical"


def _size(count: int) -> str:
    if count < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB" if count else "0"
    return f"{count / (1 << 20):.1f} MiB"
