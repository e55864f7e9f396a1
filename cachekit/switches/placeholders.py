"""Stand-ins for the outputs of skipped modules."""

from __future__ import annotations

import torch
from torch import Tensor


class Placeholder:
    """Make stand-ins for the outputs of a skipped module, of the recorded shapes.

    The first tensor of an output flows on and may be edited in place (T2I-Adapter, FreeU), so it is real
    memory; the others are only added to or joined, so one zero without memory of its own serves.
    """

    def __init__(self, branches: int, recorded_branches: int) -> None:
        """Scale dimension 0 from the recorded number of branches to the present one."""
        self.branches = branches
        self.recorded_branches = recorded_branches
        self.is_first = True

    def __call__(self, recorded: Tensor) -> Tensor:
        """Return zeros in the shape, dtype and device of one recorded tensor."""
        batch = recorded.shape[0] * self.branches // self.recorded_branches
        device = recorded.device
        if self.is_first:
            self.is_first = False
            return torch.zeros((batch, *recorded.shape[1:]), dtype=recorded.dtype, device=device)
        return torch.zeros((), dtype=recorded.dtype, device=device).expand(batch, *recorded.shape[1:])
