"""Pictures with and without policies, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from cachekit.applying import apply
from cachekit.errors import CachekitError, CostError
from cachekit.models.loading import default_device
from cachekit.models.names import is_architecture
from cachekit.tools.bench.cells import Setting
from cachekit.tools.bench.measuring import similarity, steps_at, timed_call
from cachekit.tools.bench.subjects import load, subject_of
from cachekit.upstream.calling import STEPS, on_step_end

if TYPE_CHECKING:
    from PIL.Image import Image

    from cachekit.runs.report import Report

__all__ = ["Comparison", "Picture", "Request", "Studio"]

#: Called with what is drawn, and how many of how many steps are done.
Progress = Callable[[str, int, int], None]
#: Plain pictures are kept for later comparisons, this many.
_KEPT = 16
#: Steps of the run before the first timed one, in which libraries prepare themselves.
_WARM_UP = 2


def _silent(name: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Request:
    """What is drawn; the pipeline decides on a guidance scale of None."""

    model: str
    prompt: str
    steps: int
    guidance: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Picture:
    """A picture, the seconds of the pipeline's call, and the report of its run where policies were applied."""

    image: Image
    seconds: float
    steps: int
    report: Report | None = None

    @property
    def mac_reduction(self) -> float | None:
        """MACs without the policies, over MACs with them; None where they can't be counted."""
        try:
            return self.report.cost.mac_reduction if self.report else None
        except CostError:
            return None


@dataclass(frozen=True)
class Comparison:
    """A picture with policies beside the uncached one, and one of as few plain steps as cost the same.

    `plain` is None where policies save less than a step, or their MACs can't be counted.
    """

    specs: tuple[str, ...]
    uncached: Picture
    cached: Picture
    plain: Picture | None

    def similarity_of(self, picture: Picture) -> tuple[float, float]:
        """PSNR (dB, infinite for equal images) and SSIM of a picture and the uncached one."""
        return similarity(picture.image, self.uncached.image)


class Studio:
    """Draws with one loaded pipeline at a time, one picture at a time."""

    def __init__(self, device: str | None = None, dtype: str | None = None) -> None:
        """Load models onto `device`, by default cuda where there is one."""
        self._device = device
        self._dtype = dtype
        self._lock = Lock()
        self._loaded: tuple[str, Any] = ("", None)
        self._plain: dict[Request, Picture] = {}

    @property
    def loaded_with(self) -> tuple[str, str | None]:
        """The device and the dtype that models are loaded with."""
        return self._device or default_device(), self._dtype

    def draw(self, request: Request, specs: Sequence[str], progress: Progress = _silent) -> Comparison:
        """Draw with policies, uncached, and in plain steps of equal cost.

        Raises a `CachekitError` where the model has no weights or can't be read, where the specs don't fit it, or where
        its pipeline refuses the request.
        """
        if not specs:
            raise CachekitError("no policy is chosen, so there is nothing to compare; choose one")
        with self._lock:
            pipe = self._pipe(request, progress)
            uncached = self._drawn_plainly(pipe, request, "uncached", progress)
            with apply(pipe, specs) as attachment:
                image, seconds = self._called(pipe, request, "with policies", progress)
                cached = Picture(image, seconds, request.steps, attachment.report())
            return Comparison(tuple(specs), uncached, cached, self._rival(pipe, request, cached, progress))

    def _rival(self, pipe: Any, request: Request, cached: Picture, progress: Progress) -> Picture | None:
        if not cached.mac_reduction:
            return None
        steps = steps_at(1 / cached.mac_reduction, request.steps)
        if steps == request.steps:
            return None
        return self._drawn_plainly(pipe, replace(request, steps=steps), f"{steps} plain steps", progress)

    def _drawn_plainly(self, pipe: Any, request: Request, name: str, progress: Progress) -> Picture:
        if request not in self._plain:
            while len(self._plain) >= _KEPT:
                self._plain.pop(next(iter(self._plain)))
            self._plain[request] = Picture(*self._called(pipe, request, name, progress), request.steps)
        return self._plain[request]

    def _pipe(self, request: Request, progress: Progress) -> Any:
        """Load the model of a request, in place of the one before."""
        name, pipe = self._loaded
        if name == request.model:
            return pipe
        if is_architecture(request.model):
            raise CachekitError(f"{request.model} has no weights, only estimates; give a folder, a hub id or demo")
        progress(f"loading {request.model}", 0, 1)
        self._loaded = ("", None)  # frees its memory
        self._plain.clear()
        pipe = load(self._setting(request)).pipe
        self._called(pipe, replace(request, steps=_WARM_UP, seed=0), "warm-up", progress)
        self._loaded = (request.model, pipe)
        return pipe

    def _setting(self, request: Request) -> Setting:
        return Setting(
            model=request.model, captions=(), dtype=self._dtype, device=self._device, guidance=request.guidance
        )

    def _called(self, pipe: Any, request: Request, name: str, progress: Progress) -> tuple[Image, float]:
        arguments = subject_of(pipe, self._setting(request)).arguments(request.prompt)
        shown = on_step_end(pipe, lambda step: progress(name, step + 1, request.steps))
        try:
            call = {**arguments, **shown, STEPS: request.steps}
            image, watch = timed_call(pipe, call, request.seed)
        except (TypeError, ValueError) as error:
            raise CachekitError(f"{type(pipe).__name__} refuses its arguments: {error}; change them") from error
        if image is None:
            raise CachekitError(f"{type(pipe).__name__} gave no images; call it from Python")
        return image, watch.seconds
