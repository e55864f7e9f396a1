"""Compiled denoisers follow the plan: the eager images, and no more graphs than the plan has modes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiling import (
    Graphs,
    Way,
    blocks,
    convolutions,
    counts,
    draw,
    eager,
    flux,
    forward,
    graphs,
    in_place,
    module,
    pixart,
    unet,
)

import cachekit

__all__ = ["graphs"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "measurements.md"
RESIDUAL = "delta_dit:interval=2,first=0,stop=1"
WAYS = {
    blocks: "repeated blocks",
    in_place: "`denoiser.compile()`",
    module: "`torch.compile(denoiser)`",
    forward: "its `forward`",
}

# The denoiser, how it is compiled, whether that comes before `apply`, and the policies.
CASES: list[tuple[Callable[[], Any], Way, bool, tuple[str, ...]]] = [
    (unet, blocks, True, ("tgate:m=3",)),
    (unet, blocks, False, ("tgate:m=3", "deepcache:interval=2")),
    (unet, in_place, True, ("tgate:m=3", "deepcache:interval=2")),
    (convolutions, module, True, ("deepcache:interval=3,branch=1",)),
    (convolutions, in_place, True, ("adaptive_guidance:m=2",)),
    (pixart, blocks, False, ("tgate:m=3",)),
    (pixart, blocks, True, ("adaptive_guidance:m=2,linear=true",)),
    (pixart, module, True, ("adaptive_guidance:threshold=-1",)),
    (pixart, forward, True, ("adaptive_guidance:m=2",)),
    (pixart, in_place, True, (RESIDUAL,)),
    (pixart, module, False, ("tgate:m=3", RESIDUAL)),
    (flux, blocks, True, (RESIDUAL,)),
    (flux, in_place, False, (RESIDUAL,)),
]


def row(make: Callable[[], Any], way: Way, before: bool, specs: tuple[str, ...], modes: int, found: list[int]) -> str:
    """Format a line of the document's table."""
    order = f"{WAYS[way]}, {'before' if before else 'after'} `apply`"
    name = {unet: "UNet", convolutions: "UNet without attention", pixart: "PixArt", flux: "Flux"}[make]
    policies = " + ".join(f"`{spec}`" for spec in specs)
    return f"| {name} | {order} | {policies} | {modes} | {' | '.join(map(str, found))} |"


def documented() -> list[str]:
    (table,) = re.findall(r"<!-- graphs table: begin -->\n(.*?)<!-- graphs table: end -->", DOCUMENT.read_text(), re.S)
    return table.splitlines()[2:]


@pytest.mark.parametrize(("make", "way", "before", "specs"), CASES)
def test_the_image_is_the_eager_one_and_each_mode_is_compiled_once(
    make: Callable[[], Any], way: Way, before: bool, specs: tuple[str, ...], graphs: Graphs
) -> None:
    pipe = make()
    plain = draw(pipe)
    expected, counted = eager(pipe, specs)
    assert not torch.equal(expected, plain)
    if before:
        way(pipe, backend=graphs, fullgraph=True)
        assert torch.equal(draw(pipe), plain)
    uncached = graphs.count
    attachment = cachekit.apply(pipe, specs)
    if not before:
        way(pipe, backend=graphs, fullgraph=True)
    first = 0
    for _ in range(2):
        assert torch.equal(draw(pipe), expected)
        assert counts(attachment) == counted
        first = first or graphs.count
    cached = graphs.count - uncached
    modes = len({step.signature for step in attachment.report().record.rows})
    attachment.remove()
    assert torch.equal(draw(pipe), plain)
    uncached = uncached or graphs.count - cached
    for _ in range(2):
        with cachekit.apply(pipe, specs):
            assert torch.equal(draw(pipe), expected)
    assert graphs.count == uncached + cached
    assert (uncached if before else 0) + cached == first  # none after the first image
    assert cached <= uncached * modes
    assert row(make, way, before, specs, modes, [uncached, cached]) in documented()


def test_the_document_has_these_rows_alone() -> None:
    assert len(documented()) == len(CASES)
