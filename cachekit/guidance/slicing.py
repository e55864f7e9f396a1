"""Cut a denoiser call down to one guidance branch, and expand its output again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cachekit.interface.adapter import Layout
from cachekit.interface.sites import Branches
from cachekit.tensors import tensors, tree_map
from cachekit.upstream.arguments import LAYERED, PER_FRAME, SAMPLE, UNBATCHED, by_name


def as_batch(sample: Any) -> Any:
    """Stack a sample that is a list with a tensor for each image, all of one size; give others back as they are."""
    if not isinstance(sample, list) or not all(isinstance(one, Tensor) for one in sample):
        return sample
    return torch.stack(sample) if len({one.shape for one in sample}) == 1 else sample


def pick_call(
    call: tuple[tuple[Any, ...], dict[str, Any]], parameters: Sequence[str], layout: Layout, branch: str, batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut the arguments (args, kwargs) of a call down to one branch; `parameters` names the positional ones."""
    args, kwargs = call
    picked = pick(by_name(parameters, args, kwargs), layout, branch, batch)
    return tuple(picked.pop(name) for name in parameters[: len(args)]), picked


def pick(arguments: Mapping[str, Any], layout: Layout, branch: str, batch: int) -> dict[str, Any]:
    """Cut every batched tensor in a denoiser's arguments down to one branch.

    `batch` is the size of dimension 0 over all branches. Nested dicts, lists and masks are included; text
    and residuals may be repeated per frame, so their first dimension may be a multiple of `batch`. Where the
    sample is a list with a tensor for each image, so is every other list of that length.
    """
    place, count = layout.order.index(branch), len(layout.order)

    def cut(name: str) -> Callable[[Tensor], Tensor]:
        dim = 1 if name in layout.layered | LAYERED else 0
        multiples = dim == 0 and any(part in name for part in PER_FRAME)

        def one(tensor: Tensor) -> Tensor:
            size = tensor.shape[dim] if tensor.dim() > dim else 0
            batched = size == batch or (multiples and size > 0 and size % batch == 0)
            return tensor.chunk(count, dim)[place] if batched else tensor

        return one

    listed = any(isinstance(arguments.get(name), list) for name in SAMPLE)
    items = slice(place * batch // count, (place + 1) * batch // count)
    return {
        name: (value[items] if len(value) == batch else value)
        if listed and isinstance(value, list)
        else _pick_one(name, value, layout, cut)
        for name, value in arguments.items()
    }


def _pick_one(name: str, value: Any, layout: Layout, cut: Callable[[str], Callable[[Tensor], Tensor]]) -> Any:
    if name in layout.unbatched | UNBATCHED:
        return value
    if isinstance(value, dict):
        named = ((key, key if isinstance(key, str) else name, item) for key, item in value.items())
        return {key: _pick_one(own, item, layout, cut) for key, own, item in named}
    return tree_map(cut(name), value)


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

    The dropped branches' outputs come from `restore`; by default that is the same output, and then the
    pipeline's own u + g * (c - u) is exactly it.
    """

    def join(tensor: Tensor) -> Tensor:
        if not tensor.dim():  # a loss, say
            return tensor
        return torch.cat([tensor if name == branch else restore(tensor) for name in layout.order])

    return tree_map(join, output)


def by_branch(output: Any, branches: Branches) -> dict[str, tuple[Tensor, ...]]:
    """Split each tensor of a denoiser's output that holds all branches into their parts `(batch, ...)`."""
    count = len(branches)
    whole = (tensor for tensor in tensors(output) if tensor.dim() and tensor.shape[0] % count == 0)
    return dict(zip(branches, zip(*(tensor.chunk(count) for tensor in whole))))
