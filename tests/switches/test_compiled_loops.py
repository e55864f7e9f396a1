"""Compiled code beside what only a call itself can decide, loops without a pipeline, and runs that differ."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import block_replays, tiny
from support.compiling import STEPS, Graphs, Way, blocks, counts, draw, eager, flux, graphs, in_place, module, pixart
from support.policies import FirstBlock

import cachekit
from cachekit.errors import AttachmentError

__all__ = ["graphs"]

# -- policies that look at what enters a region, or decide within a call -----------------------------------

LINE = "cache:where=span(first=0,stop=2),when=every(3),what=linear(of=residual)"
PROBE = FirstBlock(limit=0.9)


@pytest.mark.parametrize("specs", [(LINE,), (PROBE,), (PROBE, "tgate:m=3")], ids=str)
def test_compiled_blocks_need_no_further_graph_for_what_happens_between_them(specs: Any, graphs: Graphs) -> None:
    pipe = pixart(2)
    expected, counted = eager(pipe, specs)
    blocks(pipe, backend=graphs, fullgraph=True)
    with cachekit.apply(pipe, specs) as attachment:
        assert torch.equal(draw(pipe), expected)
        assert counts(attachment) == counted
    # The first block's input lies otherwise in memory; `tgate` has two modes within the first, which always runs.
    assert graphs.count <= (2 if len(specs) == 1 else 6)


def test_weights_measured_on_the_model_serve_the_compiled_one(graphs: Graphs, tmp_path: Path) -> None:
    """The steps that are left out need no graph: those that run have the one of a run without policies."""
    pipe = flux()
    plain = draw(pipe)
    path = tmp_path / "weights.json"
    block_replays.measured(pipe, "calibrated:interval=2", STEPS).save(path)
    spec = f"calibrated:file={path}"
    expected, counted = eager(pipe, spec)
    assert not torch.equal(expected, plain)
    in_place(pipe, backend=graphs, fullgraph=True)
    with cachekit.apply(pipe, spec) as attachment:
        assert torch.equal(draw(pipe), expected)
        assert counts(attachment) == counted == [(0, 3, 2, 0)]
    assert torch.equal(draw(pipe), plain)
    assert graphs.count == 1


def test_one_graph_of_the_whole_holds_a_forecast(graphs: Graphs) -> None:
    pipe = pixart(2)
    expected, counted = eager(pipe, (LINE,))
    in_place(pipe, backend=graphs, fullgraph=True)
    with cachekit.apply(pipe, LINE) as attachment:
        for _ in range(2):
            assert torch.equal(draw(pipe), expected)
            assert counts(attachment) == counted
            assert graphs.count == 2  # steps that keep, and that add what was predicted before the call


def test_a_graph_of_the_whole_is_left_for_a_probe(graphs: Graphs) -> None:
    pipe = pixart(2)
    expected, counted = eager(pipe, (PROBE,))
    in_place(pipe, backend=graphs)
    with cachekit.apply(pipe, PROBE) as attachment:
        assert torch.equal(draw(pipe), expected)
        assert counts(attachment) == counted


@pytest.mark.parametrize("way", [in_place, module])
def test_one_graph_of_the_whole_is_refused_in_one_line(way: Way, graphs: Graphs) -> None:
    pipe = pixart(2)
    way(pipe, backend=graphs, fullgraph=True)
    with cachekit.apply(pipe, PROBE), pytest.raises(AttachmentError, match=r"^PixArt[^\n]*out fullgraph$"):
        draw(pipe)


def test_what_else_torch_cannot_compile_is_told_by_torch(graphs: Graphs) -> None:
    pipe = pixart()
    breaking = pipe.transformer.transformer_blocks[0].attn2
    breaking.register_forward_hook(lambda *_: torch._dynamo.graph_break(msg="of the model"))
    in_place(pipe, backend=graphs, fullgraph=True)
    with cachekit.apply(pipe, "tgate:m=3"), pytest.raises(torch._dynamo.exc.Unsupported, match="of the model"):
        draw(pipe)


@pytest.mark.parametrize("specs", [("tgate:m=3",), ("delta_dit:interval=2,first=0,stop=1", "adaptive_guidance:m=3")])
def test_blocks_that_are_replaced_by_what_torch_makes_of_them(specs: Any, graphs: Graphs) -> None:
    pipe = pixart(2)
    plain, (expected, counted) = draw(pipe), eager(pipe, specs)
    with cachekit.apply(pipe, specs) as attachment:
        draw(pipe)
        cost = attachment.report().cost
    blocks = pipe.transformer.transformer_blocks
    for place, block in enumerate(blocks):
        blocks[place] = torch.compile(block, backend=graphs)
    with cachekit.apply(pipe, specs) as attachment:
        assert torch.equal(draw(pipe), expected)
        assert counts(attachment) == counted
        first = graphs.count
        assert torch.equal(draw(pipe), expected)
        kept = attachment.report().record.peak_bytes
        assert attachment.report().cost == cost
    assert graphs.count == first
    assert torch.equal(draw(pipe), plain)
    with cachekit.apply(pipe, specs, max_cache_bytes=kept):
        assert torch.equal(draw(pipe), expected)


def test_blocks_may_be_replaced_by_what_torch_makes_of_them_after_apply(graphs: Graphs) -> None:
    pipe = pixart(2)
    plain, (expected, counted) = draw(pipe), eager(pipe, "tgate:m=3")
    with cachekit.apply(pipe, "tgate:m=3", max_cache_bytes=10**6) as attachment:
        draw(pipe)
        before = attachment.report()
        blocks = pipe.transformer.transformer_blocks
        for place, block in enumerate(blocks):
            blocks[place] = torch.compile(block, backend=graphs)
        assert torch.equal(draw(pipe), expected)
        assert counts(attachment) == counted
        assert attachment.report().cost == before.cost  # both counted on the compiled blocks
    assert graphs.count
    assert torch.equal(draw(pipe), plain)


# -- loops without a pipeline -----------------------------------------------------------------------------


def sample(call: Callable[..., Any]) -> torch.Tensor:
    """Run a guided loop that calls `call` for PixArt's transformer; its latents."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.cat([tiny.text(1, seed=4), tiny.text(1)])
    given = {"encoder_hidden_states": text, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    with torch.no_grad():
        for timestep in torch.arange(900, 400, -100):
            both = call(torch.cat([latents] * 2), timestep=timestep.expand(2), return_dict=False, **given)[0]
            latents = latents - 0.1 * tiny.guide(both)[:, :4]
    return latents


def itself(denoiser: Any, graphs: Graphs) -> Callable[..., Any]:
    denoiser.compile(backend=graphs, fullgraph=True)
    return denoiser


def around(denoiser: Any, graphs: Graphs) -> Callable[..., Any]:
    return torch.compile(denoiser, backend=graphs, fullgraph=True)


def within(denoiser: Any, graphs: Graphs) -> Callable[..., Any]:
    return torch.compile(lambda *args, **kwargs: denoiser(*args, **kwargs), backend=graphs)


@pytest.mark.parametrize(
    ("compiled", "spec", "count"),
    [(itself, "adaptive_guidance:m=2", 2), (around, "tgate:m=2", 3), (within, "adaptive_guidance:m=2", 2)],
)
def test_a_bare_loop_may_compile_after_apply(
    compiled: Callable[..., Any], spec: str, count: int, graphs: Graphs
) -> None:
    denoiser = pixart().transformer
    plain = sample(denoiser)
    with cachekit.apply(denoiser, spec):
        expected = sample(denoiser)
    attachment = cachekit.apply(denoiser, spec)
    call = compiled(denoiser, graphs)
    assert torch.equal(sample(call), expected)
    assert graphs.count == count
    attachment.remove()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(sample(call), plain)
    if compiled is around:  # what torch makes of a denoiser may be given to apply, too
        with cachekit.apply(call, spec):
            assert torch.equal(sample(call), expected)
        assert graphs.count == count


def test_one_graph_around_the_denoiser_is_refused_in_one_line(graphs: Graphs) -> None:
    denoiser = pixart().transformer
    call = torch.compile(lambda *args, **kwargs: denoiser(*args, **kwargs), backend=graphs, fullgraph=True)
    with (
        cachekit.apply(denoiser, "tgate:m=2"),
        pytest.raises(torch._dynamo.exc.Unsupported, match="cachekit intercepts"),
    ):
        sample(call)


# -- what changes from run to run -------------------------------------------------------------------------


def test_pauses_faults_and_other_batches(graphs: Graphs) -> None:
    pipe, other = pixart(), pixart()
    blocks(pipe, backend=graphs, fullgraph=True)
    attachment = cachekit.apply(pipe, "adaptive_guidance:m=2")
    cachekit.apply(other, "adaptive_guidance:m=2")
    first = tiny.latents(pipe, steps=3)
    with attachment.paused():
        assert torch.equal(tiny.latents(pipe, steps=3), tiny.latents(pixart(), steps=3))

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny.latents(pipe, steps=3, callback=fail)
    for given in ({"batch": 2}, {"guidance": 1.0}, {}):
        assert torch.equal(tiny.latents(pipe, steps=3, **given), tiny.latents(other, steps=3, **given))
    assert torch.equal(tiny.latents(pipe, steps=3), first)


def test_two_threads_take_turns(graphs: Graphs) -> None:
    pipe = pixart()
    second = type(pipe)(**pipe.components)
    second.set_progress_bar_config(disable=True)
    second.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with cachekit.apply(pipe, "tgate:m=2"):
        expected = [tiny.latents(pipe, steps=4, seed=seed) for seed in range(2)]
    blocks(pipe, backend=graphs, fullgraph=True)
    cachekit.apply(pipe, "tgate:m=2")
    found: list[Any] = [None, None]

    def draw(place: int, pipe: Any) -> None:
        found[place] = [tiny.latents(pipe, steps=4, seed=place) for _ in range(3)]

    threads = [threading.Thread(target=draw, args=given) for given in enumerate([pipe, second])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, images in enumerate(found):
        assert all(torch.equal(image, expected[place]) for image in images)


@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_controlnet_runs_in_full(before: bool, graphs: Graphs) -> None:
    pipe = tiny.controlled()
    with cachekit.apply(pipe, "deepcache:interval=3"):
        expected = tiny.latents(pipe)
    if before:
        pipe.controlnet.compile(backend=graphs, fullgraph=True)
    with cachekit.apply(pipe, "deepcache:interval=3"):
        if not before:
            pipe.controlnet.compile(backend=graphs, fullgraph=True)
        assert torch.equal(tiny.latents(pipe), expected)
    assert graphs.count == 1
