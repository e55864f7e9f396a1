"""What a policy can observe of a guided call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Observation(Protocol):
    """One guided step: the outputs of all guidance branches, and the sample that they share.

    A policy that only notes, for the report, how far the branches are apart:

    >>> from cachekit import Policy
    >>> class Distances(Policy):
    ...     name = "distances"
    ...     def choices(self):
    ...         return {}
    ...     def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
    ...         distance = seen.outputs["cond"] - seen.outputs["uncond"]
    ...         memory.setdefault("trace", []).append((seen.step, float(distance.abs().mean())))
    """

    @property
    def step(self) -> int:
        """The 0-based step."""

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """The denoiser's output `(batch, channels, ...)` of each branch."""

    @property
    def sample(self) -> Tensor:
        """The denoiser's input `(batch, channels, ...)`, scaled as the denoiser receives it."""

    @property
    def timestep(self) -> Any:
        """The denoiser's timestep argument: a number or a tensor of any shape."""

    def denoised(self, branch: str) -> Tensor:
        """Predict the clean sample, x0, `(batch, channels, ...)` from a branch's output.

        Raises `GuidanceError` under a scheduler whose prediction cannot be inverted.
        """
