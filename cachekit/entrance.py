"""Stand before a denoiser's calls: outside of its hooks, of whatever wraps its forward, and of compiled code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .driver import Denoiser, Driver

__all__ = ["Entrance"]

#: Where torch looks, at each call of a module, for what `module.compile()` has put before its hooks and forward.
_CALL = "_compiled_call_impl"
#: What diffusers' pipelines wrap around a call, to name its branch.
_NAMING = "cache_context"


class Entrance:
    """Lead a denoiser's calls, and the names that pipelines give them, through the driver.

    Neither a subclass (`from_pipe` compares classes) nor a wrapper on `forward` (offloading puts it back after
    each run) would do, and hooks cannot keep a call from running.
    """

    def __init__(self, driver: Driver, denoiser: Denoiser) -> None:
        """Prepare for `denoiser`; nothing is changed before `install`."""
        self.driver = driver
        self.denoiser = denoiser
        self.inner: Callable[..., Any] | None = vars(denoiser.module).get(_CALL)
        self.naming = Naming(driver, denoiser) if hasattr(denoiser.module, _NAMING) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the denoiser as the plan says."""
        return self.driver.call(self.denoiser, self.inner or self.denoiser.module._call_impl, args, kwargs)

    def install(self) -> None:
        """Stand before the module's calls; where it was compiled since the last time, before what compiled it."""
        held = vars(self.denoiser.module)
        if held.get(_CALL) is not self:
            self.inner, held[_CALL] = held.get(_CALL), self
        if self.naming is not None:
            held[_NAMING] = self.naming

    def uninstall(self) -> None:
        """Put back exactly what was there."""
        held = vars(self.denoiser.module)
        if held.get(_CALL) is self:
            del held[_CALL]
            if self.inner is not None:
                held[_CALL] = self.inner
        if held.get(_NAMING) is self.naming:
            held.pop(_NAMING, None)


class Naming:
    """Note the name that a pipeline gives its calls, and hand it on to diffusers' own hooks."""

    def __init__(self, driver: Driver, denoiser: Denoiser) -> None:
        """Stand for `denoiser`'s own method."""
        self.driver = driver
        self.denoiser = denoiser

    @contextlib.contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Name the calls within the block."""
        module: Any = self.denoiser.module
        with self.driver.named(name), type(module).cache_context(module, name, **kwargs):
            yield
