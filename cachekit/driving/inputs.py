"""The arguments of one denoiser call, read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cachekit.driving.slicing import as_batch
from cachekit.errors import AdapterError
from cachekit.runs.denoiser import Denoiser
from cachekit.upstream.arguments import CACHE_MODE, SAMPLE, TIMESTEP, WRITTEN, by_name, find


class CallInputs:
    """What a denoiser call is given: all arguments by name, and of these the sample and the timestep.

    `sample` is `(branches * images, ...)`; a list with a tensor for each image has been stacked, and `is_listed`.
    """

    __slots__ = ("args", "is_listed", "kwargs", "named", "sample", "timestep")

    def __init__(self, parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the arguments of a call whose positional ones are named by `parameters`."""
        self.args, self.kwargs = args, kwargs
        self.named = by_name(parameters, args, kwargs)
        given = find(self.named, SAMPLE)
        self.sample = as_batch(given)
        self.is_listed = self.sample is not given
        self.timestep = find(self.named, TIMESTEP)

    def check(self, denoiser: Denoiser) -> None:
        """Raise `AdapterError` where sample or timestep are missing, or the samples differ in size."""
        if isinstance(self.sample, Tensor) and self.timestep is not None:
            return
        name = type(denoiser.module).__name__
        for what, value, names in (("sample", self.sample, SAMPLE), ("timestep", self.timestep, TIMESTEP)):
            if value is None:
                raise AdapterError(
                    f"{name} is called without a {what} ({', '.join(names)}): so its steps cannot be identified; call"
                    " cachekit.remove(pipe)"
                )
        raise AdapterError(
            f"{name}: samples of several sizes, or lists within lists, are not supported; give images of one size, or"
            " call cachekit.remove(pipe)"
        )

    @property
    def batch(self) -> int:
        """The size of dimension 0 of the sample, over all branches in it."""
        return int(self.sample.shape[0])

    @property
    def cache_mode(self) -> Any:
        """Whether the call writes keys and values or reads them, where the pipeline states it."""
        return self.named.get(CACHE_MODE)

    @property
    def writes_cache(self) -> bool:
        """Whether the call leaves keys and values behind in its arguments."""
        return find(self.named, WRITTEN) is not None
