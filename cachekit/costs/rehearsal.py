"""Rehearse a run before it begins, on shapes alone, to see what it would keep and save."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from cachekit.costs.meta import on_meta
from cachekit.costs.tracing import trace_forward
from cachekit.driving.setup import Setup
from cachekit.driving.starting import RunStart
from cachekit.interface.moment import OPEN, Action
from cachekit.interface.sites import Kind
from cachekit.planning.plan import Plan
from cachekit.runs.call import Call
from cachekit.runs.run import Run
from cachekit.switches.roles import Exit, entry_of
from cachekit.tensors import tensors, tree_map


class Usage(NamedTuple):
    """Bytes that a run keeps: at its `peak`, and `sizes` by assignment after each call."""

    peak: int
    sizes: Sequence[dict[int, int]]

    def most(self, index: int) -> int:
        """Find the most bytes that one assignment keeps."""
        return max(sizes.get(index, 0) for sizes in self.sizes)

    def most_together(self, indices: frozenset[int]) -> int:
        """Find the most bytes that these assignments keep at once."""
        return max(sum(size for index, size in sizes.items() if index in indices) for sizes in self.sizes)

    @property
    def keeping(self) -> frozenset[int]:
        """Assignments that keep anything."""
        return frozenset(index for sizes in self.sizes for index, size in sizes.items() if size)


class Rehearsal:
    """A run that keeps tensors of the right shapes without computing any.

    A cell that only the real run can decide keeps as much as it may. Denoisers of the same class are assumed to
    take part in each step; others aren't rehearsed.
    """

    def __init__(self, setup: Setup, start: RunStart) -> None:
        """Trace one uncached forward over all branches, on the meta device."""
        self._setup, self._start = setup, start
        module = start.denoiser.module
        self._denoisers = [name for name, other in setup.denoisers.items() if type(other.module) is type(module)]
        self._by_name = dict(module.named_modules())
        here = [bound for bound in setup.assignments if bound.denoiser in self._denoisers]
        self._forward = trace_forward(module, here, start.inputs.named)
        self._sample: torch.Tensor = on_meta(start.inputs.sample)

    def plan(self, dropped: frozenset[int] = frozenset()) -> Plan:
        """Plan the run with the `dropped` assignments computed throughout."""
        return self._setup.plan(self._start.steps, self._start.layout, dropped, self._start.times)

    def usage(self, plan: Plan) -> Usage:
        """Count the bytes that a run of `plan` keeps."""
        run = Run(plan, self._start.layout, self._start.steps, self._start.inputs.batch, is_replayed=True)
        exits = self._exits(plan)
        sizes = []
        for call in self._calls(run, plan):
            if not call.is_left_out:
                self._keep_branches(run, call)
                self._keep_whole(call)
                for exit_ in exits:
                    if _runs(exit_, call, plan):
                        self._keep_output(exit_, call)
            sizes.append(run.keeper.store.sizes())
        return Usage(run.keeper.store.peak_bytes, sizes)

    def _exits(self, plan: Plan) -> list[Exit]:
        """Pick the exits of the traced targets, in the order in which their modules finish."""
        ended = {name: place for place, name in enumerate(self._forward.outputs)}
        exits = [
            Exit(index, bound)
            for index, bound in enumerate(plan.assignments)
            if not bound.is_guidance and not bound.is_whole and bound.target.exit in ended
        ]
        return sorted(exits, key=lambda exit_: ended[exit_.target.exit])

    def _calls(self, run: Run, plan: Plan) -> Iterator[Call]:
        branches = self._start.layout.order if self._start.layout.separate else ("",)
        for row in (row.decided for row in plan.rows):
            run.enter(row)
            for name, branch in itertools.product(self._denoisers, branches):
                if not branch or branch in row.branches:
                    whole = plan.wholes.get(name)
                    yield Call(run.keeper, run.calls, row, (name, branch), self._start.inputs.batch, whole=whole)

    def _keep_branches(self, run: Run, call: Call) -> None:
        """Store what guidance policies keep of a call with all branches."""
        for index in run.plan.guidance:
            if call.actions[index] is Action.STORE:
                outputs = tuple(
                    _share(tensor, 1 / call.calls.together) for tensor in tensors(self._forward.outputs[""])
                )
                call.keep_branch(index, dict.fromkeys(call.calls.layout.order, outputs))

    def _keep_whole(self, call: Call) -> None:
        """Keep the denoiser's output, as the end of its call does."""
        if call.whole is not None and call.actions[call.whole] is Action.STORE:
            share = len(call.branches) / call.calls.together
            output = tree_map(lambda tensor: _share(tensor, share), self._forward.outputs[""])
            call.take_output(output, _share(self._sample, share))

    def _keep_output(self, exit_: Exit, call: Call) -> None:
        """Pass the traced output of a target's module to its exit, as the module's switch does."""
        share = len(call.branches) / call.calls.together
        key = entry_of(exit_.bound, self._by_name)
        if key is not None:
            entered = self._forward.entered.get(key, ())
            call.entries[exit_.index] = tuple(_share(tensor, share) for tensor in entered)
        output = self._forward.outputs[exit_.target.exit]
        exit_.after(call, tree_map(lambda tensor: _share(tensor, share), output))

    def savings(self, plan: Plan) -> dict[int, float]:
        """Count the MACs that each assignment saves in a run of `plan`, as if each open cell were a reuse."""
        savings: dict[int, float] = {}
        for row in plan.rows:
            reused = [index for index, action in enumerate(row.actions) if action in (Action.REUSE, OPEN)]
            for index in reused:
                if not any(plan.covers(block, index) for block in reused):
                    share = len(row.branches) / len(self._start.layout.order)
                    savings[index] = savings.get(index, 0) + share * self._macs(plan, index)
        return savings

    def _macs(self, plan: Plan, index: int) -> float:
        """Count the MACs that a reuse skips; for guidance all of them, so that it is dropped last."""
        target = plan.assignments[index].target
        layers = self._forward.layers.items()
        everything = target.kind in (Kind.GUIDANCE, Kind.DENOISER)
        return float(sum(macs for name, macs in layers if everything or target.covers(name)))


def _runs(exit_: Exit, call: Call, plan: Plan) -> bool:
    """Whether the module behind `exit_` runs in `call`: it's neither skipped by a reused block nor reused itself."""
    if plan.assignments[exit_.index].denoiser != call.denoiser:
        return False
    if any(plan.covers(i, exit_.index) for i, action in enumerate(call.actions) if action is Action.REUSE):
        return False
    return call.actions[exit_.index] is not Action.REUSE or not call.keeps(exit_.index)


def _share(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """Make a tensor like this one for a share of its batch."""
    return tensor.new_empty((math.ceil(tensor.shape[0] * share), *tensor.shape[1:]))
