"""Indicators: what they are shown on each family of models, what is refused, and that `took` misses no call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from support import block_replays as replays
from support import tiny

import cachekit
from cachekit import (
    Choice,
    Indicator,
    Modulated,
    Moment,
    Policy,
    PolicyError,
    Reuse,
    Signal,
    SiteError,
    SiteMap,
    Span,
    Streams,
    Tail,
    Target,
    Where,
    WholeDenoiser,
)
from cachekit.amounts import size
from cachekit.interface.sites import region_of

STEPS = 6


class Scripted(Indicator):
    """Full in step 0, and where `needed` has the step; each call is noted for the report."""

    name: ClassVar[str] = "scripted"
    needed: tuple[int, ...] = ()

    def full(self, at: Moment) -> bool:
        return at.step == 0

    def needs(self, signal: Signal, at: Moment) -> bool:
        return at.step in self.needed

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        shown = [[tuple(tensor.shape) for tensor in streams] for streams in signal]
        at.shared.setdefault("trace", []).append((at.step, at.branches, full, *shown))

    def learn(self, output: Streams, signal: Signal, at: Moment) -> None:
        at.shared["trace"].append((at.step, "learned", [tuple(tensor.shape) for tensor in output]))


class Scripting(Policy):
    """A scripted indicator at some place."""

    name: ClassVar[str] = "scripting"
    summary: ClassVar[str] = "a scripted indicator"
    at: Where = Tail()
    needed: tuple[int, ...] = ()
    when_: Indicator | None = None

    def choices(self) -> dict[str, Choice]:
        return {"choice": Choice(self.at, self.when_ or Scripted(needed=self.needed), Reuse(of="residual"))}


def trace(pipe: Any, *policies: Any, **changes: Any) -> list[Any]:
    with cachekit.apply(pipe, policies) as attachment:
        tiny.latents(pipe, steps=STEPS, **changes)
        return attachment.report().traces["scripting"]


# -- which blocks, and what they show ------------------------------------------------------------------------------

IMAGE, TEXT = (1, 16, 32), (1, 7, 32)
TAILS = {
    "sd3": (tiny.sd3, "transformer_blocks.1", "transformer_blocks.3", "transformer_blocks.0"),
    "flux": (tiny.flux, "transformer_blocks.1", "single_transformer_blocks.3", "transformer_blocks.0"),
    "pixart": (tiny.pixart, "transformer_blocks.1", "transformer_blocks.2", "transformer_blocks.0"),
    "wan": (tiny.wan, "blocks.1", "blocks.3", "blocks.0"),
}
FIRST = {"sd3": "transformer_blocks.0.attn", "flux": "transformer_blocks.0.attn"}
FIRST |= {"pixart": "transformer_blocks.0.attn1", "wan": "blocks.0.attn1"}


@pytest.mark.parametrize("name", TAILS)
def test_the_blocks_and_the_probe(name: str) -> None:
    make, entry, exit_, probe = TAILS[name]
    (sites,) = cachekit.sites(make()).values()
    (tail,) = Tail().find(sites)
    assert (tail.entry, tail.exit, tail.probe, tail.early) == (entry, exit_, probe, False)
    assert not tail.covers(probe)
    (whole,) = Modulated().find(sites)
    assert (whole.entry, whole.exit, whole.probe, whole.early) == (probe, exit_, FIRST[name], True)
    assert whole.skipped[0] == FIRST[name]
    assert probe not in whole.skipped, "the first block runs up to its first attention"
    (later,) = Tail(m=2).find(sites)
    assert (later.probe, later.exit) == (entry, exit_)


@pytest.mark.parametrize("place", [Tail(), Modulated()], ids=["tail", "modulated"])
@pytest.mark.parametrize("name", TAILS)
def test_signals_are_those_of_hooks(name: str, place: Where) -> None:
    """Hidden states come first, though blocks of Flux and SD3 return the text before them."""
    make = TAILS[name][0]

    class Seen(replays.Replay):
        def is_full(self) -> bool:
            self.memory.setdefault("seen", []).append((self.entered, getattr(self, "left", None)))
            return True

    hand = Seen(make(), 1 if isinstance(place, Tail) else 0)
    hand.latents(STEPS)
    found: list[Signal] = []

    class Watching(Scripted):
        def took(self, signal: Signal, at: Moment, full: bool) -> None:
            if at.branch != "uncond":
                found.append(signal)

    pipe = make()
    with cachekit.apply(pipe, Scripting(at=place, when_=Watching(needed=tuple(range(STEPS))))):
        tiny.latents(pipe, steps=STEPS)
    assert len(found) == STEPS
    for signal, (entered, left) in zip(found, hand.memories[0]["seen"]):
        assert torch.equal(signal.entered[0], entered)
        assert (not signal.left) if left is None else torch.equal(signal.left[0], left)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "place", "said"),
    [
        (tiny.small, Tail(), "looked for a chain of blocks, but UNet2DConditionModel has"),
        (tiny.small, Modulated(), "looked for a chain of blocks, but UNet2DConditionModel has"),
        (
            lambda: tiny.pixart(layers=1),
            Tail(),
            "m=1, but PixArtTransformer2DModel has 1 blocks in a row; give a",
        ),
        (tiny.pixart, Tail(m=3), "m=3, but PixArtTransformer2DModel has 3 blocks in a row; give a smaller m"),
        (lambda: tiny.pixart(layers=1), Modulated(), "looked for an attention in the first of two blocks, but PixArt"),
        (tiny.pixart, Span(), "which 'transformer_blocks.0..transformer_blocks.2' lacks; use where=tail, modulated or"),
    ],
)
def test_a_place_without_a_signal_is_refused_in_a_line(make: Any, place: Where, said: str) -> None:
    pipe = make()
    with tiny.leaves_no_trace(pipe), pytest.raises(SiteError) as caught:
        cachekit.apply(pipe, Scripting(at=place))
    assert said in str(caught.value)
    assert str(caught.value).startswith("scripting")
    assert "\n" not in str(caught.value)


class Tensors(Scripted):
    """An indicator whose answer is a tensor instead of a bool."""

    name: ClassVar[str] = "tensors"

    def needs(self, signal: Signal, at: Moment) -> bool:
        return signal.entered[0] > 0


@pytest.mark.parametrize(
    ("make", "place", "target"),
    [
        (tiny.pixart, Tail(), "transformer_blocks.1..transformer_blocks.2"),
        (tiny.flux, Modulated(), "transformer_blocks.0..single_transformer_blocks.3"),
        (tiny.sd, WholeDenoiser(), "denoiser"),
    ],
)
def test_a_tensor_in_place_of_a_truth_is_refused_in_a_line(make: Any, place: Where, target: str) -> None:
    pipe = make()
    with cachekit.apply(pipe, Scripting(at=place, when_=Tensors())), pytest.raises(PolicyError) as caught:
        tiny.latents(pipe, steps=STEPS)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("scripting")
    assert message.endswith(f"needs of tensors for '{target}' at step 1 returned a Tensor; return True or False")


# -- several targets -------------------------------------------------------------------------------------------------


class SecondAndLast(Where):
    """Two regions of a block each, shown the block before."""

    name: ClassVar[str] = "second_and_last"

    def find(self, sites: SiteMap) -> list[Target]:
        (chain,) = sites.chains
        streams = sites.streams_of(0)
        regions = [region_of(chain[place : place + 1], streams) for place in (1, 3)]
        return [replace(region, probe=chain[place].name) for region, place in zip(regions, (0, 2))]


def region(at: Moment) -> str:
    """The number of a region's only block."""
    assert at.target is not None
    return at.target.name[-1]


