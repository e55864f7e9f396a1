"""Know the hooks that diffusers hangs on modules, where skipping a module would upset them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from cachekit.errors import AttachmentError

_GROUP, _SPLIT, _CASTING = "group_offloading", "cp_input", "layerwise_casting"


def pass_by(module: nn.Module) -> None:
    """Do for a skipped module what others of its offloading group rely on: the first brings all of their weights.

    A module that shares its group with no other is left where it is, which saves the transfer. With streams each
    module also fetches the weights of the next, so all of them have to take their turn.
    """
    hook = _hook(module, _GROUP)
    if hook and (len(hook.group.modules) > 1 or hook.group.stream is not None):
        hook.pre_forward(module)
        hook.post_forward(module, None)


def splitting_hook(module: nn.Module) -> Any:
    """Return what the hook holds that splits a module's input between processes, or None.

    Its `forward` is what the hook goes around.
    """
    registry = vars(module).get("_diffusers_hook")
    if registry is None:
        return None
    found = (held for name, held in zip(registry._hook_order, registry._fn_refs) if name.startswith(_SPLIT))
    return next(found, None)


def computing_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype in which a module's floating weights compute where they are stored in another, or None."""
    dtype: torch.dtype | None = getattr(_hook(module, _CASTING), "compute_dtype", None)
    return dtype


def refuse_other_caches(denoiser: nn.Module, name: str) -> None:
    """Raise `AttachmentError` where hooks of the denoiser called `name` keep what they made in earlier calls.

    What skips the same modules, or counts their calls, would go wrong unnoticed.
    """
    place, title = f"pipe.{name}" if name else "the denoiser", f"{type(denoiser).__name__}: diffusers' own cache"
    if getattr(denoiser, "is_cache_enabled", False):
        kind = type(denoiser._cache_config).__name__.removesuffix("Config")
        raise AttachmentError(f"{title} ({kind}) is enabled; call {place}.disable_cache() first")
    hooks = [pair for module in denoiser.modules() for pair in _hooks(module).items()]
    # One that holds a state may share it with others of its kind.
    kinds = {type(hook).__module__ for _, hook in hooks if hook._is_stateful}
    found = {key for key, hook in hooks if type(hook).__module__ in kinds}
    if found:
        calls = " and ".join(f"remove_hook({key!r})" for key in sorted(found))
        raise AttachmentError(
            f"{title} was set up without enable_cache; call {calls} of"
            f" HookRegistry.check_if_exists_or_initialize({place}) first"
        )


def register_alike(base: type[nn.Module], subclass: type[nn.Module]) -> None:
    """Let diffusers' hooks find for `subclass` what they know of `base`: they look classes up by identity."""
    helpers = sys.modules.get("diffusers.hooks._helpers")  # loaded with whatever could be in there
    if helpers is not None:
        helpers.TransformerBlockRegistry._register()
        known = helpers.TransformerBlockRegistry._registry
        known.update({subclass: known[base]} if base in known else {})


def _hooks(module: nn.Module) -> dict[str, Any]:
    registry = vars(module).get("_diffusers_hook")
    return {} if registry is None else registry.hooks


def _hook(module: nn.Module, name: str) -> Any:
    return _hooks(module).get(name)
