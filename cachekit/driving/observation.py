"""The outputs of guidance branches, as observing policies see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cachekit.upstream.prediction import predict_x0


@dataclass(frozen=True)
class CallObservation:
    """What an observing policy is given after a guided call.

    `outputs` maps each branch to its output `(batch, channels, ...)`; `sample` is the input that all branches
    share, scaled as the denoiser receives it; `step` is 0-based. With `negated` the pipeline flips the outputs' sign.
    """

    step: int
    outputs: Mapping[str, Tensor]
    sample: Tensor
    timestep: Any
    scheduler: Any = field(repr=False, default=None)
    negated: bool = False

    def denoised(self, branch: str) -> Tensor:
        """Predict the clean sample, x0, from a branch's output.

        Channels that only one of both has, an input image or a learned variance, are left out.
        """
        output = -self.outputs[branch] if self.negated else self.outputs[branch]
        shared = tuple(slice(min(sizes)) for sizes in zip(self.sample.shape, output.shape))
        return predict_x0(self.sample[shared], output[shared], self.timestep, self.scheduler)
