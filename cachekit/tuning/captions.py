"""Captions of a tuning: those that the search draws, those of weights, and fresh ones for the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachekit.tuning.targets import TuningError

__all__ = ["Lots", "lots_of"]

#: The most characters of a caption: text encoders read some 77 words, and cut off the rest.
_LONGEST = 1000
#: Fresh captions that an embedded model draws, at least; prompts that weights are made with.
_FRESH, _WEIGHTS = 16, 16


@dataclass(frozen=True)
class Lots:
    """Captions by what they are used for; none of `fresh` is in another lot."""

    search: tuple[str, ...]
    weights: tuple[str, ...]
    fresh: tuple[str, ...]


def lots_of(captions: int | Sequence[str], is_embedded: bool) -> Lots:
    """Share out captions; a number draws as many for the search of an embedded model, and others for the rest.

    Raises `TuningError` where there are too few, or one is empty or too long, with its line.
    """
    if isinstance(captions, int):
        return _drawn(captions, is_embedded)
    texts = [_checked(number, text) for number, text in enumerate(captions, 1)]
    different = tuple(dict.fromkeys(texts))
    half = len(different) // 2
    if half < 1:
        raise TuningError(
            f"{len(different)} different captions: the search and the verdict need some each; give 4 or more"
        )
    return Lots(different[:half], different[:half][:_WEIGHTS], different[half:])


def _drawn(count: int, is_embedded: bool) -> Lots:
    from cachekit.models.demo import heldout_captions

    if not is_embedded:
        raise TuningError(f"captions {count}: numbers are for embedded models; give texts, or a file with one per line")
    if count < 1:
        raise TuningError(f"captions {count}: give a number above 0")
    fresh = max(count, _FRESH)
    drawn = heldout_captions(count + _WEIGHTS + fresh, 0)
    return Lots(tuple(drawn[:count]), tuple(drawn[count : count + _WEIGHTS]), tuple(drawn[count + _WEIGHTS :]))


def _checked(number: int, text: str) -> str:
    if not text.strip():
        raise TuningError(f"captions, line {number}: empty; write one caption per line, of 1 to {_LONGEST} characters")
    if len(text) > _LONGEST:
        raise TuningError(
            f"captions, line {number}: {len(text)} characters; write one caption per line, of 1 to {_LONGEST} characters"
        )
    return text.strip()
