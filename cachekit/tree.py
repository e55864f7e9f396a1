"""Walk nested outputs and inputs: tensors in tuples, lists, dicts and diffusers' output classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


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
