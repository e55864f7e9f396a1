"""Leave out of a ControlNet's calls what the denoiser's next call would throw away."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cachekit.errors import AttachmentError
from cachekit.guidance.slicing import pick_call, spread
from cachekit.interface.policy import Action
from cachekit.interface.sites import Region
from cachekit.planning.assignments import Assignment
from cachekit.switches.parts import Part
from cachekit.switches.placeholders import Placeholder, zeros_like
from cachekit.switches.switch import Switch
from cachekit.tensors import tensors, tree_map
from cachekit.upstream.arguments import by_name, parameters_of

if TYPE_CHECKING:
    from cachekit.driving.driver import Driver
    from cachekit.runs.call import Call

_CALL = "_call_impl"


class ControlNetInterceptor:
    """Stand before the calls of one ControlNet.

    It is called before the denoiser, with the same timestep and batch. Where the denoiser's row is certain by
    then, what it makes for skipped modules is left out, and so is the branch that is dropped: nobody reads them.
    In doubt it runs as it is.
    """

    def __init__(
        self, driver: Driver, module: nn.Module, denoiser: nn.Module, fellows: list[ControlNetInterceptor]
    ) -> None:
        """Prepare for `module`, which serves `denoiser`; nothing is changed before `install`.

        `fellows` are the installed ones of an attachment: a copy of this one joins those of the copied.
        """
        self.driver: Driver | None = driver
        self.fellows = fellows
        self.module = module
        self.parameters = parameters_of(module)
        self.present = Present()
        self.twins = _twins(driver.assignments, module, denoiser)
        modules = dict(module.named_modules())
        names = {name for twins in self.twins.values() for name in twins}
        self.switches = [
            Switch(self.present, modules[name], name, [Twin(self.present, name)], runs_if_compiled=True)
            for name in sorted(names)
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> ControlNetInterceptor:
        """Return the one of a copied ControlNet, which runs in full where the denoiser is not copied with it."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(vars(self))
        twin.driver, twin.fellows = memo.get(id(self.driver)), memo.get(id(self.fellows), [])
        twin.module, twin.present = copy.deepcopy((self.module, self.present), memo)
        twin.switches = copy.deepcopy(self.switches, memo)
        twin.fellows.append(twin)
        return twin

    def install(self) -> None:
        """Stand before the module's calls, and those of the modules within that can be skipped."""
        for switch in self.switches:
            switch.install()
        vars(self.module)[_CALL] = self.lead

    def uninstall(self) -> None:
        """Put back exactly what was there."""
        for switch in self.switches:
            switch.uninstall()
        if vars(self.module).get(_CALL) == self.lead:
            del vars(self.module)[_CALL]

    def lead(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the ControlNet, as short as the denoiser's next call allows."""
        forward = functools.partial(type(self.module)._call_impl, self.module)
        if torch.compiler.is_compiling() or self.driver is None:
            return forward(*args, **kwargs)
        arguments = by_name(self.parameters, args, kwargs)
        is_known = self.present.is_known([_signature(tensor) for tensor in tensors(arguments)])
        call = self.driver.foresee(self.module, arguments) if is_known else None
        if call is None:
            return forward(*args, **kwargs)
        layout, skipped = call.run.layout, self._skipped(call)
        call.run.record.shortened += bool(skipped) or call.narrowed_by is not None
        with self.present.skipping(skipped, len(layout.order) // len(call.branches)):
            if call.narrowed_by is None:
                return forward(*args, **kwargs)
            stays = call.branches[0]
            args, kwargs = pick_call((args, kwargs), self.parameters, layout, stays, call.batch)
            return spread(forward(*args, **kwargs), layout, stays, lambda thrown_away: thrown_away)

    def _skipped(self, call: Call) -> Set[str]:
        reused = (i for i in self.twins if call.actions[i] is Action.REUSE and call.keeps(i))
        return self.present.shapes.keys() & {name for index in reused for name in self.twins[index]}


class Present(threading.local):
    """Hold, for each thread, what its present call skips and the shapes that calls with such inputs make."""

    def __init__(self) -> None:
        """Start with no call made."""
        self.call: Any = self  # a switch asks its parts in every call
        self.skipped: Set[str] = frozenset()
        self.inputs: Any = None
        self.shapes: dict[str, Any] = {}
        self.share = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Present:
        """Return a fresh one: a copied module has made no call."""
        return Present()

    def __reduce__(self) -> Any:
        """Raise: whoever unpickled it would have no denoiser to follow."""
        raise AttachmentError(
            "the ControlNet of an attached pipeline cannot be pickled; call cachekit.remove(pipe) first"
        )

    def is_known(self, inputs: Any) -> bool:
        """Tell whether the last call had such inputs; if not, forget the shapes that it made."""
        if inputs == self.inputs:
            return True
        self.inputs, self.shapes = inputs, {}
        return False

    @contextlib.contextmanager
    def skipping(self, names: Set[str], share: int) -> Iterator[None]:
        """Skip the modules of these names within the block, where one part in `share` of the batch is run."""
        self.skipped, self.share = names, share
        try:
            yield
        finally:
            self.skipped, self.share = frozenset(), 1


class Twin(Part):
    """Skip a module of a ControlNet together with the denoiser's of the same name."""

    def __init__(self, present: Present, name: str) -> None:
        """Serve the module `name`."""
        self.present = present
        self.name = name

    def before(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a placeholder where the module is skipped."""
        if self.name not in self.present.skipped:
            return super().before(call, args, kwargs)
        return tree_map(Placeholder(1, self.present.share), self.present.shapes[self.name])

    def after(self, call: Any, output: Any) -> None:
        """Record the shapes that a placeholder must have."""
        if self.present.share == 1:
            self.present.shapes.setdefault(self.name, tree_map(zeros_like, output))


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.dtype, tensor.device)


def _twins(assignments: Sequence[Assignment], module: nn.Module, denoiser: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return, by assignment, the modules that make only what is thrown away when its region is reused."""
    here, there = dict(module.named_modules()), dict(denoiser.named_modules())
    shared = {*here.values()} & {*there.values()}  # which stand behind the denoiser's own switches

    def is_alike(name: str) -> bool:
        if name not in here or here[name] in shared:
            return False
        return type(here[name]).__name__ == type(there[name]).__name__

    regions = ((index, bound.target) for index, bound in enumerate(assignments) if isinstance(bound.target, Region))
    return {index: region.encoder for index, region in regions if all(map(is_alike, region.encoder))}
