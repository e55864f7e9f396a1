"""What is not finite is never kept: whoever would have read it computes, and the report says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import pytest
import torch
from support import tiny

import cachekit
from cachekit import Choice, Entry, Every, History, Linear, Moment, Policy, Span
from cachekit.runs.quantities import take
from cachekit.tensors import is_finite, tree_map
from cachekit.upstream.pipelines import denoiser_of

STEPS = 6
NAN, INF = float("nan"), float("inf")


@contextmanager
def poisoned(denoiser: Any, inner: str, outer: str, value: float, call: int) -> Iterator[None]:
    """Make one call of module `inner` give `value`, and module `outer` around it zeros instead.

    So the value is seen by a switch between them, and does not reach the image.
    """
    calls, spoiled = itertools.count(), False

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal spoiled
        spoiled = next(calls) == call
        return torch.full_like(output, value) if spoiled else output

    def mend(_: Any, __: Any, output: Any) -> Any:
        nonlocal spoiled
        was, spoiled = spoiled, False
        return tree_map(torch.zeros_like, output) if was else output

    with ExitStack() as stack:
        for name, hook in ((inner, spoil), (outer, mend)):
            stack.callback(denoiser.get_submodule(name).register_forward_hook(hook).remove)
        yield


def forgetting(slots: Callable[[Any], list[Any]], at: int) -> Any:
    """Make a callback that makes the run forget what it keeps in these slots."""

    def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        run = denoiser_of(pipe)._cachekit_attachment.driver.state.run
        for key in [key for key in run.keeper.store._histories if step == at and key[0] in slots(run)]:
            run.keeper.store.drop(*key)
        return given

    return callback


def slots_of(name: str) -> Callable[[Any], list[Any]]:
    return lambda run: [(index, 0) for index, bound in enumerate(run.plan.assignments) if bound.target.name == name]


LAYER = "up_blocks.1.attentions.1"
ATTENTION = f"{LAYER}.transformer_blocks.0.attn2"
CASES = {
    # Kept at step 2, read from step 3 on.
    "attention": ("tgate:m=3", ATTENTION, f"{ATTENTION}.to_out.0", LAYER, 2),
    # Kept at steps 0 and 3; with nothing to reuse, step 4 is a full one.
    "region": ("deepcache:interval=3", "region 0", f"{LAYER}.proj_out", "up_blocks.1", 3),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("case", CASES)
def test_it_is_computed_instead(case: str, value: float) -> None:
    spec, target, inner, outer, step = CASES[case]
    # The region's exit computes in full steps alone, so its second call is step 3.
    call = {"attention": step, "region": 1}[case]
    pipe = tiny.small()

    def draw(specs: Sequence[str], value: float, call: int = call, **more: Any) -> tuple[torch.Tensor, Any]:
        with poisoned(pipe.unet, inner, outer, value, call), cachekit.apply(pipe, specs) as attachment:
            return tiny.latents(pipe, steps=STEPS, **more), attachment.report()

    plain, _ = draw([], value, step)
    first, report = draw([spec], value)
    line = f"{spec.partition(':')[0]}: 1 output at step {step} was not finite and was not kept: computed instead"
    assert report.warnings == [line]
    assert f"warning: {line}" in str(report)
    assert sum(count.missed for count in report.counts) == 1
    assert torch.isfinite(first).all()
    assert not torch.equal(first, plain)
    # A finite value in its place is kept, unless the run is made to forget it: then the image is the same.
    kept, report = draw([spec], 1.0)
    forgotten, _ = draw([spec], 1.0, callback_on_step_end=forgetting(slots_of(target), step))
    assert report.warnings == []
    assert not torch.equal(kept, first)
    assert torch.equal(forgotten, first)
    assert torch.equal(draw([], value, step)[0], plain)
    assert torch.equal(draw([spec], value)[0], first)


# -- the other things that are kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("make", [tiny.small, tiny.pixart])
def test_a_lost_difference_makes_one_more_guided_step(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], batch: int
) -> None:
    pipe, call, taken = make(), {"steps": STEPS, "batch": batch}, itertools.count()

    def spoiled(*given: Any) -> Any:
        return tuple(tensor * (1 if next(taken) else NAN) for tensor in take(*given))

    monkeypatch.setattr("cachekit.runs.call.take", spoiled)
    with cachekit.apply(pipe, "adaptive_guidance:m=2,linear=true") as attachment:
        found, report = tiny.latents(pipe, **call), attachment.report()
    monkeypatch.undo()
    with cachekit.apply(pipe, "adaptive_guidance:m=3,linear=true") as attachment:
        expected, longer = tiny.latents(pipe, **call), attachment.report()
    assert torch.equal(found, expected)
    assert report.warnings == [
        "adaptive_guidance: 1 output at step 1 was not finite and was not kept: computed instead"
    ]
    assert [count.missed for count in report.counts] == [1]
    assert report.macs == longer.macs


class Recording(Linear):
    """Write down which steps there were to build on."""

    name: ClassVar[str] = "recording"
    seen: ClassVar[dict[int, list[int]]] = {}

    def predict(self, history: History, at: Moment, given: Any = ()) -> Any:
        self.seen[at.step] = [entry.at.step for entry in history]
        return super().predict(history, at, given)


class Recorded(Policy):
    """Skip two blocks in every second step from step 4 on; their residual is extrapolated."""

    name: ClassVar[str] = "recorded"

    def choices(self) -> dict[str, Choice]:
        return {"span": Choice(Span(first=1, stop=3), Every(n=2, first=4), Recording(of="residual"))}


@pytest.mark.parametrize(("bad", "left"), [(2, [3]), (3, [2])])
def test_a_history_loses_what_is_not_finite_and_no_more(bad: int, left: list[int]) -> None:
    pipe, inner = tiny.pixart(), "transformer_blocks.2.ff"
    Recording.seen.clear()
    with poisoned(pipe.transformer, inner, "", NAN, bad), cachekit.apply(pipe, Recorded()) as attachment:
        found, report = tiny.latents(pipe, steps=5), attachment.report()
    assert Recording.seen == {4: left}
    assert report.warnings == [f"recorded: 1 output at step {bad} was not finite and was not kept: computed instead"]
    assert torch.isfinite(found).all()


def test_what_a_change_of_branches_makes_is_looked_at_too() -> None:
    """The mean of two large numbers is not finite in half precision, although both are."""
    pipe = tiny.pixart()
    with cachekit.apply(pipe, ["tgate:m=9,sp_interval=2", "adaptive_guidance:threshold=-1"]) as attachment:
        large = {}

        def enlarge(step: int, t: Any, latents: Any) -> None:
            store = attachment.driver.state.run.keeper.store
            if step == 0:
                large.update(store._histories)
                for key, (newest,) in list(store._histories.items()):
                    store.push(*key, Entry(tuple(torch.full_like(it, 3e38) for it in newest.tensors), newest.at), 1)

        found = tiny.latents(pipe, steps=4, callback=enlarge)
        report = attachment.report()
    assert len(large) == 3
    assert report.warnings == ["tgate: 3 outputs at step 1 were not finite and were not kept: computed instead"]
    assert torch.isfinite(found).all()


# -- how it is found out ---------------------------------------------------------------------------------------


def test_each_group_of_tensors_is_judged_alone() -> None:
    ones = torch.ones(3, 2)
    bad = ones.clone()
    bad[1, 1] = INF
    both = torch.tensor([INF, -INF])
    kept = [(ones,), (ones, bad), (both,), (), (ones[:0], ones.half()), (ones.long(),), (ones.double() * NAN,)]
    assert is_finite(kept) == [True, False, False, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_numbers_are_finite(dtype: torch.dtype) -> None:
    most = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite([(most,), (-most,)]) == [True, True]
    most[0, 0] = NAN
    assert is_finite([(most,)]) == [False]


def test_there_is_one_look_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [looks.append(tensor.shape), tolist(tensor)][1])
    assert all(is_finite([(torch.ones(2), torch.ones(3))] * 50))
    assert looks == [(100,)]
