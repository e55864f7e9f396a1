"""Tell kept tensors that hold a NaN or an infinity from the others, with one look at the accelerator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tree import tensors


@torch.no_grad()
def is_finite(kept: Sequence[Any]) -> list[bool]:
    """Return for each of these nestings of tensors whether all its numbers are finite.

    A sum is finite only where everything in it is. So one number for each tensor is gathered, and all of them are
    read together; only a sum that overflows asks for more than one look.
    """
    found = [True] * len(kept)
    sums: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for place, tree in enumerate(kept):
        for tensor in tensors(tree):
            if tensor.is_floating_point() and not tensor.is_meta:
                sums[tensor.device].append((place, tensor.sum(dtype=torch.float32)))
    for on_device in sums.values():
        flags = torch.stack([total for _, total in on_device]).isfinite().tolist()
        for place in {place for (place, _), flag in zip(on_device, flags) if not flag}:
            found[place] = found[place] and all(bool(tensor.isfinite().all()) for tensor in tensors(kept[place]))
    return found
