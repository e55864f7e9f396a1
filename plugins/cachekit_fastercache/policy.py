"""Extrapolate attention, and make the unconditional output from the conditional one (arXiv 2410.19355)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cachekit import (
    Beginning,
    Choice,
    Every,
    Guidance,
    History,
    Kind,
    Moment,
    Policy,
    PolicyError,
    Sites,
    StandIn,
    Streams,
    Time,
    Window,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = (Kind.SELF_ATTENTION, Kind.JOINT_ATTENTION, Kind.TEMPORAL_ATTENTION)


class Alternating(Every):
    """Full every `n` steps, and every `guided` steps, where the unconditional branch runs again."""

    name: ClassVar[str] = "alternating"

    guided: int

    def full(self, at: Moment) -> bool:
        """Whether the step is one of either sort."""
        return super().full(at) or at.step % self.guided == 0


class Continued(StandIn):
    """The newest value and a share of its last change: F_t + (F_t - F_{t+2}) w, equation 5."""

    name: ClassVar[str] = "continued"
    length: ClassVar[int | None] = 2

    share: float = 0.5

    def weights(self, times: Sequence[Time], at: Moment) -> Sequence[float]:
        """Weigh the last two values."""
        return [1 + self.share, -self.share] if len(times) == 2 else [1.0]


class Frequencies(StandIn):
    """The last difference between the branches, with gains for its low and high frequencies (equations 9 to 11).

    Low frequencies are multiplied by 1 + `alpha_low` above the timestep `boundary`, high ones by 1 + `alpha_high` from
    it down. Low are those within a fifth of the shorter side around 0. Height and width are the last dimensions of the
    output `(batch, ..., height, width)`; packed outputs `(batch, tokens, channels)` are refused.
    """

    name: ClassVar[str] = "frequencies"
    summary: ClassVar[str] = "the last difference between the branches, with gains by frequency, at guidance only"
    paper: ClassVar[str] = "arXiv 2410.19355"

    of: Literal["residual"] = "residual"
    alpha_low: float = 0.1
    alpha_high: float = 0.1
    boundary: float = 300

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Raise `PolicyError` for a guided run of a packed sample; without guidance there is no difference to scale."""
        if run.guided:
            self._refuse_packed(run.sample)

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Scale the newest difference."""
        if at.timestep is None:
            raise PolicyError(f"{self}: no timestep at step {at.step}; use linear, or a scheduler of diffusers")
        is_early = at.timestep > self.boundary
        low, high = (1 + self.alpha_low, 1.0) if is_early else (1.0, 1 + self.alpha_high)
        return tuple(self._scaled(difference, low, high) for difference in history[0].tensors)

    def _scaled(self, difference: Tensor, low: float, high: float) -> Tensor:
        import torch

        self._refuse_packed(difference.shape)
        height, width = difference.shape[-2:]
        rows, columns = (
            torch.fft.ifftshift(torch.arange(size, device=difference.device) - size // 2) for size in (height, width)
        )
        is_low = rows[:, None] ** 2 + columns**2 <= (min(height, width) // 5) ** 2
        spectrum = torch.fft.fft2(difference.float())
        scaled: Tensor = torch.fft.ifft2(torch.where(is_low, spectrum * low, spectrum * high)).real
        return scaled.to(difference.dtype)

    def _refuse_packed(self, shape: Sequence[int]) -> None:
        if len(shape) < 4:
            raise PolicyError(
                f"{self}: the output is {tuple(shape)}, without height and width; use linear(of=residual)"
            )


class FasterCache(Policy):
    """FasterCache: attention every `interval` steps, the unconditional branch every `guidance_interval` steps.

    Below the timestep `high`, self-attention that is not computed is the last output and `weight` times its last
    change. Below `guidance_high`, the unconditional output is the conditional one and the branches' last difference,
    whose low frequencies are raised by `alpha_low` above the timestep `boundary` and its high ones by `alpha_high` from
    it down. A step that runs the unconditional branch computes attention too.
    """

    name: ClassVar[str] = "fastercache"
    summary: ClassVar[str] = "extrapolate attention, and make the unconditional output from the conditional one"
    paper: ClassVar[str] = "arXiv 2410.19355"

    interval: int = Field(2, ge=1)
    weight: float = 0.5
    high: float = 681
    guidance_interval: int = Field(5, ge=1)
    guidance_high: float = 641
    alpha_low: float = 0.1
    alpha_high: float = 0.1
    boundary: float = 300

    def choices(self) -> Mapping[str, Choice]:
        """Choose self-attention and guidance."""
        alternating = Alternating(n=self.interval, guided=self.guidance_interval)
        frequencies = Frequencies(alpha_low=self.alpha_low, alpha_high=self.alpha_high, boundary=self.boundary)
        return {
            "attention": Choice(
                Sites(kinds=_ATTENTION),
                Window(high=self.high, when=alternating, fresh=True),
                Continued(share=self.weight),
            ),
            "guidance": Choice(
                Guidance(),
                Window(high=self.guidance_high, when=Every(n=self.guidance_interval), fresh=True),
                frequencies,
            ),
        }
