"""Compiled denoisers do what the plan says: the eager images, and no more graphs than the plan has modes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from test_toy_policies import FirstBlock, Forecast

import cachekit
from cachekit.errors import AttachmentError

STEPS = 5


class Graphs:
    """Count the graphs that torch hands to its backend; they run as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def pixart(layers: int = 1) -> Any:
    return tiny.pixart(layers=layers)


def unet(layers: int = 1) -> Any:
    return tiny.small(layers_per_block=layers)


def convolutions(layers: int = 1) -> Any:
    """Return SD without attention: of the pipelines with branches to skip, it is the quickest to compile."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return tiny.sd(block_out_channels=(8, 8), layers_per_block=layers, mid_block_type=None, **blocks)


MAKERS = {"pixart": pixart, "unet": unet, "convolutions": convolutions}


def compile_blocks(pipe: Any, **how: Any) -> None:
    if hasattr(pipe, "unet"):
        pipe.unet.compile_repeated_blocks(**how)
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile(**how)


def compile_in_place(pipe: Any, **how: Any) -> None:
    tiny.denoiser_of(pipe).compile(**how)


def compile_module(pipe: Any, **how: Any) -> None:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, torch.compile(getattr(pipe, name), **how))


def compile_forward(pipe: Any, **how: Any) -> None:
    denoiser = tiny.denoiser_of(pipe)
    denoiser.forward = torch.compile(denoiser.forward, **how)


# Blocks take two graphs for each mode, as they do without cachekit: the input of the first lies otherwise in memory.
CASES: list[tuple[str, Callable[..., None], bool, tuple[Any, ...], int]] = [
    ("pixart", compile_blocks, True, ("tgate:m=3", "adaptive_guidance:m=2,linear=true"), 2),
    ("pixart", compile_blocks, False, ("tgate:m=3,sp_interval=2,fi_interval=2",), 2),
    ("pixart", compile_in_place, True, ("adaptive_guidance:threshold=-1",), 1),
    ("pixart", compile_in_place, False, ("tgate:m=3",), 1),
    ("pixart", compile_module, True, ("tgate:m=3",), 1),
    ("pixart", compile_module, False, ("adaptive_guidance:m=2",), 1),
    ("pixart", compile_forward, True, ("adaptive_guidance:m=2",), 1),
    ("unet", compile_blocks, False, ("tgate:m=3", "deepcache:interval=2"), 2),
    ("convolutions", compile_in_place, True, ("deepcache:interval=2",), 1),
    ("convolutions", compile_module, False, ("deepcache:interval=2,branch=1", "adaptive_guidance:m=3"), 1),
]


def counts(attachment: Any) -> list[tuple[int, ...]]:
    return [(count.computed, count.stored, count.reused, count.missed) for count in attachment.report().counts]


def eager(pipe: Any, specs: tuple[Any, ...]) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Return a cached image of a denoiser that nobody compiled, and what was counted."""
    with cachekit.apply(pipe, specs) as attachment:
        return tiny.latents(pipe, steps=STEPS), counts(attachment)


@pytest.mark.parametrize(("name", "compile_", "before", "specs", "each"), CASES)
def test_the_image_is_the_eager_one_and_each_mode_is_compiled_once(
    name: str, compile_: Callable[..., None], before: bool, specs: tuple[Any, ...], each: int, graphs: Graphs
) -> None:
    pipe = MAKERS[name](2 if each == 2 else 1)
    plain = tiny.latents(pipe, steps=STEPS)
    expected, counted = eager(pipe, specs)
    if before:
        compile_(pipe, backend=graphs, fullgraph=True)
    attachment = cachekit.apply(pipe, specs)
    if not before:
        compile_(pipe, backend=graphs, fullgraph=True)
    for _ in range(2):
        assert torch.equal(tiny.latents(pipe, steps=STEPS), expected)
        assert counts(attachment) == counted
        # None of them after the first image.
        assert graphs.count <= each * len({row.signature for row in attachment.report().record.rows})
    compiled = graphs.count
    attachment.remove()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)
    with cachekit.apply(pipe, specs):
        assert torch.equal(tiny.latents(pipe, steps=STEPS), expected)
    assert graphs.count == compiled > 0
    assert not torch.equal(expected, plain)


def test_the_graphs_of_before_serve_again_afterwards(graphs: Graphs) -> None:
    pipe = pixart(2)
    compile_blocks(pipe, backend=graphs, fullgraph=True)
    plain = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, "adaptive_guidance:m=2"):
        tiny.latents(pipe, steps=STEPS)
    compiled = graphs.count
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)
    assert graphs.count == compiled


