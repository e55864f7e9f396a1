"""Nested tensors: map over them, collect them, measure them, and find NaN and inf with one device sync."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """Return `tree` with `function` applied to each tensor and everything else as it was."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        mapped = {key: tree_map(function, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else type(tree)(**mapped)
    if isinstance(tree, (tuple, list)):
        items = [tree_map(function, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of `tree` in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, tuple, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(value)


def with_tensors(tree: Any, replacements: tuple[torch.Tensor, ...]) -> Any:
    """Return `tree` with its tensors replaced in order."""
    source = iter(replacements)
    return tree_map(lambda _: next(source), tree)


def size_in_bytes(tree: Any) -> int:
    """Return the bytes that the tensors of `tree` take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(tree))


def shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape, dtype and device that holds one element only."""
    return tensor.new_empty(()).expand(tensor.shape)


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
