"""Delta-DiT is bit-identical to a naive replay, which runs all blocks and replaces exits by entry plus residual."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DModel, WanPipeline
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_cogview3plus import CogView3PlusTransformerBlock
from diffusers.models.transformers.transformer_hidream_image import HiDreamBlock
from support import tiny
from support.comparisons import compared

import cachekit
from cachekit import Action, Kind
from cachekit.errors import CachekitError, SiteError
from cachekit.tools.coverage.components import make
from cachekit_dit.streams import streams_of, streams_of_all

STEPS = 7


latents = functools.partial(tiny.latents, steps=STEPS)


# -- the same by hand ------------------------------------------------------------------------------------------


class Naive:
    """Delta-DiT for one span: every block runs, and where `skipped` the exit becomes the entry plus what was kept.

    Where each branch has a call of its own, `calls` of them make a step and each keeps for itself.
    """

    def __init__(self, model: Any, blocks: Any, span: range, streams: str, full: Callable, skipped: Callable) -> None:
        self.streams, self.full, self.skipped, self.kept = streams.split(), full, skipped, {}
        self.calls, self.call = 1, -1
        self.signature = inspect.signature(blocks[span.start].forward)
        model.register_forward_pre_hook(self.begin)
        blocks[span.start].register_forward_pre_hook(self.enter, with_kwargs=True)
        blocks[span.stop - 1].register_forward_hook(self.leave)

    def begin(self, _module: Any, _inputs: Any) -> None:
        self.call += 1
        self.step, self.branch = divmod(self.call, self.calls)

    def enter(self, _: Any, args: Any, kwargs: Any) -> None:
        given = self.signature.bind(*args, **kwargs).arguments
        self.entry = [given[name] for name in self.streams]

    def leave(self, _module: Any, _inputs: Any, output: Any) -> Any:
        left = output if isinstance(output, tuple) else (output,)
        if self.full(self.step):
            self.kept[self.branch] = [None if out is None else out - into for out, into in zip(left, self.entry)]
        if not self.skipped(self.step):
            return None
        added = self.kept[self.branch]
        streams = [None if one is None else into + one for into, one in zip(self.entry, added)]
        return tuple(streams) if isinstance(output, tuple) else streams[0]


def by_hand(pipe: Any, chain: str, streams: str, back: range, front: range, boundary: int, full: Callable) -> Any:
    """Make the transformer of `pipe` follow the method naively; `full` is whether a step is full."""
    model, blocks = pipe.transformer, getattr(pipe.transformer, chain)
    early = Naive(model, blocks, back, streams, full, lambda step: step < boundary and not full(step))
    late = Naive(model, blocks, front, streams, full, lambda step: step >= boundary and not full(step))
    early.calls = late.calls = 2 if isinstance(pipe, WanPipeline) else 1
    return pipe


def every(interval: int) -> Callable[[int], bool]:
    return lambda step: step % interval == 0


# -- equal to the bit, undone, and equal again -------------------------------------------------------------------

BOTH = "encoder_hidden_states hidden_states"
ONE = "hidden_states"
PIXART, DIT, SD3 = ((chain, "transformer_blocks") for chain in (tiny.pixart, tiny.dit, tiny.sd3))
WAN = (tiny.wan, "blocks")
DOUBLE, SINGLE = (tiny.flux, "transformer_blocks"), (tiny.flux, "single_transformer_blocks")
NONE = range(1)

CASES = {
    "delta_dit": (*PIXART, ONE, range(1, 3), range(2), 3, every(2)),
    "delta_dit:boundary=4,interval=3": (*DIT, ONE, range(1, 3), range(2), 4, every(3)),
    "delta_dit:blocks=1,boundary=0": (*PIXART, ONE, range(2, 3), range(1), 0, every(2)),
    "delta_dit:blocks=1,boundary=5,interval=4": (*PIXART, ONE, range(2, 3), range(1), 5, every(4)),
    "delta_dit:blocks=3": (*PIXART, ONE, range(3), NONE, 99, every(2)),
    "delta_dit:first=1,stop=2": (*PIXART, ONE, range(1, 2), NONE, 99, every(2)),
    "delta_dit:first=1": (*DIT, ONE, range(1, 3), NONE, 99, every(2)),
    "delta_dit:stop=1": (*DIT, ONE, range(1), NONE, 99, every(2)),
    "delta_dit:boundary=3": (*SD3, BOTH, range(1, 4), range(3), 3, every(2)),
    "delta_dit:first=1,interval=3,stop=3": (*SD3, BOTH, range(1, 3), NONE, 99, every(3)),
    "delta_dit:interval=2": (*SINGLE, BOTH, range(1, 4), range(3), 3, every(2)),
    "delta_dit:boundary=2": (*WAN, ONE, range(1, 4), range(3), 2, every(2)),
    "delta_dit:interval=3,stop=2": (*WAN, ONE, range(2), NONE, 99, every(3)),
    "delta_dit:blocks=1,chain=0,interval=3": (*DOUBLE, BOTH, range(1, 2), range(1), 3, every(3)),
}


def cell_counts(report: Any) -> tuple[int, int, int]:
    (count,) = (count for count in report.counts if count.kind == "block")
    return count.stored, count.reused, count.missed


def planned(attachment: Any, calls: int) -> tuple[int, int, int]:
    cells = [action for row in attachment.plan(STEPS).rows for action in row.actions]
    return calls * cells.count(Action.STORE), calls * cells.count(Action.REUSE), 0


@compared("delta_dit", "a replay", ["pixart", "dit", "sd3"])
@pytest.mark.parametrize(("spec", "case"), CASES.items(), ids=CASES)
def test_equal_to_the_naive_replay(spec: str, case: tuple[Any, ...]) -> None:
    make, *replay = case
    pipe = make()
    plain = latents(pipe)
    expected = latents(by_hand(copy.deepcopy(pipe), *replay))
    for _ in range(2):
        with cachekit.apply(pipe, spec) as attachment:
            assert torch.equal(latents(pipe), expected)
            report = attachment.report()
            assert cell_counts(report) == planned(attachment, calls=2 if make is tiny.wan else 1)
            assert report.cache_bytes > 0
        assert torch.equal(latents(pipe), plain)
    assert not torch.equal(expected, plain)
    assert report.macs < report.baseline_macs


def test_an_interval_of_one_changes_nothing() -> None:
    pipe = tiny.pixart()
    plain = latents(pipe)
    with cachekit.apply(pipe, "delta_dit:interval=1") as attachment:
        assert torch.equal(latents(pipe), plain)
        assert attachment.report().cache_bytes == 0


@pytest.mark.parametrize(
    ("others", "half", "full"),
    [
        # The gate needs the last guided step; with fewer branches a new phase begins.
        (("tgate:m=3",), 0, [0, 2, 3, 5]),
        (("tgate:m=4",), 0, [0, 2, 3, 4, 6]),
        (("adaptive_guidance:m=3",), 1, [0, 2, 3, 5]),
        (("adaptive_guidance:m=4",), 1, [0, 2, 4, 6]),
    ],
)
def test_together_with_a_policy_that_drops_a_branch(others: tuple[str, ...], half: int, full: list[int]) -> None:
    pipe = tiny.pixart()
    m = int(others[0][-1])
    twin = tiny.narrowed_by_hand(copy.deepcopy(pipe), m, half, gated="tgate" in others[0])
    expected = latents(by_hand(twin, PIXART[1], ONE, range(1, 3), range(2), 3, full.__contains__))
    with cachekit.apply(pipe, [*others, "delta_dit"]) as attachment:
        assert torch.equal(latents(pipe), expected)
        assert full_steps(attachment.plan(STEPS)) == full
        assert cell_counts(attachment.report())[2] == 0


@compared("delta_dit", "a replay", ["wan"])
@pytest.mark.parametrize(("m", "full"), [(3, [0, 2, 3, 5]), (4, [0, 2, 4, 6])])
def test_a_branch_with_calls_of_its_own_is_dropped(m: int, full: list[int]) -> None:
    pipe = tiny.wan()
    plain, twin = latents(pipe), copy.deepcopy(pipe)
    whole, calls, last = twin.transformer.forward, itertools.count(), {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, branch = divmod(next(calls), 2)
        if branch == 0 or step < m:
            last["output"] = whole(*args, **kwargs)
        return last["output"]

    twin.transformer.forward = forward
    expected = latents(by_hand(twin, "blocks", ONE, range(1, 4), range(3), 3, full.__contains__))
    with cachekit.apply(pipe, [f"adaptive_guidance:m={m}", "delta_dit"]) as attachment:
        assert torch.equal(latents(pipe), expected)
        report = attachment.report()
        assert full_steps(attachment.plan(STEPS)) == full
    assert torch.equal(latents(pipe), plain)
    assert cell_counts(report)[2] == 0
    assert sum(not made.dropped for made in report.record.calls) == STEPS + m


def full_steps(plan: Any) -> list[int]:
    """The steps on which no block is skipped."""
    blocks = [index for index, bound in enumerate(plan.assignments) if bound.target.kind is Kind.BLOCK]
    return [row.step for row in plan.rows if all(row.actions[index] is not Action.REUSE for index in blocks)]


@pytest.mark.parametrize("interval", [2, 3])
def test_a_forced_full_step_begins_a_new_phase_for_both_spans(interval: int) -> None:
    """Without guidance nothing else realigns them, and a span out of step would find nothing kept."""
    pipe = tiny.pixart()
    full = {2: [0, 2, 3, 5], 3: [0, 3, 6]}[interval]
    twin = copy.deepcopy(pipe)
    gate = tiny.TgateByHand(twin.transformer)
    counted = twin.transformer.register_forward_pre_hook(gated_from(gate, 4))
    expected = latents(by_hand(twin, PIXART[1], ONE, range(1, 3), range(2), 5, full.__contains__), guidance=1.0)
    counted.remove()
    with cachekit.apply(pipe, ["tgate:m=4", f"delta_dit:boundary=5,interval={interval}"]) as attachment:
        assert torch.equal(latents(pipe, guidance=1.0), expected)
        assert full_steps(attachment.plan(STEPS, guided=False)) == full
        assert cell_counts(attachment.report())[2] == 0


def gated_from(gate: tiny.TgateByHand, m: int) -> Callable[..., None]:
    calls = itertools.count(1)

    def begin_call(*_: Any) -> None:
        call = next(calls)
        gate.mode = "reuse" if call > m else "keep" if call == m else ""

    return begin_call


# -- which blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("delta_dit:first=2,stop=2", "delta_dit:first=2,stop=2: 0 blocks up to block 1, but chain 0 of PixArt"),
        ("delta_dit:blocks=4", "delta_dit:blocks=4: 4 blocks up to block 2, but chain 0 of PixArt"),
        ("delta_dit:stop=4", "delta_dit:stop=4: 4 blocks up to block 3, but chain 0 of PixArt"),
        ("delta_dit:chain=1", "delta_dit:chain=1: chain=1, but PixArtTransformer2DModel has chains 0..0"),
        ("delta_dit:boundary=3,first=1", "first and stop exclude blocks and boundary"),
    ],
)
def test_a_span_that_does_not_exist(spec: str, message: str) -> None:
    pipe = tiny.pixart()
    with pytest.raises(CachekitError, match=re.escape(message)) as error:
        cachekit.apply(pipe, spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [tiny.sd3, tiny.flux])
def test_tgate_on_joint_attention_names_what_to_use(make: Any) -> None:
    pipe = make()
    with (
        tiny.leaves_no_trace(pipe),
        pytest.raises(SiteError, match=r"joint_attention x \d.*; TGATE needs .*: use delta_dit or adaptive_guidance$"),
    ):
        cachekit.apply(pipe, "tgate")


def test_on_a_unet_it_names_the_policy_to_use_and_the_other_way_round() -> None:
    with pytest.raises(SiteError, match=r"delta_dit: looked for a chain of blocks, but UNet.*; use where=region$"):
        cachekit.apply(tiny.small(), "delta_dit")
    with pytest.raises(SiteError, match=r"deepcache: looked for paired down and up blocks, .*; use where=span$"):
        cachekit.apply(tiny.pixart(), "deepcache")


def test_where_later_blocks_read_earlier_ones_there_is_no_chain() -> None:
    widths = {"hidden_size": 16, "cross_attention_dim": 16, "pooled_projection_dim": 8, "cross_attention_dim_t5": 8}
    sizes = {"sample_size": 8, "patch_size": 2, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
    model = HunyuanDiT2DModel(in_channels=4, **sizes, **widths)
    with pytest.raises(
        SiteError, match=r"a chain of blocks, but HunyuanDiT2DModel has .*; use a policy for attention or guidance$"
    ):
        cachekit.apply(model, "delta_dit")


def known_blocks() -> Iterator[tuple[type, tuple[str, ...]]]:
    """Yield block classes, and their streams according to diffusers."""
    with pytest.raises(ValueError, match="not registered"):
        TransformerBlockRegistry.get(object)
    for cls, known in TransformerBlockRegistry._registry.items():
        named = {
            known.return_hidden_states_index: known.hidden_states_argument_name,
            known.return_encoder_hidden_states_index: known.encoder_hidden_states_argument_name,
        }
        yield cls, tuple(named[place] for place in (0, 1) if place in named)


#: Where diffusers' registry is wrong: the class returns its text stream too; the class calls its input x.
WRONG = {"BriaTransformerBlock": ("encoder_hidden_states", "hidden_states"), "ZImageTransformerBlock": ("x",)}


def test_the_streams_read_from_a_block_are_those_that_diffusers_registers() -> None:
    found = {cls.__name__: streams_of(object.__new__(cls)) for cls, _ in known_blocks()}
    assert len(found) > 20
    assert found == {cls.__name__: WRONG.get(cls.__name__, known) for cls, known in known_blocks()}


def test_streams_of_blocks_that_diffusers_does_not_register() -> None:
    """Their order differs from class to class."""
    for cls, expected in {CogView3PlusTransformerBlock: ONE + " encoder_" + ONE, HiDreamBlock: ONE}.items():
        assert " ".join(streams_of(object.__new__(cls))) == expected


def test_a_block_around_another_carries_on_its_streams() -> None:
    denoiser = make({"use": "HiDreamImageTransformer2DModel"})
    double, single = denoiser.double_stream_blocks[0], denoiser.single_stream_blocks[0]
    assert (streams_of(double), streams_of(single)) == (("hidden_states", "encoder_hidden_states"), ("hidden_states",))


def test_a_chain_of_unlike_blocks_carries_on_what_all_do() -> None:
    denoiser = make({"use": "WuerstchenPrior"})
    assert streams_of_all(list(denoiser.blocks)) == ("x",)
    assert streams_of_all([denoiser.blocks[0], object.__new__(HiDreamBlock)]) == ()


# -- what it costs -----------------------------------------------------------------------------------------------


def test_the_estimate_gives_the_published_speedup() -> None:
    """20 steps, every second one full, three quarters of the blocks: 1.6 times fewer (the paper's abstract)."""
    found = cachekit.estimate("pixart-alpha", "delta_dit", num_inference_steps=20)
    assert 1.59 < found.mac_reduction < 1.6
    assert len({step.macs for step in found.steps}) == 2
    branches, tokens, width, bytes_each = 2, 64 * 64, 1152, 2
    # One residual: that of the front blocks is let go of before that of the rear ones is kept.
    assert found.cache_bytes == branches * tokens * width * bytes_each


def test_the_estimate_equals_what_a_run_counts() -> None:
    pipe = tiny.pixart()
    spec = "delta_dit:boundary=3,interval=3"
    with cachekit.apply(pipe, spec) as attachment:
        latents(pipe)
        report = attachment.report()
    (((sample,), named),) = report.record.inputs.values()
    inputs = {"hidden_states": sample, **named}
    found = cachekit.estimate(pipe, spec, num_inference_steps=STEPS, inputs=inputs)
    assert (found.macs, found.baseline_macs) == (report.macs, report.baseline_macs)
    assert found.cache_bytes == report.cache_bytes
