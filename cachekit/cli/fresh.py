"""Prompts to verify a calibration on, which it wasn't made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachekit.errors import CachekitError

#: Seed of the held-out captions, which is another than that of the numbers given as `--prompts`.
_SEED = 1
#: Most held-out captions where no number is given.
_MOST = 16


@dataclass(frozen=True)
class Fresh:
    """Prompts, and what they are."""

    texts: tuple[str, ...]
    description: str


def fresh_prompts(source: str | None, made_with: Sequence[str], model: str) -> Fresh:
    """Read prompts from what `read_captions` takes, of which none may be in `made_with`.

    A number gives held-out captions, as no source does for an embedded model. Raises `CachekitError` where another
    model has no source, or a prompt isn't fresh.
    """
    from cachekit.models.names import DEMOS, canonical
    from cachekit.tools.bench.captions import read_captions

    if source is None and canonical(model) not in DEMOS:
        raise CachekitError(
            "calibrate: --verify needs prompts that the calibration isn't made with; give --verify-prompts FILE"
        )
    count = min(len(made_with), _MOST) if source is None else int(source) if source.isdecimal() else 0
    if count:
        return _held_out(count, made_with)
    found = read_captions(str(source)).texts
    known = [text for text in found if text in set(made_with)]
    if known:
        raise CachekitError(
            f"calibrate: --verify-prompts {source}: {len(known)} of {len(found)} are among the prompts of the"
            f" calibration, such as {known[0]!r}; give others"
        )
    return Fresh(found, f"{len(found)} prompts of {source}")


def _held_out(count: int, made_with: Sequence[str]) -> Fresh:
    from cachekit.models.demo import heldout_captions

    drawn = heldout_captions(count + len(made_with), _SEED)
    texts = [text for text in drawn if text not in set(made_with)]
    return Fresh(tuple(texts[:count]), f"{count} held-out captions")
