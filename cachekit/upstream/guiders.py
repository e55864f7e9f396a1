"""Inspect the guiders of modular diffusers pipelines."""

from __future__ import annotations

from typing import Any

#: Where modular pipelines hold what prepares the calls of a step, and combines what comes of them.
_GUIDERS = ("guider", "guider_2")


#: Guiders that do not count the calls that they have prepared.
_UNCOUNTED = ("SmoothedEnergyGuidance",)


def name_by_guider(pipe: Any, step: int, call: int) -> str | None:
    """Return what a modular pipeline's guider calls the prediction of the `call`-th call of `step`.

    Without a guider, or outside of its calls, it is None. A name other than the first two has the place of the call
    after it: guiders give one name to calls with other inputs.
    """
    guiders = [(guider, guider.get_state()) for guider in _guiders(pipe)]
    if len(guiders) > 1:
        guiders = [(guider, state) for guider, state in guiders if state["step"] == step]
    if not guiders:
        return None
    guider, state = guiders[0]
    names = [getattr(call, guider._identifier_key) for call in guider.prepare_inputs({})]
    place = call + 1 if type(guider).__name__ in _UNCOUNTED else state["count_prepared"]
    if not 0 < place <= len(names):
        return None
    name: str = names[place - 1]
    return name if name in ("pred_cond", "pred_uncond") else f"{name} {place}"


def has_momentum(pipe: Any) -> bool:
    """Tell whether guidance adds up what the branches differed by in earlier steps."""
    return any(getattr(guider, "momentum_buffer", None) is not None for guider in _guiders(pipe))


def _guiders(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in _GUIDERS)
    return [guider for guider in found if hasattr(guider, "prepare_inputs")]


def branch_name(context: str | None) -> str | None:
    """Find the branch in a call's name: guiders name their calls after the predictions that come of them."""
    return context and context.removeprefix("pred_")
