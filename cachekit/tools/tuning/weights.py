"""Weights and figures that candidates need, made once for each kind of run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from cachekit.applying import apply
from cachekit.errors import CalibrationError
from cachekit.interface.policy import Policy
from cachekit.interface.specs import parse
from cachekit.registry.catalog import installed
from cachekit.registry.notices import silent_log
from cachekit.tools.bench.cells import digest
from cachekit.tools.bench.measuring import timed_call
from cachekit.tools.bench.subjects import Subject, set_scheduler
from cachekit.tools.calibrating.calibrate import calibrate
from cachekit.tools.tuning.candidates import FILE, Candidate
from cachekit.upstream.calling import OUTPUT, SCALE, STEPS
from cachekit.upstream.fingerprints import fingerprint
from cachekit.upstream.pipelines import denoiser_of

__all__ = ["Weights", "precision_of"]


@dataclass
class Weights:
    """Makes the calibrations that candidates lack, in `folder`; None where there is no place for them."""

    subject: Subject
    scheduler: str
    prompts: Sequence[str]
    folder: Path | None
    _found: dict[tuple[str, int], bool] = field(default_factory=dict, init=False)

    def resolved(self, candidate: Candidate) -> tuple[str, ...]:
        """Specs of a candidate, with a file for each that needs one which does not ship.

        Raises `CalibrationError` where it can't be made.
        """
        return tuple(self._with_file(spec, candidate.steps) for spec in candidate.specs)

    def _with_file(self, spec: str, steps: int) -> str:
        policy = parse(spec, installed())
        if FILE not in type(policy).model_fields or getattr(policy, FILE) is not None:
            return spec
        path = self._file(spec, steps)
        if path is None or not path.is_file():
            if (spec, steps) not in self._found:
                self._found[spec, steps] = self._runs(policy, steps)
            if self._found[spec, steps]:
                return spec
            if path is None:
                raise CalibrationError(f"{spec}: needs weights for {steps} steps; name an output, to put them beside")
            self._make(policy, steps, path)
        return str(policy.model_copy(update={FILE: str(path)}))

    def _file(self, spec: str, steps: int) -> Path | None:
        """File of the weights for a spec, of a name that no other run's weights have."""
        if self.folder is None:
            return None
        run = [steps, self.scheduler, *self._model, self._arguments(steps).get(SCALE), *self.prompts]
        return self.folder / f"{digest([spec, *run])}.json"

    @cached_property
    def _model(self) -> tuple[str, str]:
        denoiser = denoiser_of(self.subject.pipe)
        return fingerprint(denoiser), precision_of(denoiser)

    def _runs(self, policy: Policy, steps: int) -> bool:
        """Whether a policy finds all that it needs, by one image."""
        try:
            with silent_log(), apply(self.subject.pipe, policy):
                timed_call(self.subject.pipe, self._arguments(steps), 0)
        except CalibrationError:
            return False
        return True

    def _make(self, policy: Policy, steps: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        given = self._arguments(steps)
        scale = given.get(SCALE)
        set_scheduler(self.subject.pipe, self.scheduler)
        prompts = [
            {name: value for name, value in self.subject.arguments(text).items() if name not in (SCALE, OUTPUT)}
            for text in self.prompts
        ]
        # One image at a time: what fits into memory for measuring fits here.
        made = calibrate(self.subject.pipe, policy, prompts, num_inference_steps=steps, guidance_scale=scale, batch=1)
        made.save(path)

    def _arguments(self, steps: int) -> dict[str, Any]:
        set_scheduler(self.subject.pipe, self.scheduler)
        return {**self.subject.arguments(self.prompts[0]), STEPS: steps}


def precision_of(denoiser: nn.Module) -> str:
    """Name the dtype of a denoiser's first parameter; "" where it has none."""
    first = next(denoiser.parameters(), None)
    return "" if first is None else str(first.dtype).removeprefix("torch.")
