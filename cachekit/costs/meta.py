"""Copy a denoiser without weights, onto the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.attaching.removal import remove
from cachekit.upstream.compiling import without_compiler
from cachekit.upstream.hooks import computing_dtype

#: Attributes by which accelerate and diffusers hang hooks that move weights on modules.
_MOVERS = ("_hf_hook", "_diffusers_hook")


def meta_copy(denoiser: nn.Module) -> nn.Module:
    """Return a plain copy with shapes only: LoRA and processors included, no weights, no offload hooks, no switches."""
    memo: dict[int, Any] = {}
    for module in denoiser.modules():
        dtype = computing_dtype(module)
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(_without_values(parameter, dtype), requires_grad=False)
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = _without_values(buffer, dtype)
        # They hold devices and streams, and would find none here.
        memo.update({id(vars(module)[name]): None for name in _MOVERS if name in vars(module)})
    for module in reversed(list(denoiser.modules())):  # those within first
        inner = without_compiler(module)
        if inner is not module:
            memo[id(module)] = _Uncompiled(copy.deepcopy(inner, memo))
    twin = copy.deepcopy(denoiser, memo)
    remove(twin)
    for module in twin.modules():
        for name in (*_MOVERS, "forward", "_old_forward"):
            vars(module).pop(name, None)
    return twin


class _Uncompiled(nn.Module):
    """Stand for a module as torch's compiled one does, under the same names, without compiling."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def _without_values(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor without memory, in `dtype` where one is given and this one holds floating numbers."""
    return torch.empty_like(tensor, device="meta", dtype=dtype if dtype and tensor.is_floating_point() else None)


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype without memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
