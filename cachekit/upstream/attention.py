"""Recognise diffusers' attention and feed-forward modules by structure, for any adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cachekit.interface.sites import Kind, Site

if TYPE_CHECKING:
    from torch import nn

#: What blocks call their feed-forward part where its class has a name of its own.
_FEED_FORWARD = ("ff", "ffn", "mlp", "feed_forward")
#: Projections of a context that asks as well as it answers.
_QUERIES_OF_CONTEXT = ("add_q_proj", "to_q_t", "to_added_qkv", "txt_attn_qkv")
#: Denoisers that build self-attention as cross-attention over its own width.
_TOLD_BY_WIDTH = ("Kandinsky3UNet", "OmniGenTransformer2DModel")


def module_sites(denoiser: nn.Module) -> Iterator[Site]:
    """Yield a site for each attention and feed-forward module of `denoiser`, in the model's order."""
    by_width = type(denoiser).__name__ in _TOLD_BY_WIDTH
    modules = dict(denoiser.named_modules())
    outer = Site("", Kind.FEED_FORWARD)
    for name, module in modules.items():
        kind = kind_of(module, name)
        if kind is None and _is_called_feed_forward(name, modules):
            kind = Kind.FEED_FORWARD
        if kind is None or outer.covers(name):  # an expert within a feed-forward of several
            continue
        if by_width and kind is Kind.CROSS_ATTENTION and _reads_its_own_width(module):
            kind = Kind.SELF_ATTENTION
        site = Site(name, kind)
        outer = site if kind is Kind.FEED_FORWARD else outer
        yield site


def kind_of(module: nn.Module, name: str = "") -> Kind | None:
    """Return the kind of an attention or feed-forward module, or None for any other.

    Attention is what has a query projection and a processor, or is declared as such. One that adds its own input to
    its output (the old attention blocks between convolutions), or a feed-forward, is none: its output is not the
    attention alone. `name` helps where a class serves for self- and cross-attention alike and does not keep which.
    """
    if "FeedForward" in type(module).__name__:
        return Kind.FEED_FORWARD
    if not _is_attention(module):
        return None
    if _queries_context(module):
        return Kind.JOINT_ATTENTION
    return Kind.CROSS_ATTENTION if _is_cross_attention(module, name) else Kind.SELF_ATTENTION


def _is_called_feed_forward(name: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a module has a feed-forward's name and stands beside an attention, as in a block."""
    parent, _, leaf = name.rpartition(".")
    return leaf in _FEED_FORWARD and any(_is_attention(sibling) for sibling in modules[parent].children())


def attends(module: nn.Module) -> bool:
    """Tell whether a module attends, be it within more than an attention."""
    from diffusers.models.attention import AttentionModuleMixin

    return hasattr(module, "processor") and (_has_query(module) or isinstance(module, AttentionModuleMixin))


def _is_attention(module: Any) -> bool:
    adds_input = getattr(module, "residual_connection", False) or getattr(module, "group_norm", None) is not None
    return attends(module) and not adds_input and not _feeds_forward(module)


def _has_query(module: Any) -> bool:
    return any(hasattr(module, name) for name in ("to_q", "to_qkv", "to_query"))


def _feeds_forward(module: nn.Module) -> bool:
    """Tell whether an attention is a feed-forward as well, and gives out the sum or the concatenation of both."""
    return any("mlp" in name for name, _ in module.named_children())


def _queries_context(module: Any) -> bool:
    """Tell whether the context asks too, and so has an output of its own: extra keys alone are cross-attention."""
    return any(getattr(module, name, None) is not None for name in _QUERIES_OF_CONTEXT)


def _is_cross_attention(module: Any, name: str) -> bool:
    told = getattr(module, "is_cross_attention", None)
    if isinstance(told, bool):
        return told
    leaf = _leaf(name)
    return leaf.endswith("attn2") or "cross" in leaf or "Cross" in type(module).__name__


def _reads_its_own_width(module: Any) -> bool:
    return bool(module.cross_attention_dim == module.query_dim)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
