"""Calibrate in this process, or in the actors of a Ray cluster, which add up their sums in each step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from cachekit.errors import CalibrationError
from cachekit.models import loading
from cachekit.tools.calibrating.before import refuse_to_add
from cachekit.tools.calibrating.calibrate import Progress, calibrate
from cachekit.tools.calibrating.calibration import Calibration
from cachekit.tools.calibrating.fits import Figures
from cachekit.tools.calibrating.lockstep import Exchange, alone
from cachekit.tools.calibrating.sums import Sums
from cachekit.tools.clusters import cluster, imported_ray

#: Calibrates at one guidance scale with these prompts.
Executor = Callable[["Request", Sequence[str], "float | None", "Progress | None", int], Calibration]


@dataclass(frozen=True)
class Request:
    """A model and how it is calibrated; the fields are those of `calibrate`, and of the command."""

    model: str
    spec: str
    steps: int
    scheduler: str | None = None
    reference_steps: int | None = None
    batch: int = 8
    seed: int = 0
    device: str | None = None
    dtype: str | None = None

    def load(self) -> Any:
        """Load the pipeline."""
        return loading.ready(self.model, self.scheduler, self.device, self.dtype)

    def refuse_to_add(self, made: Calibration, source: str, prompt: str, scale: float | None) -> float:
        """Load the pipeline, and refuse to add to a calibration of something else; see `before.refuse_to_add`."""
        pipe = self.load()
        return refuse_to_add(
            made,
            source,
            pipe,
            self.spec,
            prompt,
            num_inference_steps=self.steps,
            guidance_scale=scale,
            reference_steps=self.reference_steps,
        )

    def run(
        self,
        pipe: Any,
        prompts: Sequence[str],
        scale: float | None,
        progress: Progress | None = None,
        exchange: Exchange = alone,
        first: int = 0,
    ) -> Calibration:
        """Calibrate a loaded pipeline with prompts, of which the first has the number `first`."""
        return calibrate(
            pipe,
            self.spec,
            prompts,
            num_inference_steps=self.steps,
            guidance_scale=scale,
            reference_steps=self.reference_steps,
            batch=self.batch,
            seed=self.seed + first,
            progress=progress,
            exchange=exchange,
        )


def _serial(
    request: Request, prompts: Sequence[str], scale: float | None, progress: Progress | None, workers: int
) -> Calibration:
    return request.run(request.load(), prompts, scale, progress)


def _ray(
    request: Request, prompts: Sequence[str], scale: float | None, progress: Progress | None, workers: int
) -> Calibration:
    ray = imported_ray()
    count = min(workers, len(prompts))
    bounds = [place * len(prompts) // count for place in range(count + 1)]
    with cluster(ray, count, 1):
        # Waiting costs no processor, and there may be only as many as there are workers.
        adder = ray.remote(num_cpus=0)(_Adder).remote(count)
        actors = [ray.remote(num_cpus=1)(_Worker).remote(request, adder, place) for place in range(count)]
        waiting = [
            actor.run.remote(prompts[first:stop], scale, first)
            for actor, first, stop in zip(actors, bounds, bounds[1:])
        ]
        found = _results(ray, waiting, progress)
    # Figures are of each worker's own prompts, weights of all.
    whole = Calibration.merge(*found) if isinstance(found[0].fits[0], Figures) else found[0]
    return _as_one_run(whole, len(prompts))


def _results(ray: Any, waiting: list[Any], progress: Progress | None) -> list[Calibration]:
    """Wait for all workers; raises the error of the first that fails, without waiting for the others."""
    left, found = list(waiting), []
    while left:
        (done,), left = ray.wait(left)
        try:
            found.append(Calibration.model_validate_json(ray.get(done)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            *_, reason = str(error).strip().splitlines()
            raise CalibrationError(f"a worker of the Ray cluster died: {reason}; run it again") from error
        if progress:
            progress(len(found), len(waiting))
    return found


def _as_one_run(made: Calibration, prompts: int) -> Calibration:
    """Count what several workers have made as one run of all prompts."""
    fits = [fit.model_copy(update={"prompts": prompts, "runs": 1}) for fit in made.fits]
    # Not a copy, which would have the cached figures of the first.
    return Calibration(**{**dict(made), "fits": fits})


class _Adder:
    """Adds the sums of all workers, step by step."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._parts: dict[int, dict[int, Sums]] = {}
        self._complete: dict[int, asyncio.Event] = {}

    async def add(self, place: int, step: int, sums: Sums) -> Sums:
        """Add a worker's sums of a step, wait for the others', and get the total."""
        parts = self._parts.setdefault(step, {})
        complete = self._complete.setdefault(step, asyncio.Event())
        parts[place] = sums
        if len(parts) == self._workers:
            complete.set()
        await complete.wait()
        return reduce(add, [parts[key] for key in sorted(parts)])


class _Worker:
    """Calibrates with a share of the prompts, in a process of Ray."""

    def __init__(self, request: Request, adder: Any, place: int) -> None:
        self._request, self._adder, self._place = request, adder, place

    def run(self, prompts: Sequence[str], scale: float | None, first: int) -> str:
        """Calibrate; get the calibration as JSON."""
        ray = imported_ray()

        def exchange(step: int, sums: Sums) -> Sums:
            total: Sums = ray.get(self._adder.add.remote(self._place, step, sums))
            return total

        return self._request.run(self._request.load(), prompts, scale, None, exchange, first).model_dump_json()


EXECUTORS: dict[str, Executor] = {"serial": _serial, "ray": _ray}
