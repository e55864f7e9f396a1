"""Forecasts replayed naively: every module runs, and between full steps what it returns is replaced."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

import cachekit
from cachekit import Action
from support import tiny

#: Attention and feed-forward in the tiny pipelines, and the blocks whose output the final normalisation reads.
LAYERS = re.compile(r".*\.(attn|attn1|attn2|ff|ff_context|ffn|proj_mlp)")
LAST = {
    "small": "up_blocks.1",
    "sdxl": "up_blocks.2",
    "pixart": "transformer_blocks.2",
    "sd3": "transformer_blocks.3",
    "flux": "single_transformer_blocks.3",
    "wan": "blocks.3",
}

#: Computes the value of a step from the full steps before it, the newest first, and their values.
Series = Callable[[Sequence[int], Sequence[torch.Tensor], int], torch.Tensor]


def layers_of(name: str, denoiser: torch.nn.Module) -> list[str]:
    return [module for module, _ in denoiser.named_modules() if LAYERS.fullmatch(module)]


def features_of(name: str, denoiser: torch.nn.Module) -> list[str]:
    return [LAST[name]]


class Replay:
    """What a module returns between full steps is replaced by a series; `calls` of a step keep values of their own."""

    def __init__(self, module: torch.nn.Module, full: Sequence[int], series: Series, calls: int) -> None:
        self.full, self.series, self.calls, self.call = full, series, calls, -1
        self.kept: dict[int, list[tuple[int, tuple[torch.Tensor, ...]]]] = defaultdict(list)
        module.register_forward_hook(self.leave)

    def leave(self, _module: Any, _inputs: Any, output: Any) -> Any:
        self.call += 1
        step, which = divmod(self.call, self.calls)
        streams = output if isinstance(output, tuple) else (output,)
        kept = self.kept[which]
        if step in self.full:
            kept.insert(0, (step, streams))
            return None
        steps, values = [step for step, _ in kept], list(zip(*(left for _, left in kept)))
        made = tuple(None if of[0] is None else self.series(steps, of, step).to(of[0].dtype) for of in values)
        return made if isinstance(output, tuple) else made[0]


def check(
    name: str,
    spec: Any,
    find: Callable[[str, torch.nn.Module], list[str]],
    full: Sequence[int],
    series: Series,
    steps: int,
    **tolerance: float,
) -> None:
    """Check a policy on a tiny pipeline: equal to the replay, as often as planned, undone, and the same again."""
    pipe = getattr(tiny, name)()
    calls = 2 if name == "wan" else 1
    twin = copy.deepcopy(pipe)
    denoiser = tiny.denoiser_of(twin)
    for module in find(name, denoiser):
        Replay(denoiser.get_submodule(module), full, series, calls)
    plain, expected = tiny.latents(pipe, steps=steps), tiny.latents(twin, steps=steps)
    assert not torch.allclose(expected, plain, atol=1e-3)
    found = []
    for _ in range(2):
        with cachekit.apply(pipe, spec) as attachment:
            found.append(tiny.latents(pipe, steps=steps))
            assert full_steps(attachment.plan(steps)) == [step for step in full if step < steps]
            assert counted(attachment.report()) == planned(attachment.plan(steps), calls)
        assert torch.equal(tiny.latents(pipe, steps=steps), plain)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, **{"rtol": 1e-4, "atol": 1e-4, **tolerance})


def full_steps(plan: Any) -> list[int]:
    return [row.step for row in plan.rows if Action.REUSE not in row.actions]


def planned(plan: Any, calls: int) -> tuple[int, int, int]:
    """Count what is stored, reused and missed in the calls of a plan."""
    cells = [action for row in plan.rows for action in row.actions]
    return calls * cells.count(Action.STORE), calls * cells.count(Action.REUSE), 0


def counted(report: Any) -> tuple[int, int, int]:
    counts = report.counts
    return tuple(sum(getattr(count, what) for count in counts) for what in ("stored", "reused", "missed"))
