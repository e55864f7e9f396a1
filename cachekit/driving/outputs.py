"""Finish denoiser calls: from the forward's output to what the pipeline expects."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cachekit.driving.inputs import CallInputs
from cachekit.driving.pipelines import Pipelines
from cachekit.driving.setup import Setup
from cachekit.guidance.observation import CallObservation
from cachekit.guidance.slicing import as_batches, as_lists, by_branch, pick_call, spread
from cachekit.interface.policy import Action
from cachekit.runs.call import Call
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.state import RunState
from cachekit.tensors import tensors, tree_map

#: The tensors that a denoiser returns, by branch.
Outputs = Mapping[str, tuple[Tensor, ...]]


class OutputFinisher:
    """Cuts the inputs of a call that runs one branch, expands its output, and shows outputs to policies."""

    def __init__(self, setup: Setup, state: RunState, pipelines: Pipelines) -> None:
        """Finish calls of `setup`."""
        self._setup = setup
        self._state = state
        self._pipelines = pipelines
        self._guidance = [i for i, bound in enumerate(setup.assignments) if bound.is_guidance]

    def narrowed(self, call: Call, denoiser: Denoiser, inputs: CallInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut the arguments down to the branch that runs, where another is dropped from the batch."""
        if not call.is_narrowed:
            return inputs.args, inputs.kwargs
        positional = denoiser.parameters[: len(inputs.args)]
        return pick_call(inputs.named, positional, call.calls.layout, call.branches[0], call.batch)

    def replaced(self, call: Call) -> Any:
        """Make the output of a dropped call from that of the branch that ran."""
        (stays,) = call.row.branches
        return tree_map(self._restoring(call), call.calls.outputs[stays])

    def finish(self, call: Call, inputs: CallInputs, output: Any) -> Any:
        """Turn the forward's output into that of the call, and show it to policies."""
        if inputs.is_listed:
            return as_lists(self._finished(call, inputs, as_batches(output)))
        return self._finished(call, inputs, output)

    def _finished(self, call: Call, inputs: CallInputs, output: Any) -> Any:
        if call.branch:
            self._hold(call, inputs, output)
        elif call.narrowed_by is not None:
            return spread(output, call.calls.layout, call.branches[0], self._restoring(call))
        elif len(call.branches) > 1:
            self._show(call, inputs, lambda: by_branch(output, call.branches))
        return output

    def _hold(self, call: Call, inputs: CallInputs, output: Any) -> None:
        """Hold a branch's output until the step ends: others are compared with it, or replaced by it."""
        outputs, order = call.calls.outputs, call.calls.layout.order
        outputs[call.branch] = output
        is_last = len(order) > 1 and call.branch in order and all(branch in outputs for branch in order)
        if is_last and call.narrowed_by is None:
            self._show(call, inputs, lambda: {branch: tuple(tensors(outputs[branch])) for branch in order})

    def _restoring(self, call: Call) -> Callable[[Tensor], Tensor]:
        """Make the function that turns each tensor of the branch that ran into that of the dropped one."""
        index = call.narrowed_by
        assert index is not None
        call.count(index, Action.REUSE)
        policy, kept = call.keeper.assignments[index].policy, call.keeper.store.get(call.slot(index), ())
        each = itertools.repeat(None) if kept is None else iter(kept)
        return lambda output: policy.restore_branch(output, next(each, None))

    def _show(self, call: Call, inputs: CallInputs, by_branch: Callable[[], Outputs]) -> None:
        """Show the outputs of a call of all branches to the policies that keep or observe something of them."""
        keeping = call.count_guidance(self._guidance)
        is_observed = self._setup.observing and self._state.run is not None
        if not keeping and not is_observed:
            return
        each = by_branch()
        for index in keeping:
            call.keep_branches(index, each)
        if is_observed:
            self._observe(call, inputs, each)

    def _observe(self, call: Call, inputs: CallInputs, each: Outputs) -> None:
        start = time.perf_counter()
        seen = self._observation(call, inputs, each)
        for policy in self._setup.observing:
            policy.observe(seen, call.keeper.memories.of(policy.name))
        call.keeper.record.deciding_seconds += time.perf_counter() - start

    def _observation(self, call: Call, inputs: CallInputs, each: Outputs) -> CallObservation:
        sample = inputs.sample.chunk(call.calls.together)[0]
        scheduler = self._pipelines.scheduler_behind(inputs.timestep, self._state.pipeline)
        outputs, negated = {name: of[0] for name, of in each.items()}, call.calls.layout.negated
        return CallObservation(call.row.step, outputs, sample, inputs.timestep, scheduler, negated)
