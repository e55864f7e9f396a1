"""What a calibration would be for, found before it is made."""

from __future__ import annotations

from typing import Any, ClassVar

from cachekit.applying import apply
from cachekit.errors import CalibrationError
from cachekit.interface.beginning import Beginning
from cachekit.interface.parts import Choice, StandIn
from cachekit.interface.specs import Spec, parse
from cachekit.parts.places import WholeDenoiser
from cachekit.parts.schedules import Every
from cachekit.registry.catalog import Catalog, installed
from cachekit.tools.calibrating.batches import Prompt, batched, call_of, shared_arguments
from cachekit.tools.calibrating.calibrate import Given, choice_of, measured_name
from cachekit.tools.calibrating.calibration import Calibration
from cachekit.tools.calibrating.key import Key, guidance_of, key_of
from cachekit.tools.calibrating.measured import measured_key
from cachekit.upstream.stepping import watched


class _BegunError(CalibrationError):
    """The run that was started to be looked at, and that goes no further."""

    def __init__(self, run: Beginning) -> None:
        super().__init__("the run was started to be looked at")
        self.run = run


class _Stop(StandIn):
    """Ends a run as soon as it begins."""

    name: ClassVar[str] = "stop"

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Raise what the run begins with."""
        raise _BegunError(run)


def refuse_to_add(
    made: Calibration,
    source: str,
    pipe: Any,
    spec: Spec,
    prompt: Prompt,
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    reference_steps: int | None = None,
    catalog: Catalog | None = None,
    **arguments: Any,
) -> float:
    """Refuse to add what `calibrate` would make with these arguments to a calibration that was read from `source`.

    The pipeline is called for one prompt, and stopped at the first call of its denoiser. The result is the guidance
    scale. Raises `CalibrationError` where the two differ in more than that.
    """
    policy = parse(spec, catalog or installed())
    measured = measured_name(policy)
    choice = Choice(where=WholeDenoiser(), when=Every(n=2), what=_Stop())
    choices = {"denoiser": choice if measured else choice_of(policy).with_parts(what=_Stop())}
    (batch,) = batched([prompt], 1, 0)
    call = call_of(batch, num_inference_steps, shared_arguments(pipe, guidance_scale, arguments, batch))
    run = _begun(pipe, Given.of(choices), call, catalog)
    key = measured_key(run, measured) if measured else key_of(run)
    aim = num_inference_steps if measured else reference_steps or num_inference_steps
    difference = _difference(made, key, aim)
    if difference:
        raise CalibrationError(f"{source!r} was made for {difference}; give another output, or the options of this one")
    return guidance_of(run)


def _begun(pipe: Any, policy: Given, call: dict[str, Any], catalog: Catalog | None) -> Beginning:
    twin = watched(pipe, lambda step: step.run())
    with apply(pipe, policy, catalog=catalog) as attachment:
        try:
            with attachment.run_of(twin, (), call):
                twin(**call)
        except _BegunError as begun:
            return begun.run
    raise CalibrationError(f"{type(pipe).__name__} has not called its denoiser; give a prompt that it draws")


def _difference(made: Calibration, key: Key, aim: int) -> str:
    found = made.key.difference(key)
    if not found and made.reference_steps != aim:
        return f"reference steps {made.reference_steps}, not {aim}"
    return found
