"""Intercept a denoiser's calls, outside of its hooks, of wrappers on its forward, and of compiled code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

from cachekit.errors import AttachmentError
from cachekit.runs.denoiser import Denoiser
from cachekit.upstream.calls import CALL, COMPILED_CALL, NAMING, class_call, class_naming
from cachekit.upstream.compiling import active_compiler, is_refused, leads_to, uncompiled, uncompiled_frame

_OUTSIDE = "cachekit intercepts a denoiser's calls outside of compiled code; compile the denoiser itself"

#: A call in steps: yields the arguments of the forward, is sent its output, and returns the call's own.
CallSteps = Generator[tuple[tuple[Any, ...], dict[str, Any]], Any, Any]


class CallDriver(Protocol):
    """What an entrance passes calls to: `Driver`, which a higher module defines."""

    def call(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any], enclosed: bool) -> CallSteps:
        """Take one call of a denoiser through its steps; `enclosed` is whether it is compiled as a whole."""

    def named(self, context: str | None) -> contextlib.AbstractContextManager[None]:
        """Apply the pipeline's name for the calls in this block."""


class Entrance:
    """Passes a denoiser's calls, and the names that pipelines give them, to the driver.

    A subclass would not do, because `from_pipe` compares classes; nor would a wrapper on `forward`, which offloading
    restores after each run, nor hooks, which cannot leave out a call.
    """

    def __init__(self, driver: CallDriver, denoiser: Denoiser) -> None:
        """Prepare for `denoiser`; nothing is changed before `install`."""
        self._driver = driver
        self._denoiser = denoiser
        self.inner: Callable[..., Any] | None = None
        self._installed = False
        self._naming = Naming(driver, denoiser) if hasattr(denoiser.module, NAMING) else None

    def __getstate__(self) -> dict[str, Any]:
        """Leave compiled code out of copies, as torch does."""
        return {**vars(self), "inner": None}

    @uncompiled_frame(_OUTSIDE)
    def lead(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the denoiser, as the driver decides."""
        module = self._denoiser.module
        forward = self.inner or class_call(module)
        if not self._installed:  # code compiled in the meantime still calls this
            return forward(*args, **kwargs)
        enclosed = active_compiler() not in (None, False)
        steps, given, output = _begin(self._driver.call, self._denoiser, args, kwargs, enclosed)
        if given is None:
            return output
        try:
            output = forward(*given[0], **given[1])
        except BaseException as error:
            _abandon(steps, error, type(module).__name__)
            raise
        if not self._installed:  # removed meanwhile, perhaps by another thread: some modules were skipped, others not
            steps.close()
            return forward(*args, **kwargs)
        return _end(steps, output)

    def install(self) -> None:
        """Intercept the module's calls, in front of the compiled code where there is any."""
        self._installed = True
        held = vars(self._denoiser.module)
        held[CALL] = self.lead
        compiled = held.get(COMPILED_CALL)
        if compiled not in (None, self.lead) and not leads_to(compiled, self.lead):
            self.inner, held[COMPILED_CALL] = compiled, self.lead
        if self._naming is not None:
            held[NAMING] = self._naming

    def settle(self) -> None:
        """Move in front of code that was compiled since `install`; do nothing once uninstalled, by any thread."""
        if self._installed:
            self.install()

    def uninstall(self) -> None:
        """Put back exactly what was there."""
        self._installed = False
        held = vars(self._denoiser.module)
        for name, mine in ((CALL, self.lead), (COMPILED_CALL, self.lead), (NAMING, self._naming)):
            if mine is not None and held.get(name) == mine:
                del held[name]
        inner, self.inner = self.inner, None
        if inner is not None and COMPILED_CALL not in held:
            held[COMPILED_CALL] = inner


class Naming:
    """Records the name that a pipeline gives its calls, and passes it on to diffusers' own hooks."""

    def __init__(self, driver: CallDriver, denoiser: Denoiser) -> None:
        """Prepare to replace the method of `denoiser`."""
        self._driver = driver
        self._denoiser = denoiser

    @contextlib.contextmanager
    def __call__(self, name: str | None, **kwargs: Any) -> Iterator[None]:
        """Name the calls within the block."""
        with self._driver.named(name), class_naming(self._denoiser.module, name, **kwargs):
            yield


@uncompiled(_OUTSIDE)
def _begin(call: Callable[..., CallSteps], *given: Any) -> tuple[CallSteps, Any, Any]:
    """Begin a call: get the arguments of the forward that it needs, or None and the call's output."""
    steps = call(*given)
    try:
        return steps, next(steps), None
    except StopIteration as end:
        return steps, None, end.value


@uncompiled(_OUTSIDE)
def _end(steps: CallSteps, output: Any) -> Any:
    """Finish a call with the output of its forward."""
    try:
        steps.send(output)
    except StopIteration as end:
        return end.value
    raise AssertionError("a call has one forward")


@uncompiled(_OUTSIDE)
def _abandon(steps: CallSteps, error: BaseException, name: str) -> None:
    """Close a call after an error of its forward; raise a one-line error instead where it had to be one graph."""
    steps.close()
    if is_refused(error):
        raise AttachmentError(
            f"{name}: a policy decides within the call what is reused, which cannot be one graph with the rest;"
            " compile its blocks instead, or leave out fullgraph"
        ) from None
