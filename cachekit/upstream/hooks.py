"""Facts about the hooks that diffusers puts on modules, which skipping a module could break."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cachekit.errors import AttachmentError

_REGISTRY = "_diffusers_hook"
_GROUP, _SPLIT, _CASTING = "group_offloading", "cp_input", "layerwise_casting"
#: Attributes of modules in which accelerate and diffusers keep hooks that move weights.
WEIGHT_HOOKS = ("_hf_hook", _REGISTRY)
#: Attributes of module instances through which such hooks wrap the class's forward.
WRAPPED_FORWARDS = ("forward", "_old_forward")


def run_group_offloading(module: nn.Module) -> None:
    """Move weights as if the skipped module ran, where others of its offloading group rely on that.

    The first module of a group loads the weights of all. A module that shares its group with no other stays where it
    is, which saves the transfer; but with streams each module also fetches the weights of the next, so none is skipped.
    """
    if _REGISTRY not in vars(module):  # the usual case, in each skipped module
        return
    hook = _hook(module, _GROUP)
    if hook and (len(hook.group.modules) > 1 or hook.group.stream is not None):
        hook.pre_forward(module)
        hook.post_forward(module, None)


def splitting_hook(module: nn.Module) -> Any:
    """Find the object in which diffusers keeps the hook that splits a module's input between processes, if any.

    Its `forward` is the function that the hook wraps.
    """
    registry = vars(module).get(_REGISTRY)
    if registry is None:
        return None
    found = (held for name, held in zip(registry._hook_order, registry._fn_refs) if name.startswith(_SPLIT))
    return next(found, None)


def computing_dtype(module: nn.Module) -> torch.dtype | None:
    """Find the dtype in which a module's floating weights compute, where they are stored in another."""
    dtype: torch.dtype | None = getattr(_hook(module, _CASTING), "compute_dtype", None)
    return dtype


def refuse_other_caches(denoiser: nn.Module, name: str, modules: Iterable[nn.Module]) -> None:
    """Refuse a denoiser, the pipeline's component `name`, whose hooks, on any of `modules`, cache earlier outputs.

    Hooks that skip the same modules, or count their calls, would fail silently. Raises `AttachmentError`.
    """
    place, title = f"pipe.{name}" if name else "the denoiser", f"{type(denoiser).__name__}: diffusers' own cache"
    if getattr(denoiser, "is_cache_enabled", False):
        kind = type(denoiser._cache_config).__name__.removesuffix("Config")
        raise AttachmentError(f"{title} ({kind}) is enabled; call {place}.disable_cache() first")
    hooks = [pair for module in modules if _REGISTRY in vars(module) for pair in _hooks(module).items()]
    # A hook with a state may share it with others of its kind.
    kinds = {type(hook).__module__ for _, hook in hooks if hook._is_stateful}
    found = {key for key, hook in hooks if type(hook).__module__ in kinds}
    if found:
        calls = " and ".join(f"remove_hook({key!r})" for key in sorted(found))
        raise AttachmentError(
            f"{title} was set up without enable_cache; call {calls} of"
            f" HookRegistry.check_if_exists_or_initialize({place}) first"
        )


def register_alike(base: type[nn.Module], subclass: type[nn.Module]) -> None:
    """Register `subclass` with diffusers' hooks as `base` is: they look classes up by identity."""
    helpers = sys.modules.get("diffusers.hooks._helpers")  # if it is not loaded, nothing is registered
    if helpers is not None:
        helpers.TransformerBlockRegistry._register()
        known = helpers.TransformerBlockRegistry._registry
        known.update({subclass: known[base]} if base in known else {})


def _hooks(module: nn.Module) -> dict[str, Any]:
    registry = vars(module).get(_REGISTRY)
    return {} if registry is None else registry.hooks


def _hook(module: nn.Module, name: str) -> Any:
    return _hooks(module).get(name)
