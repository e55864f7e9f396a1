"""Finish denoiser calls: from the forward's output, or a prediction of it, to what the pipeline expects."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cachekit.driving.inputs import CallInputs
from cachekit.driving.observation import CallObservation
from cachekit.driving.pipelines import Pipelines
from cachekit.driving.setup import Setup
from cachekit.driving.slicing import as_batches, as_lists, by_branch, pick_call, spread
from cachekit.errors import answered, attributed
from cachekit.interface.policy import Policy
from cachekit.runs.call import Call
from cachekit.runs.state import RunState
from cachekit.tensors import tensors, with_tensors

#: The tensors that a denoiser returns, by branch.
Outputs = Mapping[str, tuple[Tensor, ...]]


class OutputFinisher:
    """Cuts the inputs of a call that runs one branch, predicts or expands its output, and shows it to policies."""

    def __init__(self, setup: Setup, state: RunState, pipelines: Pipelines) -> None:
        """Finish calls of `setup`."""
        self._setup = setup
        self._state = state
        self._pipelines = pipelines
        self._guidance = [i for i, bound in enumerate(setup.assignments) if bound.is_guidance]

    def narrowed(self, call: Call, inputs: CallInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut the arguments down to the branch that runs, where another is dropped from the batch."""
        if not call.is_narrowed:
            return inputs.args, inputs.kwargs
        return pick_call(inputs, call.calls.layout, call.branches[0])

    def replaced(self, call: Call) -> Any:
        """Make the output of a dropped call from that of the branch that ran."""
        (stays,) = call.row.branches
        output = call.calls.outputs[stays]
        return with_tensors(output, call.restored_branch(tuple(tensors(output))))

    def predicted(self, call: Call, inputs: CallInputs) -> Any:
        """Make the output of a call that is left out, and finish it."""
        output = call.predict_output(_sample(call, inputs))
        finished = self._expanded(call, inputs, output)
        return as_lists(finished) if inputs.is_listed else finished

    def finish(self, call: Call, inputs: CallInputs, output: Any) -> Any:
        """Turn the forward's output into that of the call, and show it to policies."""
        if inputs.is_listed:
            return as_lists(self._finished(call, inputs, as_batches(output)))
        return self._finished(call, inputs, output)

    def _finished(self, call: Call, inputs: CallInputs, output: Any) -> Any:
        if call.whole is not None:
            output = call.take_output(output, _sample(call, inputs))
        return self._expanded(call, inputs, output)

    def _expanded(self, call: Call, inputs: CallInputs, output: Any) -> Any:
        """Hold the output, expand it to all branches where one was dropped, and show it."""
        if call.branch:
            self._hold(call, inputs, output)
        elif call.narrowed_by is not None:
            self._show(call, inputs, lambda: {call.branches[0]: tuple(tensors(output))}, is_whole=False)
            return self._spread(call, output)
        else:
            self._show(call, inputs, lambda: by_branch(output, call.branches), is_whole=len(call.branches) > 1)
        return output

    def _spread(self, call: Call, output: Any) -> Any:
        streams = tuple(tensor for tensor in tensors(output) if tensor.dim())
        restored = iter(call.restored_branch(streams))
        return spread(output, call.calls.layout, call.branches[0], lambda tensor: next(restored))

    def _hold(self, call: Call, inputs: CallInputs, output: Any) -> None:
        """Hold a branch's output until the step ends: others are compared with it, or replaced by it."""
        outputs, order = call.calls.outputs, call.calls.layout.order
        outputs[call.branch] = output
        is_last = len(order) > 1 and call.branch in order and all(branch in outputs for branch in order)
        if is_last and call.narrowed_by is None:
            self._show(call, inputs, lambda: {branch: tuple(tensors(outputs[branch])) for branch in order}, True)
        elif len(call.row.branches) == 1:
            self._show(call, inputs, lambda: {call.branch: tuple(tensors(output))}, is_whole=False)

    def _show(self, call: Call, inputs: CallInputs, by_branch: Callable[[], Outputs], is_whole: bool) -> None:
        """Pass computed outputs to the policies that keep or observe them.

        `is_whole` is whether these are the outputs of all branches.
        """
        keeping = call.count_guidance(self._guidance) if is_whole else []
        is_observed = self._setup.observing and self._state.run is not None and not call.is_left_out
        if not keeping and not is_observed:
            return
        each = by_branch()
        for index in keeping:
            call.keep_branch(index, each)
        if is_observed:
            self._observe(call, inputs, each)

    def _observe(self, call: Call, inputs: CallInputs, each: Outputs) -> None:
        start = time.perf_counter()
        seen = self._observation(call, inputs, each)
        for policy in self._setup.observing:
            _observed(policy, seen, call.keeper.memories.of(policy.name))
        call.keeper.record.deciding_seconds += time.perf_counter() - start

    def _observation(self, call: Call, inputs: CallInputs, each: Outputs) -> CallObservation:
        sample = inputs.sample.chunk(call.calls.together)[0]
        scheduler = self._pipelines.scheduler_behind(inputs.timestep, self._state.pipeline)
        outputs, negated = {name: of[0] for name, of in each.items()}, call.calls.layout.negated
        return CallObservation(call.row.step, outputs, sample, inputs.timestep, scheduler, negated)


def _observed(policy: Policy, seen: CallObservation, memory: dict[str, Any]) -> None:
    """Show outputs to one policy; raises `PolicyError` where it raises."""
    answered(lambda: f"{attributed(policy)}: observe at step {seen.step}", policy.observe, seen, memory)


def _sample(call: Call, inputs: CallInputs) -> Tensor:
    """Cut the sample down to the branches that run."""
    return call.calls.part(inputs.sample, call.branches) if call.is_narrowed else inputs.sample
