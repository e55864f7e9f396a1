"""One switch around one module: what is asked, what is counted, and what is left when it is gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cachekit import Action, Kind, Policy, Region, Site
from cachekit.planning.assignments import Assignment
from cachekit.switches.parts import Exit, Member, Part
from cachekit.switches.placeholders import Placeholder, zeros_like
from cachekit.switches.switch import Switch

INPUT = torch.arange(4.0)
SITE, REGION = Site("module", Kind.BLOCK), Region("region", exit="last", skipped=("module",))


class Double(nn.Module):
    def forward(self, tensor: Any) -> Any:
        if tensor is None:
            raise ZeroDivisionError
        return 2 * tensor


class Held:
    """What a thread is in the middle of."""

    def __init__(self, call: Any) -> None:
        self.call = call


class FakeCall:
    """A call that notes what is counted, and refuses to be asked for anything else."""

    def __init__(self, *actions: Any) -> None:
        self.actions = list(actions)
        self.counted: list[tuple[int, Action]] = []

    def count(self, index: int, action: Action) -> None:
        self.counted.append((index, action))


class Noting(Part):
    """A part of no assignment."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def after(self, call: Any, output: Any) -> None:
        self.outputs.append(output)


def bound(target: Any = SITE) -> Assignment:
    return Assignment(Policy(), target)


def switched(call: Any, *parts: Part) -> tuple[Double, Switch]:
    module = Double()
    switch = Switch(Held(call), module, "module", parts)
    switch.install()
    return module, switch


def test_a_module_that_is_only_computed_is_counted_by_its_exits_alone() -> None:
    call = FakeCall(Action.COMPUTE, Action.COMPUTE)
    module, _ = switched(call, Member(0, bound(REGION), "module"), Exit(1, bound()))
    assert torch.equal(module(INPUT), 2 * INPUT)
    assert call.counted == [(1, Action.COMPUTE)]


def test_a_call_that_fails_is_not_counted() -> None:
    call = FakeCall(Action.COMPUTE)
    module, _ = switched(call, Exit(0, bound()))
    with pytest.raises(ZeroDivisionError):
        module(None)
    assert not call.counted


def test_without_a_call_nothing_is_asked() -> None:
    module, _ = switched(None, Noting())
    assert torch.equal(module(INPUT), 2 * INPUT)


def test_a_part_of_no_assignment_sees_every_output() -> None:
    part = Noting()
    module, switch = switched(FakeCall(), part)
    output = module(INPUT)
    assert part.outputs == [output]
    switch.uninstall()
    module(INPUT)
    assert part.outputs == [output]


def test_a_module_is_as_it_was_once_its_switch_is_gone() -> None:
    module, switch = switched(None, Exit(0, bound()))
    assert type(module) is not Double
    assert switch.in_place
    switch.uninstall()
    assert type(module) is Double
    assert vars(module).keys() == vars(Double()).keys()
    assert not switch.in_place


def test_a_copied_module_has_a_switch_of_its_own() -> None:
    module, switch = switched(None, Exit(0, bound()))
    twin = copy.deepcopy(module)
    switch.uninstall()
    assert torch.equal(twin(INPUT), module(INPUT))
    assert type(twin) is not Double
    assert type(twin).__name__ == "Double"


# -- placeholders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_a_placeholder_has_the_shapes_and_one_tensor_that_may_be_edited(branches: int) -> None:
    recorded = [zeros_like(torch.ones(2, 3, dtype=torch.float16)) for _ in range(2)]
    make = Placeholder(branches, 2)
    first, second = map(make, recorded)
    assert first.shape == second.shape == (branches, 3)
    assert first.dtype == second.dtype == torch.float16
    first += 1
    assert not second.any()
    assert second.untyped_storage().nbytes() == second.element_size()
