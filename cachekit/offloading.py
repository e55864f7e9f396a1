"""Know the hooks that diffusers hangs on modules, where skipping a module would upset them."""

from __future__ import annotations

from typing import Any

from torch import nn

_GROUP, _SPLIT = "group_offloading", "cp_input"


def pass_by(module: nn.Module) -> None:
    """Do for a skipped module what others of its offloading group rely on: the first brings all of their weights.

    A module that shares its group with no other is left where it is, which saves the transfer. With streams each
    module also fetches the weights of the next, so all of them have to take their turn.
    """
    registry = vars(module).get("_diffusers_hook")
    hook = registry and registry.get_hook(_GROUP)
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
