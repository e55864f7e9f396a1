"""Copy a denoiser without its weights, onto the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.attaching.removal import remove
from cachekit.upstream.compiling import Uncompiled, without_compiler
from cachekit.upstream.hooks import WEIGHT_HOOKS, WRAPPED_FORWARDS, computing_dtype
from cachekit.upstream.weights import without_values


def meta_copy(denoiser: nn.Module) -> nn.Module:
    """Copy shapes, LoRA layers and attention processors; leave out weights, offloading hooks and switches."""
    memo: dict[int, Any] = {}
    for module in denoiser.modules():
        dtype = computing_dtype(module)
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(without_values(parameter, dtype), requires_grad=False)
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = without_values(buffer, dtype)
        # Such hooks hold devices and streams that the copy has no use for.
        memo.update({id(vars(module)[name]): None for name in WEIGHT_HOOKS if name in vars(module)})
    for module in reversed(list(denoiser.modules())):  # inner ones first
        inner = without_compiler(module)
        if inner is not module:
            memo[id(module)] = Uncompiled(copy.deepcopy(inner, memo))
    twin = copy.deepcopy(denoiser, memo)
    remove(twin)
    for module in twin.modules():
        for name in (*WEIGHT_HOOKS, *WRAPPED_FORWARDS):
            vars(module).pop(name, None)
    return twin


def on_meta(tensor: Tensor) -> Tensor:
    """Make a contiguous meta tensor of the same shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
