"""Measure configurations of one pipeline side by side: cost, likeness to the uncached image, what is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from cachekit.bench.measuring import Configuration, ImageRunner, RunResult, likeness, silent_log, steps_at

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["HEADER", "Comparison", "Configuration", "Row", "Sample", "compare", "equal_cost"]

#: Tell whether an image shows what a prompt says.
Judge = Callable[["Image", str], bool]
#: Called after each run with the number of runs done and of all runs.
Progress = Callable[[int, int], None]

HEADER = ("configuration", "s/image", "faster", "GMACs", "fewer", "PSNR", "SSIM", "shown", "kept")


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
    given = {**(arguments or {}), "output_type": "pil"}
    drawer = ImageRunner(pipe, lambda prompt: {"prompt": prompt, **given})
    bench = _Bench(drawer, lambda done: progress(done, total))
    rows = [Row(configuration) for configuration in configurations]
    with silent_log():
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
    return Configuration(steps_at(min(composed or cached or macs) / macs[0], configurations[0].steps))


class _Bench:
    """Draw images for rows, and tell how many are done."""

    def __init__(self, drawer: ImageRunner, progress: Callable[[int], None]) -> None:
        """Draw with `drawer`."""
        self._drawer = drawer
        self._progress = progress
        self._done = 0

    def draw(self, row: Row, prompt: str, seed: int) -> RunResult:
        """Return the image of `prompt` with the row's configuration."""
        drawn = self._drawer.draw(row.configuration, prompt, seed)
        row.warnings += drawn.warnings
        self._done += 1
        self._progress(self._done)
        return drawn


def _measure(bench: _Bench, rows: list[Row], prompt: str, seed: int, judge: Judge | None) -> None:
    """Append a sample to each row; each prompt begins with another configuration."""
    first = seed % len(rows)
    turns = [*range(first, len(rows)), *range(first)]
    drawn = {turn: bench.draw(rows[turn], prompt, seed) for turn in turns}
    for index, row in enumerate(rows):
        row.samples.append(_sample(drawn[index], drawn[0], prompt, judge))


def _sample(one: RunResult, uncached: RunResult, prompt: str, judge: Judge | None) -> Sample:
    assert one.image is not None
    assert uncached.image is not None
    shown = None if judge is None else bool(judge(one.image, prompt))
    psnr, ssim = likeness(one.image, uncached.image)
    return Sample(one.image, one.seconds, one.macs, one.cache_bytes or 0, psnr, ssim, shown)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decibel(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "identical"


def _size(count: int) -> str:
    if count < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB" if count else "0"
    return f"{count / (1 << 20):.1f} MiB"
