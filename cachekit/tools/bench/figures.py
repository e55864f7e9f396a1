"""The figures of rows: each declared once, with its key, its heading, its text and its meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cachekit.amounts import size
from cachekit.tools.bench.summary import Row

__all__ = ["FIGURES", "Figure", "decimals", "size"]


def decimals(value: float) -> str:
    """Format a number with three decimals."""
    return f"{value:.3f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "identical"


@dataclass(frozen=True)
class Figure:
    """A figure of a row, as every table, page and JSON file shows it."""

    #: The attribute of a row, and the key in JSON.
    key: str
    #: The heading of its column.
    name: str
    #: Formats a value.
    format: Callable[[float], str]
    #: What it is, for the legend; empty where the heading says it.
    meaning: str = ""
    #: The attribute of a row with the number of images behind it, where that stands beside the value.
    images: str | None = None

    def value(self, row: Row) -> float | None:
        """Value for a row, None where it was not measured."""
        found: float | None = getattr(row, self.key)
        return found

    def text(self, row: Row) -> str:
        """Text of its cell in a table."""
        value = self.value(row)
        if value is None:
            return "-"
        return self.format(value) + (f" (n={getattr(row, self.images)})" if self.images else "")


_DECLARED = (
    Figure("seconds", "s/image", decimals, "median wall time of one image"),
    Figure("spread", "spread", decimals, "interquartile range of the wall time"),
    Figure("first_seconds", "first", decimals, "wall time of the first run, which counts towards no other figure"),
    Figure("speedup", "speedup", _ratio, "median ratio of the uncached wall time to that of the image beside it"),
    Figure(
        "macs",
        "GMACs",
        lambda value: decimals(value / 1e9),
        "multiply-accumulates of the denoiser's Linear and convolution layers, in units of 1e9",
    ),
    Figure("mac_reduction", "MAC reduction", _ratio, "ratio of the uncached GMACs to those of the row"),
    Figure("psnr", "PSNR", _decibels, "median similarity to the uncached image, in dB"),
    Figure("ssim", "SSIM", decimals, "median structural similarity to the uncached image, at most 1"),
    Figure(
        "caption_match",
        "caption match",
        "{:.0%}".format,
        "share of n images that show all that their caption says",
        images="checked_images",
    ),
    Figure(
        "frechet",
        "Frechet",
        "{:.2f}".format,
        "distance of n images to scenes rendered from the same captions, which grows as n falls",
        images="frechet_images",
    ),
    Figure("cache_bytes", "kept", size, "peak size of cached tensors"),
    Figure("deciding_seconds", "deciding", lambda value: f"{value * 1e3:.1f} ms", "time policies took to decide"),
    Figure("reused", "reused", "{:.0f}".format, "reuses in the first image"),
    Figure("peak_memory", "peak memory", size),
)

#: Each figure by its key, in the order of columns.
FIGURES = {figure.key: figure for figure in _DECLARED}
