"""Stand-ins for the outputs of skipped modules: the right shapes, and zeros."""

from __future__ import annotations

import torch
from torch import Tensor


def zeros_like(tensor: Tensor) -> Tensor:
    """Make zeros of the same shape, dtype and device that take the memory of one element only."""
    return tensor.new_zeros(()).expand(tensor.shape)


class Placeholder:
    """Makes a stand-in for a skipped module's output of the `zeros_like` each of its tensors, in order.

    The first tensor of an output flows on and may be edited in place (T2I-Adapter, FreeU), so it gets memory of its
    own. The others are only added to or joined: the recorded zeros serve for them.
    """

    def __init__(self, branches: int, recorded_branches: int) -> None:
        """Scale dimension 0 from the recorded number of branches to the present one."""
        self.branches = branches
        self.recorded_branches = recorded_branches
        self.is_first = True

    def __call__(self, recorded: Tensor) -> Tensor:
        """Make the stand-in of one recorded tensor."""
        batch = recorded.shape[0] * self.branches // self.recorded_branches
        if self.is_first:
            self.is_first = False
            return torch.zeros((batch, *recorded.shape[1:]), dtype=recorded.dtype, device=recorded.device)
        if batch == recorded.shape[0]:
            return recorded
        return recorded[:1].expand(batch, *recorded.shape[1:])