class Apart(Scripted):
    """Full in step 0 alone, but for the first region in step 2 and the second in step 4."""

    name: ClassVar[str] = "apart"

    def needs(self, signal: Signal, at: Moment) -> bool:
        return at.step == {"1": 2, "3": 4}[region(at)]

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        earlier = at.memory.setdefault("full", [])
        earlier.append(full)
        at.shared.setdefault("trace", []).append((region(at), at.step, list(earlier)))


class Together(Apart):
    """The first region decides; the others follow what it noted."""

    name: ClassVar[str] = "together"

    def needs(self, signal: Signal, at: Moment) -> bool:
        step, full = at.shared.get("decided", (None, False))
        return full if step == at.step else super().needs(signal, at)

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        if at.shared.get("decided", (None, False))[0] != at.step:
            at.shared["decided"] = (at.step, full)
        super().took(signal, at, full)


@pytest.mark.parametrize(("when", "second"), [(Apart(), {0, 4}), (Together(), {0, 2})], ids=["apart", "together"])
def test_each_region_of_a_choice_decides_by_its_own_signal(when: Indicator, second: set[int]) -> None:
    """None decides for the others, unless the schedule notes it in the memory that they share."""
    found = trace(tiny.pixart(layers=4), Scripting(at=SecondAndLast(), when_=when))
    expected = []
    for step in range(STEPS):
        for name, full in (("1", {0, 2}), ("3", second)):
            expected.append((name, step, [earlier in full for earlier in range(step + 1)]))
    assert found == expected


