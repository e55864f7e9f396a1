"""Leave out of ControlNet calls what the denoiser's next call will not use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.driving.driver import Driver
from cachekit.driving.foresight import foresee
from cachekit.driving.inputs import CallInputs
from cachekit.driving.slicing import pick_call, spread
from cachekit.errors import AdapterError, AttachmentError
from cachekit.interface.moment import Action
from cachekit.interface.sites import Region
from cachekit.planning.assignments import Assignment
from cachekit.runs.call import Call
from cachekit.switches.duties import Duty
from cachekit.switches.placeholders import Placeholder, zeros, zeros_like
from cachekit.switches.roles import Role
from cachekit.switches.switch import Switch
from cachekit.tensors import tensors, tree_map
from cachekit.upstream.arguments import parameters_of
from cachekit.upstream.calls import CALL, class_call


class Interceptors:
    """The interceptors of one attachment, and the driver that they ask; None where there is no denoiser to follow.

    That is so in a deep copy of a ControlNet alone. One that is copied together with its denoiser, in whatever order,
    joins the copy of this; the copied attachment then gives it a driver.
    """

    def __init__(self, driver: Driver | None) -> None:
        """Start without an interceptor."""
        self.driver = driver
        self._joined: list[ControlNetInterceptor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Interceptors:
        """Start without an interceptor and without a driver."""
        return Interceptors(None)

    def install(self, module: nn.Module, denoiser: nn.Module) -> None:
        """Intercept the calls of the ControlNet `module`, which serves `denoiser`."""
        ControlNetInterceptor(self, _twins(module, denoiser), module).install()

    def follow(self, assignments: Sequence[Assignment]) -> None:
        """Intercept the modules that runs with these assignments can skip too, where they aren't intercepted yet."""
        for interceptor in self._joined:
            interceptor.follow(assignments)

    def join(self, interceptor: ControlNetInterceptor) -> None:
        """Add an interceptor that is in place."""
        self._joined.append(interceptor)

    def uninstall(self) -> None:
        """Put back exactly what was there; a second call does nothing."""
        while self._joined:
            self._joined.pop().uninstall()


