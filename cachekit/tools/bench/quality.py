"""Learned image metrics, with weights from local files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachekit.errors import nearest
from cachekit.tools.bench.cells import BenchError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["METRICS", "Metric", "load_metrics", "parse_metrics"]

#: Scores an image, given the uncached image and the caption of both.
Metric = Callable[["Image", "Image", str], float]


def parse_metrics(texts: Iterable[str], known: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Parse texts such as `lpips=alexnet.pth` into sorted (name, path) pairs; no weights are loaded.

    Raises `BenchError` for a name that is not in `known` and for a path that does not exist.
    """
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if name not in known:
            raise BenchError(f"unknown metric {name!r}{nearest(name, known)}; known here: {', '.join(known)}")
        if not equals or not Path(path).exists():
            raise BenchError(f"metric {text!r}: give the path of its weights, {name}=PATH")
        found[name] = path
    return tuple(sorted(found.items()))


def load_metrics(chosen: Iterable[tuple[str, str]], device: Any) -> dict[str, Metric]:
    """Load the metrics of (name, path) pairs."""
    return {name: METRICS[name](path, device) for name, path in chosen}


def _lpips(path: str, device: Any) -> Metric:
    from cachekit.tools.bench.learned import lpips

    judge = lpips(path, device)
    return lambda image, reference, caption: judge(image, reference)


def _clip(path: str, device: Any) -> Metric:
    from cachekit.tools.bench.learned import clip_score

    judge = clip_score(path, device)
    return lambda image, reference, caption: judge(image, caption)


METRICS: dict[str, Callable[[str, Any], Metric]] = {"clip": _clip, "lpips": _lpips}