# -- every call is noted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [Tail(), Modulated()], ids=["tail", "modulated"])
def test_steps_that_another_policy_forces_are_noted_as_full(place: Where) -> None:
    """TGATE keeps its attention in step 2, which the indicator would have skipped."""
    found = trace(tiny.pixart(), Scripting(at=place, needed=(4,)), "tgate:m=3")
    both, alone = ("uncond", "cond"), ("uncond",)
    expected = [
        (0, both, True),
        (1, both, False),
        (2, both, True),
        (3, alone, False),
        (4, alone, True),
        (5, alone, False),
    ]
    assert [entry[:3] for entry in found] == expected


def test_each_call_of_a_branch_is_noted() -> None:
    found = trace(tiny.wan(), Scripting(needed=(2, 3)))
    branches, full = (("cond",), ("uncond",)), {0, 2, 3}
    assert [entry[:3] for entry in found] == [(step, one, step in full) for step in range(STEPS) for one in branches]


def test_calls_of_the_denoiser_are_noted_and_computed_ones_learned_from() -> None:
    found = trace(tiny.sd(), Scripting(at=WholeDenoiser(), needed=(2, 3)))
    sample = [(2, 4, 16, 16)]
    expected: list[Any] = []
    for step in range(STEPS):
        full = step in (0, 2, 3)
        expected.append((step, ("uncond", "cond"), full, sample, []))
        expected += [(step, "learned", sample)] * full
    assert found == expected


def test_the_first_call_of_a_step_decides_for_the_others() -> None:
    class ByBranch(Scripted):
        name: ClassVar[str] = "by_branch"

        def needs(self, signal: Signal, at: Moment) -> bool:
            assert at.branch == "cond"
            return at.step == 3

    found = trace(tiny.wan(), Scripting(at=WholeDenoiser(), when_=ByBranch()))
    taken = [entry[:3] for entry in found if entry[1] != "learned"]
    branches = (("cond",), ("uncond",))
    assert taken == [(step, one, step in (0, 3)) for step in range(STEPS) for one in branches]


def test_a_run_of_one_call_a_time_without_guidance() -> None:
    found = trace(tiny.flux(), Scripting(needed=(1,)))
    assert [entry[:3] for entry in found] == [(step, ("cond",), step < 2) for step in range(STEPS)]
    assert found[0][3:] == ([IMAGE, TEXT], [IMAGE, TEXT])


@pytest.mark.parametrize(
    ("partner", "alone"), [("adaptive_guidance:m=3", {3, 4, 5}), ("guidance_interval:first=2,stop=4", {0, 1, 4, 5})]
)
def test_it_decides_by_the_branches_that_run_in_the_step(partner: str, alone: set[int]) -> None:
    """Guidance is settled in the same step, before the memory and the sample are those of one branch."""
    both = ("uncond", "cond")

    class Noting(Scripted):
        def full(self, at: Moment) -> bool:
            return False

        def needs(self, signal: Signal, at: Moment) -> bool:
            needed[at.step] = (at.branches, signal.entered[0], dict(at.memory))
            return at.step % 2 == 0

        def took(self, signal: Signal, at: Moment, full: bool) -> None:
            branches, sample, memory = needed[at.step]
            assert (branches, memory) == (at.branches, at.memory)
            assert torch.equal(sample, signal.entered[0])
            at.memory.setdefault("steps", []).append(at.step)

        def learn(self, output: Streams, signal: Signal, at: Moment) -> None:
            at.shared["trace"] = []

    needed: dict[int, Any] = {}
    pipe = tiny.sd()
    trace(pipe, Scripting(at=WholeDenoiser(), when_=Noting()), partner)
    assert {step: found[0] for step, found in needed.items()} == {
        step: ("cond",) if step in alone else both for step in range(STEPS)
    }


@pytest.mark.parametrize(("make", "branches"), [(tiny.flux, 1), (tiny.wan, 2)])
def test_tensors_in_memories_are_counted_apart(make: Any, branches: int) -> None:
    class Holding(Scripted):
        def took(self, signal: Signal, at: Moment, full: bool) -> None:
            held = signal.left[0].clone()
            at.memory["last"] = {"some": (held, held), "step": at.step}
            at.shared["trace"] = [held]
            sizes.append(held.numel() * held.element_size())

    sizes: list[int] = []
    pipe = make()
    with cachekit.apply(pipe, Scripting()) as attachment:
        tiny.latents(pipe, steps=STEPS)
        plain = attachment.report()
    with cachekit.apply(pipe, Scripting(when_=Holding())) as attachment:
        tiny.latents(pipe, steps=STEPS)
        report = attachment.report()
    assert (plain.memory_bytes, report.memory_bytes) == (0, branches * sizes[0])
    assert report.cache_bytes == plain.cache_bytes
    assert f" and {size(report.memory_bytes)} to decide by" in str(report)
    assert "to decide by" not in str(plain)
