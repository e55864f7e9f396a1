"""Stand-ins for the outputs of skipped modules: the right shapes, and zeros."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: Makes a tensor of a shape, with the dtype and device of another one.
Memory = Callable[[tuple[int, ...], Tensor], Tensor]


def zeros_like(tensor: Tensor) -> Tensor:
    """Make zeros of the same shape, dtype and device that take the memory of one element only."""
    return tensor.new_zeros(()).expand(tensor.shape)


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Make zeros of a shape, with the dtype and device of a tensor."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


class Scratch:
    """Memory that the placeholders of one call share: no value in it is ever read.

    Allocating it for each skipped module would take as long as a small layer.
    """

    def __init__(self) -> None:
        """Start without memory."""
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Get memory of a shape, with the dtype and device of a tensor."""
        size, key = math.prod(shape), (like.dtype, like.device)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = zeros((size,), like)
        return held[:size].view(shape)


class Placeholder:
    """Makes a stand-in for a skipped module's output, from the `zeros_like` of each of its tensors in order.

    The first tensor of an output flows on and may be edited in place (T2I-Adapter, FreeU), so it is real memory. The
    others are only added to or joined: the recorded zeros serve for them.
    """

    def __init__(self, branches: int, recorded_branches: int, memory: Memory = zeros) -> None:
        """Scale dimension 0 from the recorded number of branches to the present one; `memory` gives real memory."""
        self.branches = branches
        self.recorded_branches = recorded_branches
        self.memory = memory
        self.is_first = True

    def __call__(self, recorded: Tensor) -> Tensor:
        """Make the stand-in of one recorded tensor."""
        batch = recorded.shape[0] * self.branches // self.recorded_branches
        if self.is_first:
            self.is_first = False
            return self.memory((batch, *recorded.shape[1:]), recorded)
        if batch == recorded.shape[0]:
            return recorded
        return recorded[:1].expand(batch, *recorded.shape[1:])
