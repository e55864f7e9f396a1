"""The modules of a denoiser by name."""

from __future__ import annotations

from torch import nn

#: The attributes by which torch's linear layers, and those that replace them, give the width of input and output.
_WIDTHS = ("in_features", "out_features")


def modules_by_name(root: nn.Module) -> dict[str, nn.Module]:
    """List all modules as `named_modules` does, faster; a module that has several names is listed under each."""
    found, left = {"": root}, [("", root)]
    while left:
        prefix, module = left.pop()
        for name, child in vars(module)["_modules"].items():
            if child is not None:
                found[prefix + name] = child
                if vars(child)["_modules"]:
                    left.append((f"{prefix}{name}.", child))
    return found


def find_module(root: nn.Module, name: str) -> nn.Module | None:
    """Find a module by name, None where there is none.

    Unlike the names that `named_modules` lists, this one holds where a module around it has been replaced by what
    `torch.compile` makes of it.
    """
    found: nn.Module | None = root
    for part in name.split("."):
        found = vars(found)["_modules"].get(part)
        if found is None:
            break
    if found is not None:
        return found
    try:  # slower, and through what a compiled module passes on
        return root.get_submodule(name)
    except AttributeError:
        return None


def resizes(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose output has another width than its input."""
    widths = [getattr(module, name, None) for name in _WIDTHS]
    return None not in widths and len(set(widths)) > 1


def has_up_blocks(denoiser: nn.Module) -> bool:
    """Whether a denoiser is a UNet, of down and up blocks."""
    return hasattr(denoiser, "up_blocks")
