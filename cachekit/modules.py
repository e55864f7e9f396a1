"""Recognise diffusers' attention and feed-forward modules by structure, for any adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .sites import Kind, Site

if TYPE_CHECKING:
    from torch import nn


def module_sites(denoiser: nn.Module) -> Iterator[Site]:
    """Yield a site for each attention and feed-forward module of `denoiser`, in the model's order."""
    for name, module in denoiser.named_modules():
        kind = kind_of(module)
        if kind is not None:
            yield Site(name, kind)


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of an attention or feed-forward module, or None for any other.

    Attention is what has a query projection and a processor. One that adds its own input to its output
    (the old attention blocks between convolutions) is none: its output is not the attention alone.
    """
    if type(module).__name__ == "FeedForward":
        return Kind.FEED_FORWARD
    if not _is_attention(module):
        return None
    if _projects_context(module):
        return Kind.JOINT_ATTENTION
    return Kind.CROSS_ATTENTION if _is_cross_attention(module) else Kind.SELF_ATTENTION


def _is_attention(module: Any) -> bool:
    has_query = hasattr(module, "to_q") or hasattr(module, "to_qkv")
    adds_input = getattr(module, "residual_connection", False) or getattr(module, "group_norm", None) is not None
    return has_query and hasattr(module, "processor") and not adds_input


def _projects_context(module: Any) -> bool:
    return getattr(module, "added_kv_proj_dim", None) is not None


def _is_cross_attention(module: Any) -> bool:
    return bool(getattr(module, "is_cross_attention", False))
