"""The arguments of one denoiser call, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.errors import AdapterError
from cachekit.upstream.arguments import CACHE_MODE, SAMPLE, TIMESTEP, WRITTEN, by_name, find


class CallInputs:
    """What a denoiser or ControlNet call is given: all arguments by name, and of these the sample and the timestep.

    `sample` is `(branches * images, ...)`; a list with a tensor for each image has been stacked, and `is_listed`.
    `batch` is the size of its dimension 0, over all branches in it.
    """

    __slots__ = ("args", "batch", "is_listed", "kwargs", "named", "positional", "sample", "timestep")

    def __init__(
        self, module: nn.Module, parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Read the arguments of a call of `module`, whose forward has these `parameters`.

        Raises `AdapterError` where sample or timestep are missing, or the samples differ in size.
        """
        self.args, self.kwargs = args, kwargs
        self.positional = parameters[: len(args)]
        self.named = by_name(parameters, args, kwargs)
        given = find(self.named, SAMPLE)
        self.sample: Tensor = _as_batch(given)
        self.is_listed = self.sample is not given
        self.timestep = find(self.named, TIMESTEP)
        if self.timestep is None or not isinstance(self.sample, Tensor):
            raise AdapterError(_refusal(type(module).__name__, self.sample, self.timestep))
        self.batch: int = self.sample.shape[0]

    @property
    def cache_mode(self) -> Any:
        """Whether the call writes keys and values or reads them, where the pipeline states it."""
        return self.named.get(CACHE_MODE)

    @property
    def writes_cache(self) -> bool:
        """Whether the call leaves keys and values behind in its arguments."""
        return find(self.named, WRITTEN) is not None


def timestep_of(parameters: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Find the timestep alone among a call's arguments; None where there is none."""
    return find(by_name(parameters, args, kwargs), TIMESTEP)


def _refusal(name: str, sample: Any, timestep: Any) -> str:
    for what, value, names in (("sample", sample, SAMPLE), ("timestep", timestep, TIMESTEP)):
        if value is None:
            return (
                f"{name} is called without a {what} ({', '.join(names)}), so its steps cannot be identified; call"
                " cachekit.remove(pipe)"
            )
    return (
        f"{name}: samples of several sizes, or lists within lists, are not supported; give images of one size, or"
        " call cachekit.remove(pipe)"
    )


def _as_batch(sample: Any) -> Any:
    """Stack a sample that is a list with a tensor for each image, all of one size; others are returned unchanged."""
    if not isinstance(sample, list) or not all(isinstance(one, Tensor) for one in sample):
        return sample
    return torch.stack(sample) if len({one.shape for one in sample}) == 1 else sample
