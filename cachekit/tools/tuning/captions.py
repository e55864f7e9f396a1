"""Captions of a tuning: those that the search draws, those of weights, and fresh ones for the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachekit.tools.bench.captions import cut_off, not_a_scene
from cachekit.tools.tuning.targets import TuningError

__all__ = ["Lots", "check_lengths", "lots_of"]

#: The most characters of a caption, whatever the text encoder.
_LONGEST = 1000
#: Fresh captions that an embedded model draws, at least; prompts that weights are made with.
_FRESH, _WEIGHTS = 16, 16


@dataclass(frozen=True)
class Lots:
    """Captions by what they are used for; none of `fresh` is in another lot."""

    search: tuple[str, ...]
    weights: tuple[str, ...]
    fresh: tuple[str, ...]


def lots_of(captions: int | Sequence[str], fresh: int | None, is_embedded: bool) -> Lots:
    """Share out captions; a number draws as many for the search of an embedded model, and others for the rest.

    Of texts, the last `fresh` are kept for the verdict, by default half.

    Raises `TuningError` where there are too few, or one is empty or too long, with its line; for an embedded model also
    where images can't be checked against one.
    """
    if isinstance(captions, int):
        return _drawn(captions, fresh, is_embedded)
    texts = [_checked(number, text) for number, text in enumerate(captions, 1)]
    for number, text in enumerate(texts if is_embedded else (), 1):
        if reason := not_a_scene(text):
            raise TuningError(f"captions, line {number}: {reason}; or give a number of held-out captions")
    different = tuple(dict.fromkeys(texts))
    kept = -(-len(different) // 2) if fresh is None else fresh
    if not 0 < kept < len(different):
        raise TuningError(
            f"of {len(different)} different captions {kept} are for the verdict, and none would be left for the search;"
            " give more, or lower fresh"
        )
    return Lots(different[:-kept], different[:-kept][:_WEIGHTS], different[-kept:])


def _drawn(count: int, fresh: int | None, is_embedded: bool) -> Lots:
    from cachekit.models.demo import heldout_captions

    if not is_embedded:
        raise TuningError(f"captions {count}: numbers are for embedded models; give texts, or a file with one per line")
    if count < 1:
        raise TuningError(f"captions {count}: give a number above 0")
    if fresh is not None and fresh < 1:
        raise TuningError(f"fresh={fresh}: give a number above 0")
    drawn = heldout_captions(count + _WEIGHTS + (fresh or max(count, _FRESH)), 0)
    return Lots(tuple(drawn[:count]), tuple(drawn[count : count + _WEIGHTS]), tuple(drawn[count + _WEIGHTS :]))


def check_lengths(captions: Sequence[str], pipe: Any) -> None:
    """Raise `TuningError` for the first caption that every text encoder of a pipeline would cut off."""
    for number, text in enumerate(captions, 1):
        if reason := cut_off(text, pipe):
            raise TuningError(f"captions, line {number}: {reason}; shorten it")


def _checked(number: int, text: str) -> str:
    wrong = "empty" if not text.strip() else f"{len(text)} characters" if len(text) > _LONGEST else ""
    if wrong:
        raise TuningError(
            f"captions, line {number}: {wrong}; write one caption per line, of 1 to {_LONGEST} characters"
        )
    return text.strip()
