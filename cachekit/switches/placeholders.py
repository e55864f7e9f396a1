"""Stand-ins for the outputs of skipped modules: the right shapes, and zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachekit.tensors import tree_map

#: Makes a tensor of a shape, with the dtype and device of another one.
Memory = Callable[[tuple[int, ...], Tensor], Tensor]


def zeros_like(tensor: Tensor) -> Tensor:
    """Make zeros of the same shape, dtype and device that take the memory of one element only."""
    return tensor.new_zeros(()).expand(tensor.shape)


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Make zeros of a shape, with the dtype and device of a tensor."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, eq=False)
class Recorded:
    """What a module returned, with `zeros_like` of each tensor in place of it, and the number of branches it held."""

    tree: Any
    branches: int


def alike(output: Any) -> Hashable:
    """Describe what a placeholder for an output depends on: outputs with equal descriptions may share one.

    Those that hold more than tensors in tuples are alike to no other.
    """
    if isinstance(output, Tensor):
        return output.shape, output.dtype, output.device
    if type(output) is tuple:
        return tuple(map(alike, output))
    return None if output is None else object()


class Scratch:
    """The placeholders of one call, and the memory that they share: no value in it is ever read.

    Making either for each skipped module would take as long as a small layer.
    """

    def __init__(self) -> None:
        """Start without memory."""
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._made: dict[Recorded, Any] = {}

    def placeholder(self, recorded: Recorded, branches: int) -> Any:
        """Get the placeholder for an output, one for all modules of which it was recorded."""
        made = self._made.get(recorded)
        if made is None:
            made = self._made[recorded] = tree_map(Placeholder(branches, recorded.branches, self), recorded.tree)
        return made

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
