"""Nested tensors (dicts, tuples and lists): map over them, collect them, measure them, check that they are finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Rebuild `tree` with `function` applied to each tensor; everything that is not a tensor stays.

    Named tuples and diffusers' output classes keep their type.

    >>> tree_map(len, {"pair": (torch.zeros(2, 3), torch.zeros(4)), "scale": 0.5})
    {'pair': (2, 4), 'scale': 0.5}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        mapped = {key: tree_map(function, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else type(tree)(**mapped)
    if isinstance(tree, (tuple, list)):
        items = [tree_map(function, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of `tree`, depth first and in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, tuple, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(value)


def with_tensors(tree: Any, replacements: tuple[Tensor, ...]) -> Any:
    """Rebuild `tree` with its tensors replaced, in the order of `tensors(tree)`."""
    source = iter(replacements)
    return tree_map(lambda _: next(source), tree)


def size_in_bytes(tree: Any) -> int:
    """Sum up the bytes of the elements of all tensors of `tree`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(tree))


def shape_of(tensor: Tensor) -> Tensor:
    """Make a tensor of the same shape, dtype and device that stores a single element."""
    return tensor.new_empty(()).expand(tensor.shape)


def no_elements(tensor: Tensor) -> Tensor:
    """Make a tensor without elements, of the same dtype and device."""
    return tensor.new_empty(0)


@torch.no_grad()
def is_finite(kept: Sequence[Any]) -> list[bool]:
    """Whether each of these trees is free of NaN and inf, with one sync per device.

    A sum is finite only if all its terms are, so a single number per tensor is gathered and all of them are read
    together. Finite terms may still add up to inf; only then are the tensors of that tree checked one by one.
    """
    found = [True] * len(kept)
    sums: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for place, tree in enumerate(kept):
        for tensor in tensors(tree):
            if tensor.is_floating_point() and not tensor.is_meta:
                sums[tensor.device].append((place, tensor.sum(dtype=torch.float32)))
    for on_device in sums.values():
        for place in {place for (place, _), total in zip(on_device, _read(on_device)) if not math.isfinite(total)}:
            found[place] = found[place] and all(bool(tensor.isfinite().all()) for tensor in tensors(kept[place]))
    return found


def _read(sums: Sequence[tuple[int, Tensor]]) -> list[float]:
    """Read numbers from one device, with one sync."""
    totals = [total for _, total in sums]
    if len(totals) == 1:  # the usual case, where stacking would take longer than reading
        return [float(totals[0])]
    numbers: list[float] = torch.stack(totals).tolist()
    return numbers
