"""Cut a denoiser call down to one guidance branch, and expand its output again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cachekit.driving.inputs import CallInputs
from cachekit.interface.adapter import Layout
from cachekit.interface.sites import Branches
from cachekit.tensors import tensors, tree_map
from cachekit.upstream.arguments import LAYERED, PER_FRAME, UNBATCHED


def pick_call(inputs: CallInputs, layout: Layout, branch: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut a call's arguments down to one branch, as (args, kwargs)."""
    picked = pick(inputs.named, layout, branch, inputs.batch, inputs.is_listed)
    return tuple(picked.pop(name) for name in inputs.positional), picked


def pick(
    arguments: Mapping[str, Any], layout: Layout, branch: str, batch: int, is_listed: bool = False
) -> dict[str, Any]:
    """Cut every batched tensor in a denoiser's arguments down to one branch.

    `batch` is the size of dimension 0 over all branches. Nested dicts, lists and masks are included; text
    and residuals may be repeated per frame, so their first dimension may be a multiple of `batch`. With `is_listed`,
    where the sample is a list with a tensor for each image, every other list of that length has an entry for each.
    """
    cutter = _Cutter(layout, layout.order.index(branch), batch)
    return {
        name: cutter.cut_list(value) if is_listed and isinstance(value, list) else cutter.cut(name, value)
        for name, value in arguments.items()
    }


class _Cutter:
    """Cuts arguments down to the branch at `place` in the order of a layout."""

    def __init__(self, layout: Layout, place: int, batch: int) -> None:
        self._layout, self._place, self._batch = layout, place, batch
        self._count = len(layout.order)
        self._part = self._part_of(batch)

    def _part_of(self, size: int) -> slice:
        return slice(self._place * size // self._count, (self._place + 1) * size // self._count)

    def cut(self, name: str, value: Any) -> Any:
        """Cut an argument, or what a nested dict has under this name."""
        if value is None or isinstance(value, bool) or name in UNBATCHED or name in self._layout.unbatched:
            return value
        if isinstance(value, Tensor):
            return self._cut_tensor(name, value)
        if isinstance(value, dict):
            named = ((key, key if isinstance(key, str) else name, item) for key, item in value.items())
            return {key: self.cut(own, item) for key, own, item in named}
        return tree_map(lambda tensor: self._cut_tensor(name, tensor), value)

    def _cut_tensor(self, name: str, tensor: Tensor) -> Tensor:
        if name in LAYERED or name in self._layout.layered:
            return tensor[:, self._part] if tensor.dim() > 1 and tensor.shape[1] == self._batch else tensor
        size = tensor.shape[0] if tensor.dim() else 0
        if size == self._batch:
            return tensor[self._part]
        return tensor[self._part_of(size)] if self._counts_frames(name, size) else tensor

    def _counts_frames(self, name: str, size: int) -> bool:
        """Whether dimension 0 of an argument counts the frames of all images."""
        return size > 0 and size % self._batch == 0 and any(part in name for part in PER_FRAME)

    def cut_list(self, value: list[Any]) -> list[Any]:
        """Cut a list with an entry for each image."""
        first, stop = (place * self._batch // self._count for place in (self._place, self._place + 1))
        return value[first:stop] if len(value) == self._batch else value


def as_batches(output: Any) -> Any:
    """Stack each list of tensors in a denoiser's output."""
    if isinstance(output, list):
        return torch.stack(output)
    return _within(as_batches, output)


def as_lists(output: Any) -> Any:
    """Split what `as_batches` has stacked into lists again."""
    return list(output.unbind()) if isinstance(output, Tensor) else _within(as_lists, output)


def _within(change: Callable[[Any], Any], output: Any) -> Any:
    if isinstance(output, dict):
        return type(output)(**{name: change(value) for name, value in output.items()})
    return tuple(change(value) for value in output) if isinstance(output, tuple) else output


def spread(output: Any, layout: Layout, branch: str, restore: Callable[[Tensor], Tensor]) -> Any:
    """Expand the output of one branch to that of all, as the pipeline expects it.

    The outputs of dropped branches are made by `restore`. Where that returns the same output again, the pipeline's own
    u + g * (c - u) is exactly it.
    """

    def join(tensor: Tensor) -> Tensor:
        if not tensor.dim():  # a loss, for instance
            return tensor
        return torch.cat([tensor if name == branch else restore(tensor) for name in layout.order])

    return tree_map(join, output)


def by_branch(output: Any, branches: Branches) -> dict[str, tuple[Tensor, ...]]:
    """Split each tensor of a denoiser's output that holds all branches into their parts `(batch, ...)`."""
    count = len(branches)
    whole = (tensor for tensor in tensors(output) if tensor.dim() and tensor.shape[0] % count == 0)
    return dict(zip(branches, zip(*(tensor.chunk(count) for tensor in whole))))
