"""One switch around one module: what is asked, what is counted, and what is left when it is gone."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

import cachekit
from cachekit import Action, Choice, Every, Kind, Policy, Region, Reuse, Site, Sites
from cachekit.planning.assignments import Assignment
from cachekit.switches.duties import Duty
from cachekit.switches.placeholders import Placeholder, Scratch, zeros_like
from cachekit.switches.roles import Exit, Member, Role
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
        self.duties: dict[str, Duty] = {}
        self.actions = list(actions)
        self.counts = [Counter() for _ in actions]

    @property
    def counted(self) -> list[tuple[int, Action]]:
        return [(index, action) for index, counts in enumerate(self.counts) for action in counts.elements()]


class Noting(Role):
    """A role of no assignment."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def after(self, call: Any, output: Any) -> None:
        self.outputs.append(output)


def bound(target: Any = SITE) -> Assignment:
    return Assignment(Policy(), Choice(Sites(kinds="block"), Every(n=2), Reuse()), target)


def switched(call: Any, *roles: Role) -> tuple[Double, Switch]:
    module = Double()
    if call is not None:
        call.duties["module"] = Duty(roles)
    switch = Switch(Held(call), module, "module")
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


def test_a_role_of_no_assignment_sees_every_output() -> None:
    role = Noting()
    module, switch = switched(FakeCall(), role)
    output = module(INPUT)
    assert role.outputs == [output]
    switch.uninstall()
    module(INPUT)
    assert role.outputs == [output]


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


def test_placeholders_of_a_call_share_memory_that_may_be_edited():
    recorded, scratch = zeros_like(torch.ones(4, 3, 2)), Scratch()
    first = Placeholder(2, 2, scratch)(recorded)
    second = Placeholder(1, 2, scratch)(recorded)
    assert (first.shape, second.shape) == ((4, 3, 2), (2, 3, 2))
    assert first.data_ptr() == second.data_ptr()
    second += 1
    larger = Placeholder(2, 2, scratch)(zeros_like(torch.ones(4, 3, 5)))
    assert larger.shape == (4, 3, 5)
    assert scratch((4, 3, 2), recorded).data_ptr() == larger.data_ptr()
    assert scratch((4,), recorded.to(torch.float16)).dtype == torch.float16


def test_scratch_memory_ends_with_its_call():
    pipe, held = tiny.sd(), []
    with cachekit.apply(pipe, "deepcache:interval=2") as attachment:

        def look(module, args, output):
            call = attachment.driver.state.call
            if call is not None and call.scratch is not None:
                held.append(weakref.ref(call.scratch))

        pipe.unet.conv_out.register_forward_hook(look)
        tiny.latents(pipe, steps=4)
    assert len(held) == 2
    assert [reference() for reference in held] == [None, None]
