"""Guidance in every second step: the unconditional output is made from its difference to the conditional one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny

import cachekit

STEPS = 8
EVERY = "adaptive_guidance:every=2"


class ByHand:
    """In odd steps the conditional half runs alone, and the difference is on a line through the last two."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.forward, self.step = denoiser.forward, -1
        self.kept: list[tuple[int, torch.Tensor]] = []
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.step += 1
        if self.step % 2 == 0:
            output = self.forward(*args, **kwargs)
            u, c = output[0].chunk(2)
            self.kept.append((self.step, u - c))
            return output
        (c,) = self.forward(*tiny.cut(args, 1), **tiny.cut(kwargs, 1))
        a, newest = self.kept[-1]
        difference = newest
        if len(self.kept) > 1:
            b, older = self.kept[-2]
            difference = newest + (self.step - a) / (a - b) * (newest - older)
        return (torch.cat([c + difference, c]),)


@pytest.mark.parametrize("make", [tiny.small, tiny.pixart])
def test_it_equals_a_loop_by_hand(make: Callable[[], Any]) -> None:
    pipe, twin = make(), make()
    ByHand(tiny.denoiser_of(twin))
    wanted, plain = tiny.latents(twin, steps=STEPS), tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, EVERY) as attachment:
        found, report = tiny.latents(pipe, steps=STEPS), attachment.report()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, plain)
    assert [len(call.row.branches) for call in report.record.calls] == [2, 1] * (STEPS // 2)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)


def test_where_nothing_is_kept_both_branches_run() -> None:
    """The caption is taken away in the only step that could have kept a difference."""
    pipe = tiny.small()
    with cachekit.apply(pipe, ["null_text:before=2", "adaptive_guidance:m=2,linear=true"]) as attachment:
        tiny.latents(pipe, steps=5)
        report = attachment.report()
    assert [len(call.row.branches) for call in report.record.calls] == [1, 1, 2, 1, 1]
    assert {count.policy: count.missed for count in report.counts}["adaptive_guidance:m=2,linear=true"] == 1


def test_an_interval_of_one_changes_nothing() -> None:
    pipe = tiny.small()
    plain = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, "cache:where=guidance,when=every(1),what=linear(of=residual)"):
        assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)


@pytest.mark.parametrize("make", [tiny.small, tiny.wan])
def test_attention_follows_branches_that_come_and_go(make: Callable[[], Any]) -> None:
    pipe = make()
    spec = "cache:where=self_attention,when=every(3),what=linear"
    with cachekit.apply(pipe, [spec, EVERY]) as attachment:
        tiny.latents(pipe, steps=12)
        counts = attachment.report().counts
    count = next(count for count in counts if count.kind == "self_attention")
    assert count.reused > count.stored
    assert count.missed == 0


@pytest.mark.parametrize(
    ("what", "marks"),
    [
        ("drop", "...rrr.rrr.r"),
        ("reuse(of=residual)", "..SrrrSrrrSr"),
        ("linear(of=residual)", ".SSrrrSrrrSr"),
        ("taylor(2,of=residual)", "SSSrrrSrrrSr"),
    ],
)
def test_guidance_keeps_as_many_steps_as_its_stand_in_reads(what: str, marks: str) -> None:
    """Every full step would otherwise be a STORE, even where nothing is made of what is kept."""
    pipe = tiny.small()
    with cachekit.apply(pipe, f"cache:where=guidance,when=every(4,first=3),what={what}") as attachment:
        (column,) = attachment.plan(12).columns()
        tiny.latents(pipe, steps=12)
        report = attachment.report()
    (count,) = report.counts
    assert column[-1] == marks
    assert (count.stored, count.reused, count.missed) == (marks.count("S"), marks.count("r"), 0)
    kept = 4 * 16 * 16 * 4  # one branch's output
    assert report.cache_bytes == kept * {"d": 0, "r": 1, "l": 2, "t": 3}[what[0]]
