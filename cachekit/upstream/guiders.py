"""Inspect the guiders of modular diffusers pipelines."""

from __future__ import annotations

from typing import Any

#: Attributes in which modular pipelines hold guiders, which prepare the calls of a step and combine their outputs.
_GUIDERS = ("guider", "guider_2")
#: Guiders that don't count the calls that they have prepared.
_UNCOUNTED = ("SmoothedEnergyGuidance",)


def name_by_guider(pipe: Any, step: int, call: int) -> str | None:
    """Find the name that a pipeline's guider gives the prediction of a call; `step` and `call` within it are 0-based.

    None without a guider, or outside of the calls that it prepares. Guiders give a single name to calls with
    different inputs, so names other than "pred_cond" and "pred_uncond" get the place of the call appended, from 1.
    """
    guiders = [(guider, guider.get_state()) for guider in _guiders(pipe)]
    if len(guiders) > 1:
        guiders = [(guider, state) for guider, state in guiders if state["step"] == step]
    if not guiders:
        return None
    guider, state = guiders[0]
    names = [getattr(inputs, guider._identifier_key) for inputs in guider.prepare_inputs({})]
    place = call + 1 if type(guider).__name__ in _UNCOUNTED else state["count_prepared"]
    if not 0 < place <= len(names):
        return None
    name: str = names[place - 1]
    return name if name in ("pred_cond", "pred_uncond") else f"{name} {place}"


def has_guider(pipe: Any) -> bool:
    """Whether a pipeline has a guider."""
    return bool(_guiders(pipe))


def has_momentum(pipe: Any) -> bool:
    """Whether a guider accumulates the differences between branches over the steps, and so needs all branches."""
    return any(getattr(guider, "momentum_buffer", None) is not None for guider in _guiders(pipe))


def _guiders(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in _GUIDERS)
    return [guider for guider in found if hasattr(guider, "prepare_inputs")]


def branch_name(context: str | None) -> str | None:
    """Find the branch in a call's name: guiders name their calls after the predictions that these make."""
    return context and context.removeprefix("pred_")
