"""Reuse each block of a UNet while its measured change adds up to little (arXiv 2312.03209)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf
from statistics import fmean
from typing import ClassVar

from pydantic import Field

from cachekit import (
    Choice,
    History,
    Kind,
    Measured,
    Moment,
    Policy,
    Region,
    Reuse,
    Schedule,
    Signal,
    SiteError,
    SiteMap,
    Streams,
    Target,
    Where,
    ends_row,
    relative_change,
)  # fmt: skip


class BlockCache(Policy):
    """Block caching: each block of a UNet is reused while its measured change since the last full step is small.

    c_i = |o_i - o_(i-1)| / |o_i| is by how much a block's output changes in step i. After a full step a, the block is
    reused in steps i = a + 1, a + 2, ... while c_(a+1) + ... + c_i is at most `threshold`. The changes are in `file`,
    which `cachekit calibrate` makes for one model, scheduler and number of steps. Each block has full steps of its own,
    known before the run.
    """

    name: ClassVar[str] = "block_cache"
    summary: ClassVar[str] = "reuse each block of a UNet while its measured change adds up to little"
    paper: ClassVar[str] = "arXiv 2312.03209"

    threshold: float = Field(0.3, ge=0)
    file: str | None = None

    def choices(self) -> Mapping[str, Choice]:
        """Choose the blocks, each on its own."""
        return {"blocks": Choice(UNetBlocks(), BlockChanges(threshold=self.threshold, file=self.file), Reuse())}


class UNetBlocks(Where):
    """The down, middle and up blocks of a UNet."""

    name: ClassVar[str] = "unet_blocks"

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the blocks; raises `SiteError` for a transformer, whose blocks pass on what enters them."""
        blocks = sites.of(Kind.BLOCK)
        if sites.chains or not blocks:
            cure = "smoothcache or delta_dit" if sites.chains else "smoothcache"
            raise SiteError(f"looked for the blocks of a UNet, but {sites.describe()}; use {cure}")
        # FreeU and T2I-Adapter write into what blocks have returned.
        return [Region(site.name, exit=site.name, skipped=(), edited=True) for site in blocks]


class BlockChanges(Measured, Schedule):
    """Full where the measured changes since the last full step add up to more than `threshold`."""

    name: ClassVar[str] = "block_changes"

    threshold: float

    def full(self, at: Moment) -> bool:
        """Whether the step ends a row of reused ones; every step is full without a file."""
        changes = [figures.get(name_of(at), inf) for figures in self.figures]
        return ends_row(at, lambda last: (total <= self.threshold for total in accumulate(changes[last + 1 :])))

    def measure(self, kept: Streams, history: History, at: Moment, signal: Signal | None) -> Mapping[str, float]:
        """Measure by how much a block's output changes from step to step."""
        return {name_of(at): fmean(map(relative_change, entry.tensors[0], kept[0])) for entry in history}


def name_of(at: Moment) -> str:
    """Name the moment's target."""
    assert at.target is not None, "schedules are asked for a target"
    return at.target.name