# -- policies that decide within a call -------------------------------------------------------------------

DECIDING = [Forecast(first=0, stop=2, interval=3), FirstBlock(limit=0.9)]


@pytest.mark.parametrize("policy", DECIDING, ids=str)
def test_compiled_blocks_need_no_further_graph_for_what_happens_between_them(policy: Any, graphs: Graphs) -> None:
    pipe = pixart(2)
    expected, counted = eager(pipe, (policy,))
    compile_blocks(pipe, backend=graphs, fullgraph=True)
    with cachekit.apply(pipe, policy) as attachment:
        assert torch.equal(tiny.latents(pipe, steps=STEPS), expected)
        assert counts(attachment) == counted
    assert graphs.count == 2


@pytest.mark.parametrize("policy", DECIDING, ids=str)
def test_a_graph_of_the_whole_is_left_for_it(policy: Any, graphs: Graphs) -> None:
    pipe = pixart(2)
    expected, counted = eager(pipe, (policy,))
    compile_in_place(pipe, backend=graphs)
    with cachekit.apply(pipe, policy) as attachment:
        assert torch.equal(tiny.latents(pipe, steps=STEPS), expected)
        assert counts(attachment) == counted


@pytest.mark.parametrize("compile_", [compile_in_place, compile_module])
def test_one_graph_of_the_whole_is_refused_in_one_line(compile_: Callable[..., None], graphs: Graphs) -> None:
    pipe = pixart(2)
    compile_(pipe, backend=graphs, fullgraph=True)
    with cachekit.apply(pipe, DECIDING[0]), pytest.raises(AttachmentError, match=r"^PixArt[^\n]*out fullgraph$"):
        tiny.latents(pipe, steps=STEPS)


# -- loops without a pipeline -----------------------------------------------------------------------------


def sample(call: Callable[..., Any]) -> torch.Tensor:
    """Return what a guided loop makes that calls `call` for PixArt's transformer."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.cat([tiny.text(1, seed=4), tiny.text(1)])
    given = {"encoder_hidden_states": text, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    with torch.no_grad():
        for timestep in torch.arange(900, 400, -100):
            both = call(torch.cat([latents] * 2), timestep=timestep.expand(2), return_dict=False, **given)[0]
            latents = latents - 0.1 * tiny.guide(both)[:, :4]
    return latents


def in_place(denoiser: Any, graphs: Graphs) -> Callable[..., Any]:
    denoiser.compile(backend=graphs, fullgraph=True)
    return denoiser


def around(denoiser: Any, graphs: Graphs) -> Callable[..., Any]:
    return torch.compile(denoiser, backend=graphs, fullgraph=True)


def within(denoiser: Any, graphs: Graphs) -> Callable[..., Any]:
    return torch.compile(lambda *args, **kwargs: denoiser(*args, **kwargs), backend=graphs)


@pytest.mark.parametrize(
    ("compiled", "spec", "count"),
    [(in_place, "adaptive_guidance:m=2", 2), (around, "tgate:m=2", 3), (within, "adaptive_guidance:m=2", 2)],
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


def test_what_torch_compiled_may_be_given_to_apply(graphs: Graphs) -> None:
    denoiser = pixart().transformer
    with cachekit.apply(denoiser, "tgate:m=2"):
        expected = sample(denoiser)
    call = around(denoiser, graphs)
    with cachekit.apply(call, "tgate:m=2"):
        assert torch.equal(sample(call), expected)


def test_one_graph_around_the_denoiser_is_refused_in_one_line(graphs: Graphs) -> None:
    denoiser = pixart().transformer
    call = torch.compile(lambda *args, **kwargs: denoiser(*args, **kwargs), backend=graphs, fullgraph=True)
    with cachekit.apply(denoiser, "tgate:m=2"), pytest.raises(torch._dynamo.exc.Unsupported, match="cachekit leads"):
        sample(call)


# -- what changes from run to run -------------------------------------------------------------------------


def test_pauses_faults_and_other_batches(graphs: Graphs) -> None:
    pipe, other = pixart(), pixart()
    compile_in_place(pipe, backend=graphs, fullgraph=True)
    attachment = cachekit.apply(pipe, "tgate:m=2")
    cachekit.apply(other, "tgate:m=2")
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
    compile_blocks(pipe, backend=graphs, fullgraph=True)
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
