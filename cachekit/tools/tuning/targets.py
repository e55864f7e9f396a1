"""What is asked of a preset: a quality, a cost, or both."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cachekit.errors import CachekitError
from cachekit.interface.presets import Figures

__all__ = ["LEAST", "Target", "Targets", "TuningError", "similarity_of"]

#: The least saving of a candidate, as a ratio of costs: below it a cache isn't worth having.
LEAST = 1.05
_UNITS = {"s": 1.0, "ms": 1e-3}


class TuningError(CachekitError):
    """A target, a study or captions that tuning can't use."""


@dataclass(frozen=True)
class Target:
    """One bound on a figure: its text, the figure's value, the bound, and whether more is better."""

    text: str
    bound: float
    value: Callable[[Figures], float]
    rises: bool = True
    #: Formats a value as the bound is written.
    shown: str = "{:.3g}"

    def reached(self, figures: Figures) -> bool:
        """Whether figures are within the bound."""
        return self.shortfall(figures) <= 0

    def shortfall(self, figures: Figures) -> float:
        """How far figures are from the bound, relative to it; at most 0 where they are within."""
        value = self.value(figures)
        missing = self.bound - value if self.rises else value - self.bound
        return missing / max(abs(self.bound), 0.01) if math.isfinite(missing) else math.copysign(1e6, missing)


@dataclass(frozen=True)
class Targets:
    """Bounds that must all hold; None where nothing is asked.

    `at_least` is a PSNR in dB to uncached images, `caption_match` the change of the share of images that show their
    captions, such as -0.01, `at_most` seconds for an image, and `speedup` a ratio of wall times.
    """

    at_least: float | None = None
    caption_match: float | None = None
    at_most: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        """Raise `TuningError` where nothing is asked, or a value makes no sense."""
        if not self.listed:
            raise TuningError(
                "no target; give at least one: a similarity (35dB), a caption match (-1%), a time (2s) or a speedup (3)"
            )
        for name, low, high in (
            ("at_least", 0, 200),
            ("caption_match", -1, 1),
            ("at_most", 0, 1e6),
            ("speedup", 1, 1e4),
        ):
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                raise TuningError(f"target {name}={value:g}: out of range; give {low:g} to {high:g}")

    @classmethod
    def parse(
        cls, at_least: str | None, caption_match: str | None, at_most: str | None, speedup: str | None
    ) -> Targets:
        """Read targets as they are written: `35dB`, `-1%`, `2s` or `800ms`, and `3` or `3x`."""
        return cls(
            at_least=_number("at-least", at_least, "dB", "35dB"),
            caption_match=_scaled(_number("caption-match", caption_match, "%", "-1%", needed=True), 0.01),
            at_most=_seconds(at_most),
            speedup=_number("speedup", speedup, "x", "3"),
        )

    @property
    def listed(self) -> list[Target]:
        """The bounds that are asked for."""
        return list(self._all())

    @property
    def by_time(self) -> bool:
        """Whether costs are wall times instead of MACs."""
        return self.at_most is not None or self.speedup is not None

    @property
    def fixes_quality(self) -> bool:
        """Whether a quality is asked for, so that the cheapest that reaches it is the best."""
        return self.at_least is not None or self.caption_match is not None

    def reached(self, figures: Figures) -> bool:
        """Whether all bounds hold."""
        return all(target.reached(figures) for target in self.listed)

    def serves(self, figures: Figures) -> bool:
        """Whether all bounds hold, and something is saved."""
        return self.reached(figures) and self.saving(figures) >= LEAST

    def nearly_serves(self, figures: Figures) -> bool:
        """Whether they would serve if one more image showed its caption: a few images can't show a single point."""
        more = min((figures.caption_match or 0.0) + 1 / max(figures.images, 1), 1.0)
        return self.caption_match is not None and self.serves(figures.model_copy(update={"caption_match": more}))

    def merit(self, figures: Figures) -> tuple[float, float]:
        """Rank figures that reach the targets, by what is to be as great as possible, and then what else."""
        saved, similar = self.saving(figures), similarity_of(figures)
        return (saved, similar) if self.fixes_quality else (similar, saved)

    def saving(self, figures: Figures) -> float:
        """Ratio of the uncached cost to that of the figures."""
        return (figures.speedup if self.by_time else figures.mac_reduction) or 0.0

    def _all(self) -> Iterator[Target]:
        if self.at_least is not None:
            yield Target(f"at least {self.at_least:g} dB", self.at_least, similarity_of, shown="{:.1f} dB")
        if self.caption_match is not None:
            text = f"caption match {self.caption_match:+.1%} or better"
            # Shares of images are fractions that floating point rounds.
            yield Target(text, self.caption_match - 1e-9, _match_gained, shown="{:+.1%} caption match")
        if self.at_most is not None:
            text = f"at most {self.at_most:g} s"
            yield Target(text, self.at_most, lambda one: one.seconds or math.inf, False, "{:.3g} s")
        if self.speedup is not None:
            text = f"{self.speedup:g}x speedup"
            yield Target(text, self.speedup, lambda one: one.speedup or 0.0, shown="{:.2f}x speedup")


def similarity_of(figures: Figures) -> float:
    """PSNR in dB; infinite where most images are identical, and minus infinity where there were none."""
    if figures.psnr is not None:
        return figures.psnr
    return math.inf if figures.ssim == 1.0 else -math.inf


def _match_gained(figures: Figures) -> float:
    if figures.caption_match is None or figures.uncached_caption_match is None:
        return -math.inf
    return figures.caption_match - figures.uncached_caption_match


def _number(name: str, text: str | None, unit: str, example: str, needed: bool = False) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(rf"([+-]?\d+(?:\.\d+)?)\s*({re.escape(unit)})?", text.strip(), re.IGNORECASE)
    if not found or (needed and not found[2]):
        raise TuningError(f"--{name} {text!r}: not a number with its unit; write {example}")
    return float(found[1])


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|ms)", text.strip())
    if not found:
        raise TuningError(f"--at-most {text!r}: not a time; write 2s or 800ms")
    return float(found[1]) * _UNITS[found[2]]
