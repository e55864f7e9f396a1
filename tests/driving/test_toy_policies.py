"""Two kinds of policy on blocks: residuals with a history, and probes inside a call.

Both run on a toy denoiser of whole numbers, against a loop written by hand, and on a tiny PixArt.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from typing import ClassVar

import pytest
import torch
from support import tiny
from support.policies import Changed, Extrapolated, FirstBlock, changed
from torch import nn

import cachekit
from cachekit import BranchChange, Kind, Layout, PolicyError, Site, SiteMap, Where
from cachekit.registry.catalog import build, installed

# -- a denoiser of whole numbers -------------------------------------------------------------------------------


class Block(nn.Module):
    """x + ((w x + t) mod 11), exact in float64."""

    def __init__(self, weight: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(weight), dtype=torch.float64), requires_grad=False)
        self.ran = []

    def forward(self, hidden_states, timestep):
        self.ran.append(hidden_states.shape[0])
        return hidden_states + torch.remainder(self.weight * hidden_states + timestep, 11)


class ToyDenoiser(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(3 + index) for index in range(count))

    def forward(self, sample, timestep, encoder_hidden_states):
        hidden = sample + encoder_hidden_states
        for block in self.blocks:
            hidden = block(hidden, timestep=timestep)
        return (hidden,)


class ToyAdapter:
    name, summary = "toy", "toys"

    def matches(self, denoiser):
        return isinstance(denoiser, ToyDenoiser)

    def sites(self, denoiser):
        chain = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(len(denoiser.blocks)))
        return SiteMap("ToyDenoiser", chain, chains=(chain,), streams=(("hidden_states",),))

    def layout(self, denoiser):
        return Layout()


CATALOG = dataclasses.replace(build([]), adapters={"toy": ToyAdapter()})


class Scheduler:
    timesteps = torch.arange(0)


class ToyPipeline:
    def __init__(self) -> None:
        self.transformer = ToyDenoiser()
        self.scheduler = Scheduler()

    @property
    def do_classifier_free_guidance(self):
        return self.guided

    def __call__(self, steps=8, guided=True):
        self.guided = guided
        self.scheduler.timesteps = torch.arange(steps).flip(0) * 3
        sample, text = SAMPLE, torch.cat([UNCOND, COND]) if guided else COND
        for timestep in self.scheduler.timesteps:
            both = torch.cat([sample, sample]) if guided else sample
            (output,) = self.transformer(both, timestep, encoder_hidden_states=text)
            sample = guide(sample, output, guided)
        return sample


SAMPLE = torch.arange(6, dtype=torch.float64).reshape(2, 3) * 7
UNCOND, COND = torch.ones(2, 3, dtype=torch.float64), torch.arange(6, dtype=torch.float64).reshape(2, 3)


def guide(sample, output, guided):
    if guided:
        uncond, cond = output.chunk(2)
        output = uncond + 2 * (cond - uncond)
    return torch.remainder(sample - output, 97)


# -- two policies ----------------------------------------------------------------------------------------------


class Refreshing(Extrapolated):
    name: ClassVar[str] = "refreshing"
    change: ClassVar[BranchChange] = BranchChange.REFRESH


# -- the same by hand ------------------------------------------------------------------------------------------


class Line:
    """Forecast by hand: for the branches in `running`, whether to skip and with what residual."""

    def __init__(self, is_full) -> None:
        self.is_full, self.seen = is_full, []

    def skipped(self, step, _):
        return not self.is_full(step)

    def residual(self, step):
        (new_step, new), *older = self.seen[::-1]
        if not older:
            return new
        old_step, old = older[0]
        return new + (step - new_step) / (new_step - old_step) * (new - old)

    def computed(self, step, residual):
        self.seen.append((step, residual))

    def narrow(self, place):
        self.seen = [(step, residual.chunk(2)[place]) for step, residual in self.seen]


class Probed:
    """First-block caching by hand."""

    def __init__(self, limit) -> None:
        self.limit, self.last, self.kept = limit, None, None

    def skipped(self, _, probe):
        if self.last is not None and changed(probe, self.last) < self.limit:
            return True
        self.last = probe
        return False

    def residual(self, _):
        return self.kept

    def computed(self, _, residual):
        self.kept = residual

    def narrow(self, _):
        self.last = None


def by_hand(hand, first, stop, steps=8, guided=True, alone_from=99):
    """Compute the sample, and how often each block ran, by a loop written without cachekit."""
    blocks, sample, ran = ToyDenoiser().blocks, SAMPLE, Counter()

    def run(index, hidden, timestep):
        ran[index] += 1
        return blocks[index](hidden, timestep=timestep)

    for step in range(steps):
        timestep = torch.tensor((steps - 1 - step) * 3)
        alone = not guided or step >= alone_from
        if guided and step == alone_from:
            hand.narrow(1)
        hidden = sample + COND if alone else torch.cat([sample + UNCOND, sample + COND])
        for index in range(first):
            hidden = run(index, hidden, timestep)
        if hand.skipped(step, hidden):
            hidden = hidden + hand.residual(step)
        else:
            entry = hidden
            for index in range(first, stop):
                hidden = run(index, hidden, timestep)
            hand.computed(step, hidden - entry)
        for index in range(stop, len(blocks)):
            hidden = run(index, hidden, timestep)
        sample = guide(sample, torch.cat([hidden, hidden]) if alone and guided else hidden, guided)
    return sample, [ran[index] for index in range(len(blocks))]


def cached(*policies, **call):
    """Run a toy pipeline: sample, runs of each block and report; check the undo to the bit."""
    pipe = ToyPipeline()
    plain, before = pipe(**call), [dict(vars(module)) for module in pipe.transformer.modules()]
    results = []
    for _ in range(2):
        attachment = cachekit.apply(pipe, policies, catalog=CATALOG)
        for block in pipe.transformer.blocks:
            block.ran.clear()
        results.append(pipe(**call))
        ran = [len(block.ran) for block in pipe.transformer.blocks]
        attachment.remove()
        assert [dict(vars(module)) for module in pipe.transformer.modules()] == before
        assert torch.equal(pipe(**call), plain)
    assert torch.equal(*results)
    assert not torch.equal(results[0], plain)
    return results[0], ran, attachment.report()


def block_counts(report):
    (count,) = [count for count in report.counts if count.kind == "block"]
    # What no later step reads is computed and not stored.
    return count.stored + count.computed, count.reused, count.missed


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("first", "stop"), [(1, 3), (0, 4), (2, 3), (3, 4), (0, 1)])
def test_a_forecast_residual_equals_the_one_by_hand(first, stop, guided):
    sample, ran, report = cached(Extrapolated(first=first, stop=stop), guided=guided)
    expected, expected_ran = by_hand(Line(lambda step: step % 2 == 0), first, stop, guided=guided)
    assert torch.equal(sample, expected)
    assert ran == expected_ran == [4 if first <= index < stop else 8 for index in range(4)]
    assert block_counts(report) == (4, 4, 0)


def test_stores_in_a_row_are_a_history():
    sample, _, report = cached(Extrapolated(warm_up=3, interval=4))
    expected, _ = by_hand(Line(lambda step: step < 3 or step % 4 == 0), 1, 3)
    assert torch.equal(sample, expected)
    assert block_counts(report) == (4, 4, 0)


@pytest.mark.parametrize(("warm_up", "interval"), [(0, 2), (5, 8), (4, 8), (6, 8)])
def test_a_history_follows_the_branch_that_stays(warm_up, interval):
    narrowing = installed().policies["adaptive_guidance"](m=5)
    sample, ran, report = cached(narrowing, Extrapolated(warm_up=warm_up, interval=interval))
    hand = Line(lambda step: step < warm_up or step % interval == 0)
    expected, expected_ran = by_hand(hand, 1, 3, alone_from=5)
    assert torch.equal(sample, expected)
    assert ran == expected_ran
    assert block_counts(report) == (ran[1], 8 - ran[1], 0)


def test_a_refreshed_history_starts_anew_with_fewer_branches():
    narrowing = installed().policies["adaptive_guidance"](m=4)
    _, ran, _ = cached(narrowing, Refreshing(interval=3))
    assert ran == [8, 4, 4, 8]  # full at 0 and 3, then anew at 4 and 7
    _, ran, _ = cached(narrowing, Extrapolated(interval=3))
    assert ran == [8, 3, 3, 8]  # full at 0, 3 and 6


@pytest.mark.parametrize("limit", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("guided", [True, False])
def test_a_probe_decides_as_by_hand(limit, guided):
    sample, ran, report = cached(FirstBlock(limit=limit), guided=guided)
    expected, expected_ran = by_hand(Probed(limit), 1, 4, guided=guided)
    assert torch.equal(sample, expected)
    assert ran == expected_ran
    stored, reused, missed = block_counts(report)
    assert (stored, stored + reused, missed) == (expected_ran[1], 8, 0)


def test_a_probe_has_a_memory_of_its_own_for_fewer_branches():
    narrowing = installed().policies["adaptive_guidance"](m=4)
    sample, ran, _ = cached(narrowing, FirstBlock(limit=0.9))
    expected, expected_ran = by_hand(Probed(0.9), 1, 4, alone_from=4)
    assert torch.equal(sample, expected)
    assert ran == expected_ran


def test_a_copy_of_the_model_is_cached_on_its_own():
    pipe = ToyPipeline()
    attachment = cachekit.apply(pipe, FirstBlock(limit=0.9), catalog=CATALOG)
    first = pipe()
    twin = ToyPipeline()
    twin.transformer = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        twin.transformer.blocks[0].weight += 1
    assert not torch.equal(twin(), first)
    assert torch.equal(pipe(), first)
    attachment.remove()


# -- the same policies on a real pipeline ----------------------------------------------------------------------


def patched_by_hand(pipe, hand, first, stop, probe=None):
    """Patch the blocks of a transformer crudely; return nothing: the pipeline is thrown away afterwards."""
    blocks = pipe.transformer.transformer_blocks
    now = {"step": -1}

    def at_first(original, hidden_states, **kwargs):
        now["step"] += 1
        now["entry"] = hidden_states
        now["skip"] = hand.skipped(now["step"], hidden_states)
        return inside(original, hidden_states, **kwargs)

    def inside(original, hidden_states, **kwargs):
        return hidden_states if now["skip"] else original(hidden_states, **kwargs)

    def at_last(original, hidden_states, **kwargs):
        if now["skip"]:
            return now["entry"] + hand.residual(now["step"])
        output = original(hidden_states, **kwargs)
        hand.computed(now["step"], output - now["entry"])
        return output

    def patch(block, function):
        original = block.forward
        block.forward = lambda hidden_states, **kwargs: function(original, hidden_states, **kwargs)

    patch(blocks[first], at_first)
    patch(blocks[stop - 1], at_last)


def layers_counted(pipe):
    """Count what Linear and convolution layers multiply while a pipeline really runs."""
    total = Counter()

    def add(module, inputs, output):
        total["macs"] += output.numel() * module.weight[0].numel()

    for module in pipe.transformer.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(add)
    return total


CASES = {
    "forecast": (Extrapolated(first=1, stop=3, interval=3), lambda: Line(lambda step: step % 3 == 0)),
    "probe": (FirstBlock(limit=0.7), lambda: Probed(0.7)),
}


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_on_a_real_transformer(case, guidance):
    policy, hand = CASES[case]
    torch.manual_seed(0)
    pipe = tiny.pixart()
    call = {"steps": 7, "batch": 2, "guidance": guidance}
    twin = copy.deepcopy(pipe)
    plain = tiny.latents(pipe, **call)
    patched_by_hand(twin, hand(), 1, 3)
    expected = tiny.latents(twin, **call)
    counted = layers_counted(pipe)
    with cachekit.apply(pipe, policy) as attachment:
        first = tiny.latents(pipe, **call)
        macs, report = counted["macs"], attachment.report()
    # The weighted sum of two residuals is rounded otherwise than a line through them.
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4 if case == "forecast" else 0)
    assert not torch.equal(first, plain)
    assert torch.equal(tiny.latents(pipe, **call), plain)
    with cachekit.apply(pipe, policy):
        assert torch.equal(tiny.latents(pipe, **call), first)
    stored, reused, missed = block_counts(report)
    assert (stored + reused, missed) == (7, 0)
    assert reused > 0
    assert (report.macs, macs < report.baseline_macs) == (macs, True)


@torch.no_grad()
def joint_loop(model):
    sample, text, pooled = torch.ones(1, 4, 8, 8), torch.ones(1, 5, tiny.WIDTH), torch.ones(1, tiny.WIDTH)
    for timestep in torch.tensor([900.0, 600.0, 300.0, 100.0]):
        given = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": timestep[None]}
        sample = sample - 0.1 * model(sample, **given, return_dict=False)[0]
    return sample


@pytest.mark.parametrize("stop", [2, 3])
def test_two_streams_have_a_residual_each(stop):
    model = tiny.sd3(layers=3).transformer
    plain = joint_loop(model)
    with cachekit.apply(model, Extrapolated(first=0, stop=stop, interval=3)):
        cached = joint_loop(model)
    assert not torch.equal(cached, plain)
    assert torch.equal(joint_loop(model), plain)
    by_hand, kept, step = tiny.sd3(layers=3).transformer, {}, Counter()

    def at_first(original, hidden_states, encoder_hidden_states, **kwargs):
        kept["entry"], kept["skip"] = (encoder_hidden_states, hidden_states), step["now"] % 3 > 0
        step["now"] += 1
        return inside(original, hidden_states, encoder_hidden_states, **kwargs)

    def inside(original, hidden_states, encoder_hidden_states, **kwargs):
        if kept["skip"]:
            return encoder_hidden_states, hidden_states
        return original(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)

    def at_last(original, hidden_states, encoder_hidden_states, **kwargs):
        if not kept["skip"]:
            output = original(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
            kept["added"] = [None if out is None else out - into for out, into in zip(output, kept["entry"])]
            return output
        return tuple(None if new is None else into + new for new, into in zip(kept["added"], kept["entry"]))

    for block, function in ((by_hand.transformer_blocks[0], at_first), (by_hand.transformer_blocks[stop - 1], at_last)):
        block.forward = functools.partial(function, block.forward)
    assert torch.equal(joint_loop(by_hand), cached)


# -- where a probe may stand, and what it sees -----------------------------------------------------------------


class Behind(Where):
    """All blocks but the last, with a probe that runs too late."""

    name: ClassVar[str] = "behind"

    def find(self, sites):
        chain = sites.chains[0]
        return [dataclasses.replace(sites.span(0, len(chain) - 1), probe=chain[-1].name)]


class TooLate(FirstBlock):
    name: ClassVar[str] = "too_late"

    def choices(self):
        (choice,) = super().choices().values()
        return {"blocks": choice.with_parts(where=Behind())}


def test_a_probe_behind_its_region_is_an_error_of_the_first_call():
    pipe = ToyPipeline()
    plain = pipe()
    line = r"^too_late: probe 'blocks.3' of behind does not run before 'blocks.0..blocks.2'"
    with cachekit.apply(pipe, TooLate(), catalog=CATALOG), pytest.raises(PolicyError, match=line):
        pipe()
    assert torch.equal(pipe(), plain)


class Looking(Changed):
    """Write down the shapes of what enters and leaves the probe."""

    name: ClassVar[str] = "looking"
    seen: ClassVar[list] = []

    def took(self, signal, at, full):
        self.seen.append([[tuple(one.shape) for one in streams] for streams in (signal.left, signal.entered)])
        super().took(signal, at, full)


class Watching(FirstBlock):
    name: ClassVar[str] = "watching"

    def choices(self):
        (choice,) = super().choices().values()
        return {"blocks": choice.with_parts(when=Looking(limit=self.limit))}


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd3])
def test_a_probe_sees_the_image_before_the_text(make):
    pipe = make()
    Looking.seen.clear()
    with cachekit.apply(pipe, Watching(limit=9.0)) as attachment:
        tiny.latents(pipe, steps=3)
        (count,) = attachment.report().counts
    output, entry = Looking.seen[0]
    assert output == entry
    assert output[0][1] != tiny.TOKENS
    assert output[1][1] == tiny.TOKENS
    assert count.reused > 0
