"""How weights are stored, where they are more than a plain tensor: quantised ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (Tensor, nn.Parameter)


def stored(weight: Tensor) -> list[Tensor]:
    """List the plain tensors that a weight is stored in: itself, or the integers and scales of a quantised one."""
    if type(weight) in _PLAIN:
        return [weight]
    if is_traceable_wrapper_subclass(weight):
        names, _ = weight.__tensor_flatten__()
        return [part for name in names for part in stored(getattr(weight, name))]
    return [weight.detach().as_subclass(Tensor)]


def width_of(layer: nn.Linear) -> int:
    """Get the number of channels that enter a layer; the rows of a quantised weight may be bytes instead."""
    return layer.in_features


def kept_in_float32(model: nn.Module) -> set[str]:
    """List the parts of weights' names by which a class of diffusers keeps them in float32, whatever the others are."""
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def dtype_of(model: nn.Module) -> torch.dtype:
    """Find the dtype of a model's samples: that of its first weight.

    Weights that are stored as integers, or that the class keeps in float32 whatever the others are, don't count.
    """
    precise = kept_in_float32(model)
    named = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    usual = (weight.dtype for name, weight in named if precise.isdisjoint(name.split(".")))
    return next(usual, named[0][1].dtype)


def without_values(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Make a meta tensor with the strides of this one, in `dtype` if given and this one is floating-point.

    That of a quantised one has the shape and dtype that it stands for.
    """
    wanted = dtype if dtype and weight.is_floating_point() else None
    if is_traceable_wrapper_subclass(weight):
        return torch.empty(weight.shape, dtype=wanted or weight.dtype, device="meta")
    return torch.empty_like(weight, device="meta", dtype=wanted)
