"""What a calibration is for: the model, the scheduler, the schedule and the guidance of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cachekit.errors import CalibrationError
from cachekit.interface.beginning import Beginning
from cachekit.parts.schedules import Mask

#: How far timesteps may lie apart, relative to the greatest of them.
_TOLERANCE = 1e-3


class Numbers(BaseModel):
    """Base of what a calibration's file holds: fields that are all known, and finite numbers, not texts of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Key(Numbers):
    """What a calibration is for: nothing else may use it.

    `model` is a digest of the denoiser's weights, `settings` are the scheduler's. `full` lists the steps in which the
    denoiser runs, `beside` has the other scales of guidance. `separate` is whether each branch has a call of its own.
    """

    model: str = Field(min_length=1)
    scheduler: str
    settings: dict[str, str]
    steps: int = Field(ge=1)
    timesteps: list[float | None]
    schedule: str
    full: list[int]
    branches: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    separate: bool
    beside: dict[str, float] = Field(default_factory=dict)

    @property
    def _calls(self) -> str:
        return f"{' and '.join(self.branches)} {'in calls of their own' if self.separate else 'in one call'}"

    def difference(self, other: Key) -> str:
        """Describe the first difference as "what it is here, what it is there"; "" if there is none."""
        named = {name: (getattr(self, name), getattr(other, name)) for name in ("model", "scheduler", "steps")}
        # A setting that only one release of diffusers has is at its default there.
        both = [key for key in self.settings if key in other.settings]
        named |= {f"the scheduler's {key}": (self.settings[key], other.settings[key]) for key in both}
        named |= {
            "full steps": ((self.schedule, self.full), (other.schedule, other.full)),
            "branches": (self._calls, other._calls),
            "scales beside guidance": (self.beside, other.beside),
        }
        for name, (mine, theirs) in named.items():
            same = mine[1] == theirs[1] if name == "full steps" else mine == theirs
            if not same:
                return f"{name} {_plain(mine)}, not {_plain(theirs)}"
        if not _close(self.timesteps, other.timesteps):
            return f"timesteps {_ends(self.timesteps)}, not {_ends(other.timesteps)}"
        return ""

    def is_widened(self, other: Key) -> bool:
        """Whether full steps that another policy adds to the same schedule are the only difference."""
        if not other.full or self.full == other.full:
            return False
        same = (other.schedule, str(Mask(steps=tuple(other.full))))
        return self.schedule in same and not self.model_copy(update={"full": other.full}).difference(other)


def key_of(run: Beginning) -> Key:
    """Describe what a run would be calibrated for.

    Raises `CalibrationError` for a bare loop and for weights that aren't in memory.
    """
    from cachekit.upstream.fingerprints import fingerprint, settings_of
    from cachekit.upstream.scales import scales_beside

    kind = type(run.denoiser).__name__
    if run.scheduler is None or not run.arguments:
        raise CalibrationError(f"{kind} runs without its pipeline, so scheduler and guidance are unknown; apply to it")
    model = fingerprint(run.denoiser)
    if not model:
        raise CalibrationError(f"{kind}: its weights are not in memory, so that it can't be recognised; load them")
    return Key(
        model=model,
        scheduler=type(run.scheduler).__name__,
        settings=settings_of(run.scheduler),
        steps=run.steps,
        timesteps=[time.timestep for time in run.times],
        schedule=run.schedule,
        full=list(run.full),
        branches=list(run.layout.order),
        separate=run.layout.separate,
        beside=scales_beside(run.arguments),
    )


def guidance_of(run: Beginning) -> float:
    """Read a run's guidance scale; raises `CalibrationError` where its pipeline has none."""
    from cachekit.upstream.scales import scale_of

    scale = scale_of(run.arguments)
    if scale is None:
        raise CalibrationError(f"{type(run.denoiser).__name__}: its pipeline takes no guidance scale; use what=linear")
    return scale


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_plain, value)) if isinstance(value, tuple) else ";".join(map(str, value))
    return str(value)


def _close(one: Sequence[float | None], two: Sequence[float | None]) -> bool:
    if len(one) != len(two):
        return False
    scale = max((abs(stamp) for stamp in (*one, *two) if stamp is not None), default=0.0)
    return all(
        a == b or (a is not None and b is not None and abs(a - b) <= _TOLERANCE * scale) for a, b in zip(one, two)
    )


def _ends(stamps: Sequence[float | None]) -> str:
    return f"{len(stamps)} from {stamps[0]} to {stamps[-1]}" if stamps else "none"
