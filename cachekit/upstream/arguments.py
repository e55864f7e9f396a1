"""Names that diffusers gives the arguments of denoiser calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cachekit.upstream.compiling import without_compiler

if TYPE_CHECKING:
    from torch import nn

#: The noisy sample.
SAMPLE = ("sample", "hidden_states", "x", "vision_tokens")
#: The timestep.
TIMESTEP = ("timestep", "timesteps", "t", "timestep_ratio", "r", "vision_timesteps")
#: Caches of keys and values that a denoiser writes to.
WRITTEN = ("kv_cache", "kv_caches")
#: Whether a call writes to such a cache or reads from it.
CACHE_MODE = "kv_cache_mode"
#: The names of the calls of two branches.
PAIR = ("cond", "uncond")
#: Arguments that never have a batch dimension, whatever their first size is.
UNBATCHED = frozenset({"image_rotary_emb", "img_ids", "txt_ids", "ip_adapter_masks"})
#: Arguments whose batch is dimension 1, after one of layers.
LAYERED = frozenset({"encoder_hidden_states_llama3"})
#: Parts of the names of arguments whose first dimension may count frames too: a multiple of the batch.
PER_FRAME = ("encoder_hidden_states", "additional_residual")


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """List the parameters of the module class's forward in order, without self.

    A compiled module is unwrapped first.
    """
    return _parameters(type(without_compiler(module)).forward)


@functools.lru_cache(maxsize=1024)
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def by_name(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name a call's positional arguments by `parameters`, and merge them with the keyword arguments."""
    return {**dict(zip(parameters, args)), **kwargs}


def find(arguments: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Find the first of these arguments that is not None; None where there is none."""
    for name in names:
        value = arguments.get(name)
        if value is not None:
            return value
    return None
