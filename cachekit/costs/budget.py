"""Fit what is kept into a number of bytes: planned before a run, by giving up what saves least for its bytes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cachekit.costs.counting import count_forward
from cachekit.costs.meta import meta_copy, on_meta
from cachekit.driving.setup import Setup
from cachekit.errors import BudgetError, CostError
from cachekit.interface.policy import Action
from cachekit.interface.sites import Kind, Region, Target
from cachekit.planning.plan import Plan
from cachekit.reports.record import Fit
from cachekit.runs.call import Call
from cachekit.runs.clock import Clock
from cachekit.runs.limit import Limit
from cachekit.runs.run import Run
from cachekit.runs.start import RunStart
from cachekit.runs.store import Store
from cachekit.runs.voting import Vote, vote_of
from cachekit.switches.parts import Exit
from cachekit.tensors import tensors, tree_map
from cachekit.upstream.arguments import by_name, parameters_of

#: Names of a region's streams.
Streams = tuple[str, ...]


#: Bytes by assignment, after one call.
Sizes = dict[int, int]


class Fitting:
    """Fits runs into a limit: plans which assignments keep nothing, once for each kind of run."""

    def __init__(self, limit: Limit) -> None:
        """Fit runs into `limit`."""
        self._limit = limit
        self._fits: dict[tuple[Any, ...], Fit] = {}

    def __call__(self, setup: Setup, start: RunStart) -> Fit:
        """Plan what a run keeps.

        Raises `BudgetError` where nothing fits, or where what a run keeps cannot be foreseen.
        """
        if self._limit.max_bytes is None:
            return Fit()
        if vote_of(start.denoiser.module).group is not None:
            raise BudgetError("max_cache_bytes cannot be planned for where processes share an image; leave it out")
        if start.key not in self._fits:
            self._fits[start.key] = _plan_fit(setup, start, self._limit.max_bytes)
        return self._fits[start.key]


def _plan_fit(setup: Setup, start: RunStart, max_bytes: int) -> Fit:
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _fit(Rehearsal(setup, start), max_bytes)
    except (CostError, NotImplementedError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BudgetError(f"max_cache_bytes cannot be planned for: {reason}; leave it out") from error


class Usage(NamedTuple):
    """Hold what a run would keep: the peak in all, and the bytes of each assignment after each call."""

    peak: int
    sizes: Sequence[Sizes]

    def of(self, index: int) -> int:
        """Return the most that one assignment keeps."""
        return max(sizes.get(index, 0) for sizes in self.sizes)

    def together(self, indices: frozenset[int]) -> int:
        """Return the most that these assignments keep at once."""
        return max(sum(size for index, size in sizes.items() if index in indices) for sizes in self.sizes)

    @property
    def keeping(self) -> frozenset[int]:
        """Return the assignments that keep anything."""
        return frozenset(index for sizes in self.sizes for index, size in sizes.items() if size)


def _fit(rehearsal: Rehearsal, limit: int) -> Fit:
    plan = rehearsal.plan(frozenset())
    usage = first = rehearsal.usage(plan)
    dropped: frozenset[int] = frozenset()
    room = limit
    while usage.peak > limit:
        kept = _most_valuable(first, rehearsal.saved(plan), room)
        if not kept:
            smallest = min(first.of(index) for index in first.keeping)
            specs = ", ".join(dict.fromkeys(repr(str(bound.policy)) for bound in plan.assignments))
            raise BudgetError(
                f"max_cache_bytes={limit:,}: nothing of {specs} fits; the smallest place needs {smallest:,} bytes,"
                f" all of them {first.peak:,}"
            )
        dropped = first.keeping - kept
        # Other plans keep at other steps: should they need more within a call, there has to be more room.
        usage = rehearsal.usage(rehearsal.plan(dropped))
        room -= max(usage.peak - limit, 0)
    return Fit(dropped, first.peak)


def _most_valuable(usage: Usage, saved: dict[int, float], room: int) -> frozenset[int]:
    """Return assignments that fit into `room` bytes together: those that save most for each byte come first."""
    kept: frozenset[int] = frozenset()
    for index in sorted(usage.keeping, key=lambda index: (-saved.get(index, 0) / usage.of(index), index)):
        if usage.together(kept | {index}) <= room:
            kept |= {index}
    return kept


class Rehearsal:
    """Go through a run without values, before it begins, and look at what it keeps.

    Where only the run can decide, as much is kept as may be. Denoisers of one class are taken to share the run.
    """

    def __init__(self, setup: Setup, start: RunStart) -> None:
        """Take down what a copy of the denoiser without weights gives at each target, over all branches."""
        self.setup, self.start = setup, start
        first = start.denoiser
        self.names = [n for n, it in setup.denoisers.items() if type(it.module) is type(first.module)]
        self.given: dict[str, Any] = {}
        self.entered: dict[tuple[str, Streams], Any] = {}
        twin = meta_copy(first.module)
        self._take_down(twin)
        self.layers = count_forward(twin, (), tree_map(on_meta, start.arguments)).layers

    def _take_down(self, twin: nn.Module) -> None:
        """Note the outputs of all targets' modules, in the order in which they end, and what enters regions."""
        twin.register_forward_hook(lambda _, __, output: self.given.update({"": output}))
        targets = [bound.target for bound in self.setup.assignments if bound.denoiser in self.names]
        for exit_ in {_exit(target) for target in targets if target.kind is not Kind.GUIDANCE}:
            module = twin.get_submodule(exit_)
            module.register_forward_hook(lambda _, __, output, name=exit_: self.given.update({name: output}))
        for entry, streams in {(it.entry, it.streams) for it in targets if isinstance(it, Region) and it.entry}:
            module = twin.get_submodule(entry)
            module.register_forward_pre_hook(functools.partial(self._enter, (entry, streams)), with_kwargs=True)

    def _enter(self, key: tuple[str, Streams], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = by_name(parameters_of(module), args, kwargs)
        self.entered[key] = tuple(given[name] for name in key[1])

    def plan(self, dropped: frozenset[int]) -> Plan:
        """Return the plan in which these assignments are computed throughout."""
        return self.setup.plan(self.start.steps, self.start.layout, dropped)

    def usage(self, plan: Plan) -> Usage:
        """Return what a run of `plan` keeps."""
        run = Run(plan.assignments, Clock(exact=True), Vote(), Store())
        run.begin(plan, self.start.layout, self.start.steps)
        ended = {name: place for place, name in enumerate(self.given)}
        exits = [(index, Exit(index, bound)) for index, bound in enumerate(plan.assignments)]
        exits.sort(key=lambda pair: ended.get(_exit(pair[1].target), -1))
        sizes = []
        for call in self._calls(run, plan):
            for index, exit_ in exits:
                self._make(call, plan, index, exit_)
            sizes.append(run.store.sizes())
        return Usage(run.store.peak_bytes, sizes)

    def _is_made(self, exit_: Exit) -> bool:
        return exit_.target.kind is not Kind.GUIDANCE and _exit(exit_.target) in self.given

    def _calls(self, run: Run, plan: Plan) -> Iterator[Call]:
        branches = self.start.layout.order if self.start.layout.separate else ("",)
        for row in (row.decided for row in plan.rows):
            run.enter(row)
            for name, branch in itertools.product(self.names, branches):
                if not branch or branch in row.branches:
                    yield Call(run, row, name, branch, 0)

    def _make(self, call: Call, plan: Plan, index: int, exit_: Exit) -> None:
        """Do what the switch of a target does, and a guided call for those that keep something of its branches."""
        bound, reused = plan.assignments[index], call.actions[index] is Action.REUSE
        share = len(call.branches) / call.run.together
        if bound.target.kind is Kind.GUIDANCE:
            if call.actions[index] is Action.STORE:
                parts = tuple(_part(tensor, 1 / call.run.together) for tensor in tensors(self.given[""]))
                call.keep_branches(index, dict.fromkeys(call.run.layout.order, parts))
            return
        skipped = any(plan.covers(i, index) for i, action in enumerate(call.actions) if action is Action.REUSE)
        if bound.denoiser != call.denoiser or not self._is_made(exit_) or skipped or (reused and call.keeps(index)):
            return
        if isinstance(bound.target, Region):
            entered = self.entered.get((bound.target.entry, bound.target.streams), ())
            call.entries[index] = tuple(_part(tensor, share) for tensor in entered)
        exit_.after(call, tree_map(lambda tensor: _part(tensor, share), self.given[_exit(bound.target)]))

    def saved(self, plan: Plan) -> dict[int, float]:
        """Return the multiply-accumulates that each assignment saves in a run; an open cell may be a reuse."""
        saved: dict[int, float] = {}
        for row in plan.rows:
            reused = [index for index, action in enumerate(row.actions) if action in (Action.REUSE, None)]
            for index in reused:
                if not any(plan.covers(block, index) for block in reused):
                    share = len(row.branches) / len(self.start.layout.order)
                    saved[index] = saved.get(index, 0) + share * self._inside(plan, index)
        return saved

    def _inside(self, plan: Plan, index: int) -> float:
        """Return what a reuse saves of one call; dropping a branch always saves most."""
        target = plan.assignments[index].target
        if target.kind is Kind.GUIDANCE:
            return float(sum(self.layers.values()))
        return float(sum(macs for name, macs in self.layers.items() if target.covers(name)))


def _exit(target: Target) -> str:
    return target.exit if isinstance(target, Region) else target.name


def _part(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """Return such a tensor for a share of the batch."""
    return tensor.new_empty((math.ceil(tensor.shape[0] * share), *tensor.shape[1:]))