class ControlNetInterceptor:
    """Leaves out of one ControlNet's calls what the denoiser's next call will not use.

    A ControlNet is called before the denoiser, with the same timestep and batch. Where the denoiser's row is certain
    by then, outputs for skipped modules are left out, and so is the dropped branch; where the denoiser's call is left
    out, so is the ControlNet's. In doubt it runs in full.
    """

    def __init__(self, interceptors: Interceptors, twins: Set[str], module: nn.Module) -> None:
        """Prepare for `module`; nothing is changed before `install`.

        `twins` names the modules that the denoiser has too, of the same kind.
        """
        self._interceptors = interceptors
        self._module = module
        self._parameters = parameters_of(module)
        self._present = Present({})
        self._twins = twins
        self._switches: list[Switch] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Join the copied attachment; where only the ControlNet is copied, it runs in full."""
        vars(self).update(state)
        self._interceptors.join(self)

    def install(self) -> None:
        """Intercept the calls of the ControlNet."""
        vars(self._module)[CALL] = self.lead
        self._interceptors.join(self)

    def follow(self, assignments: Sequence[Assignment]) -> None:
        """Intercept the modules within that runs with these assignments can skip."""
        names = {name for bound in assignments for name in self._encoder(bound)} - self._present.duties.keys()
        modules = dict(self._module.named_modules()) if names else {}
        for name in sorted(names):
            switch = Switch(self._present, modules[name], name, runs_if_compiled=True)
            self._switches.append(switch)
            self._present.duties[name] = Duty([Twin(name)])
            switch.install()

    def _encoder(self, bound: Assignment) -> tuple[str, ...]:
        """Name the modules whose outputs nothing uses when the target of an assignment is reused."""
        encoder = bound.target.encoder if isinstance(bound.target, Region) else ()
        return encoder if self._twins >= {*encoder} else ()

    def uninstall(self) -> None:
        """Put back exactly what was there."""
        for switch in self._switches:
            switch.uninstall()
        if vars(self._module).get(CALL) == self.lead:
            del vars(self._module)[CALL]

    def lead(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the ControlNet, without what the denoiser's next call will not use."""
        forward = class_call(self._module)
        driver = self._interceptors.driver
        if torch.compiler.is_compiling() or driver is None:
            return forward(*args, **kwargs)
        try:
            inputs = CallInputs(self._module, self._parameters, args, kwargs)
        except AdapterError:  # without a sample or a timestep its step is not known
            return forward(*args, **kwargs)
        is_known = self._present.is_known([_signature(tensor) for tensor in tensors(inputs.named)])
        call = foresee(driver.state, self._module, inputs) if is_known else None
        if call is None:
            return self._present.note(forward(*args, **kwargs))
        if call.is_left_out and self._present.output is not None:
            call.keeper.record.shortened += 1
            # Several ControlNets add up their outputs in place.
            return tree_map(lambda like: zeros(like.shape, like), self._present.output)
        layout, skipped = call.calls.layout, self._skipped(call)
        call.keeper.record.shortened += bool(skipped) or call.narrowed_by is not None
        with self._present.skipping(skipped, len(layout.order) // len(call.branches)):
            if call.narrowed_by is None:
                return self._present.note(forward(*args, **kwargs))
            stays = call.branches[0]
            args, kwargs = pick_call(inputs, layout, stays)
            return spread(forward(*args, **kwargs), layout, stays, lambda unused: unused)

    def _skipped(self, call: Call) -> Set[str]:
        reused = (
            bound
            for index, bound in enumerate(call.keeper.assignments)
            if call.actions[index] is Action.REUSE and call.keeps(index)
        )
        return self._present.shapes.keys() & {name for bound in reused for name in self._encoder(bound)}


class Present(threading.local):
    """What each thread's present call skips, and the output shapes of its last calls with the same input shapes.

    `duties` are those of the modules that can be skipped, by name: all threads and copies share them. `shapes` are of
    modules by name, `output` of the ControlNet itself. `share` is the number of branches in the batch, of which one
    runs.
    """

    def __init__(self, duties: dict[str, Duty]) -> None:
        """Start before the first call of a thread."""
        self.duties = duties
        self.call: Any = self  # not None, so that switches ask their roles in every call
        self.skipped: Set[str] = frozenset()
        self.inputs: Any = None
        self.shapes: dict[str, Any] = {}
        self.output: Any = None
        self.share = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Present:
        """Start anew: a copied module has made no call."""
        return Present(self.duties)

    def __reduce__(self) -> Any:
        """Refuse: an unpickled ControlNet would have no denoiser to follow."""
        raise AttachmentError(
            "the ControlNet of an attached pipeline cannot be pickled; call cachekit.remove(pipe) first"
        )

    def is_known(self, inputs: Any) -> bool:
        """Whether the last call had inputs of these shapes; if not, forget the output shapes that it recorded."""
        if inputs == self.inputs:
            return True
        self.inputs, self.shapes, self.output = inputs, {}, None
        return False

    def note(self, output: Any) -> Any:
        """Record the shapes of what the ControlNet returned."""
        if self.output is None:
            self.output = tree_map(zeros_like, output)
        return output

    @contextlib.contextmanager
    def skipping(self, names: Set[str], share: int) -> Iterator[None]:
        """Skip the modules of these names within the block, where one of `share` branches in the batch runs."""
        self.skipped, self.share = names, share
        try:
            yield
        finally:
            self.skipped, self.share = frozenset(), 1


class Twin(Role):
    """Skips a module of a ControlNet together with the denoiser's module of the same name."""

    def __init__(self, name: str) -> None:
        """Serve the module `name`."""
        self.name = name

    def before(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a placeholder where the module is skipped."""
        if self.name not in call.skipped:
            return super().before(call, args, kwargs)
        return tree_map(Placeholder(1, call.share), call.shapes[self.name])

    def after(self, call: Any, output: Any) -> None:
        """Record the shapes that a placeholder must have."""
        if call.share == 1:
            call.shapes.setdefault(self.name, tree_map(zeros_like, output))


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.dtype, tensor.device)


def _twins(module: nn.Module, denoiser: nn.Module) -> Set[str]:
    """Name the modules that a denoiser has too, of the same kind; those that it shares its own switches intercept."""
    here, there = dict(module.named_modules()), dict(denoiser.named_modules())
    shared = {*here.values()} & {*there.values()}
    own = {name: one for name, one in here.items() if name in there and one not in shared}
    return {name for name, one in own.items() if type(one).__name__ == type(there[name]).__name__}
