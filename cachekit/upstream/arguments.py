"""Names that diffusers gives the arguments of denoiser calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cachekit.upstream.compiling import without_compiler

if TYPE_CHECKING:
    from torch import nn


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of the module class's forward in order, without self.

    Where torch stands in for a module that it compiles, they are that module's.
    """
    return tuple(inspect.signature(type(without_compiler(module)).forward).parameters)[1:]


def by_name(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name; `parameters` names the positional ones."""
    return {**dict(zip(parameters, args)), **kwargs}


#: What denoisers call their sample.
SAMPLE = ("sample", "hidden_states", "x", "vision_tokens")


#: What diffusers' pipelines call the calls of two branches.
PAIR = ("cond", "uncond")


#: Arguments that never have a batch dimension, whatever their first size is.
UNBATCHED = frozenset({"image_rotary_emb", "img_ids", "txt_ids", "ip_adapter_masks"})


#: Arguments whose batch is dimension 1, after one of layers.
LAYERED = frozenset({"encoder_hidden_states_llama3"})
