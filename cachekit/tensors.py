"""Nested tensors (dicts, tuples and lists): map over them, collect them, measure them, check that they are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
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


def is_finite(kept: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Whether each group of tensors is free of NaN and inf, with one sync if all are on one device.

    A sum is finite only if all its terms are, so a single number per tensor is gathered and all of them are read
    together. Finite terms may still add up to inf; only then is the tensor itself checked.
    """
    floats = [(place, tensor) for place, group in enumerate(kept) for tensor in _detached(group)]
    totals = read_together([tensor.sum(dtype=torch.float32) for _, tensor in floats])
    if all(map(isfinite, totals)):
        return [True] * len(kept)
    doubtful = [(place, tensor) for (place, tensor), total in zip(floats, totals) if not isfinite(total)]
    bad = {place for place, tensor in doubtful if not tensor.isfinite().all()}
    return [place not in bad for place in range(len(kept))]


def sums(kept: Iterable[Tensor]) -> list[Tensor]:
    """Sum up each of these tensors that holds floats; nothing is read, so the sums stay on the device.

    A sum is NaN or inf where a term is. That finite terms add up to inf takes values that no sample has.
    """
    return [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in _detached(kept)]


def _detached(kept: Iterable[Tensor]) -> list[Tensor]:
    """List those of these tensors that hold floats, outside of any gradient's graph."""
    floats = [tensor for tensor in kept if tensor.is_floating_point() and not tensor.is_meta]
    return [tensor.detach() if tensor.requires_grad else tensor for tensor in floats]


def read_together(numbers: Sequence[Tensor]) -> list[float]:
    """Read single numbers, all with one sync where they are on one device."""
    if len(numbers) < 2:  # the usual case, where stacking would take longer than reading
        return [float(number) for number in numbers]
    device = numbers[0].device
    read: list[float] = torch.stack([it if it.device == device else it.to(device) for it in numbers]).tolist()
    return read
