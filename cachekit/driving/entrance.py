"""Stand before a denoiser's calls: outside of its hooks, of whatever wraps its forward, and of compiled code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from cachekit.driving.driver import Driver, Steps
from cachekit.errors import AttachmentError
from cachekit.runs.denoiser import Denoiser
from cachekit.upstream.compiling import active_compiler, is_refused, leads_to, uncompiled, uncompiled_frame

__all__ = ["Entrance"]

#: What torch calls for each call of a module: its method, which runs hooks and forward, unless the other is there,
#: which `module.compile()` makes of it.
_CALL, _COMPILED = "_call_impl", "_compiled_call_impl"
#: What diffusers' pipelines wrap around a call, to name its branch.
_NAMING = "cache_context"
_OUTSIDE = "cachekit leads a denoiser's calls from outside; compile the denoiser itself"


class Entrance:
    """Lead a denoiser's calls, and the names that pipelines give them, through the driver.

    Neither a subclass (`from_pipe` compares classes) nor a wrapper on `forward` (offloading puts it back after
    each run) would do, and hooks cannot keep a call from running.
    """

    def __init__(self, driver: Driver, denoiser: Denoiser) -> None:
        """Prepare for `denoiser`; nothing is changed before `install`."""
        self.driver = driver
        self.denoiser = denoiser
        self.inner: Callable[..., Any] | None = None
        self._installed = False
        self.naming = Naming(driver, denoiser) if hasattr(denoiser.module, _NAMING) else None

    @uncompiled_frame(_OUTSIDE)
    def lead(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the denoiser as the plan says."""
        module: Any = self.denoiser.module
        forward = self.inner or functools.partial(type(module)._call_impl, module)
        if not self._installed:  # what was compiled meanwhile still leads here
            return forward(*args, **kwargs)
        enclosed = active_compiler() not in (None, False)
        steps, given, output = _begin(self.driver.call, self.denoiser, args, kwargs, enclosed)
        if given is None:
            return output
        try:
            output = forward(*given[0], **given[1])
        except BaseException as error:
            _abandon(steps, error, type(module).__name__)
            raise
        if not self._installed:  # undone meanwhile, perhaps by another thread: some modules were skipped, others not
            steps.close()
            return forward(*args, **kwargs)
        return _end(steps, output)

    def install(self) -> None:
        """Stand before the module's calls; where it was compiled since the last time, before what compiled it."""
        self._installed = True
        held = vars(self.denoiser.module)
        held[_CALL] = self.lead
        compiled = held.get(_COMPILED)
        if compiled not in (None, self.lead) and not leads_to(compiled, self.lead):
            self.inner, held[_COMPILED] = compiled, self.lead
        if self.naming is not None:
            held[_NAMING] = self.naming

    def uninstall(self) -> None:
        """Put back exactly what was there."""
        self._installed = False
        held = vars(self.denoiser.module)
        for name, mine in ((_CALL, self.lead), (_COMPILED, self.lead), (_NAMING, self.naming)):
            if mine is not None and held.get(name) == mine:
                del held[name]
        inner, self.inner = self.inner, None
        if inner is not None and _COMPILED not in held:
            held[_COMPILED] = inner


class Naming:
    """Note the name that a pipeline gives its calls, and hand it on to diffusers' own hooks."""

    def __init__(self, driver: Driver, denoiser: Denoiser) -> None:
        """Stand for `denoiser`'s own method."""
        self.driver = driver
        self.denoiser = denoiser

    @contextlib.contextmanager
    def __call__(self, name: str | None, **kwargs: Any) -> Iterator[None]:
        """Name the calls within the block."""
        module: Any = self.denoiser.module
        with self.driver.named(name), type(module).cache_context(module, name, **kwargs):
            yield


@uncompiled(_OUTSIDE)
def _begin(call: Callable[..., Steps], *given: Any) -> tuple[Steps, Any, Any]:
    """Return a call, the arguments of the forward it needs, or None and its output."""
    steps = call(*given)
    try:
        return steps, next(steps), None
    except StopIteration as end:
        return steps, None, end.value


@uncompiled(_OUTSIDE)
def _end(steps: Steps, output: Any) -> Any:
    """Return a call's output from that of its forward."""
    try:
        steps.send(output)
    except StopIteration as end:
        return end.value
    raise AssertionError("a call has one forward")


@uncompiled(_OUTSIDE)
def _abandon(steps: Steps, error: BaseException, name: str) -> None:
    """Let a call clean up after an error of its forward; raise one line instead where torch was asked too much."""
    steps.close()
    if is_refused(error):
        raise AttachmentError(
            f"{name}: what is reused is decided within the call, which one graph of the whole cannot do;"
            " compile its blocks instead, or leave out fullgraph"
        ) from None
