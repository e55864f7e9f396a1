"""Recognise diffusers' attention and feed-forward modules by structure, for the adapter of any model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cachekit.interface.sites import Kind, Site
from cachekit.upstream.arguments import parameters_of
from cachekit.upstream.modules import resizes

if TYPE_CHECKING:
    from torch import nn

#: Names that blocks give their feed-forward module where its class is not a `FeedForward`. `proj_mlp` is all of it that
#: is a module of its own in a block whose last projection serves the attention too.
_FEED_FORWARD = ("ff", "ffn", "mlp", "feed_forward", "proj_mlp")
#: Query projections of the context, which then attends too and has an output of its own.
_QUERIES_OF_CONTEXT = ("add_q_proj", "to_q_t", "to_added_qkv", "txt_attn_qkv")
#: The streams of joint attention, in the order of its outputs.
_STREAMS = ("hidden_states", "encoder_hidden_states")
#: Modules around attention over frames.
_TEMPORAL = frozenset(
    (
        "temporal_transformer_blocks",
        "temp_attentions",
        "motion_modules",
        "transformer_in",
        "image_latents_temporal_encoder",
    )
)
#: Denoisers that build self-attention as cross-attention over its own width.
_SELF_ATTENTION_BY_WIDTH = ("Kandinsky3UNet", "OmniGenTransformer2DModel")


def module_sites(denoiser: nn.Module) -> Iterator[Site]:
    """Find the attention and feed-forward modules of a denoiser: a site for each, in the order of `named_modules`.

    Modules that only contain an attention, and those whose output is more than the attention itself, are left out.

    >>> from diffusers.models.attention import BasicTransformerBlock
    >>> block = BasicTransformerBlock(8, 2, 4, cross_attention_dim=8)
    >>> {site.name: str(site.kind) for site in module_sites(block)}
    {'attn1': 'self_attention', 'attn2': 'cross_attention', 'attn2.to_k': 'text_key_value', \
'attn2.to_v': 'text_key_value', 'ff': 'feed_forward'}
    """
    by_width = type(denoiser).__name__ in _SELF_ATTENTION_BY_WIDTH
    has_text = not _attends_to_itself_alone(denoiser)
    modules = dict(denoiser.named_modules())
    outer = Site("", Kind.FEED_FORWARD)
    for name, module in modules.items():
        kind = _kind_of(module, name)
        if kind is None and _is_named_feed_forward(name, modules):
            kind = Kind.FEED_FORWARD
        if kind is None or outer.covers(name):  # an expert within a mixture of feed-forwards
            continue
        if by_width and kind is Kind.CROSS_ATTENTION and _reads_its_own_width(module):
            kind = Kind.SELF_ATTENTION
        if kind is Kind.SELF_ATTENTION and not _TEMPORAL.isdisjoint(name.split(".")):
            kind = Kind.TEMPORAL_ATTENTION
        site = Site(name, kind, resizes(module))
        outer = site if kind is Kind.FEED_FORWARD else outer
        yield site
        if has_text:
            for leaf in _projections_of_text(module, kind):
                yield Site(f"{name}.{leaf}", Kind.TEXT_KEY_VALUE, resizes(getattr(module, leaf)))


def attends(module: nn.Module) -> bool:
    """Whether a module computes attention, alone or together with something else, such as a feed-forward.

    It does if it has a query projection and a processor, or is declared as attention by diffusers' mixin.

    >>> from diffusers.models.attention_processor import Attention
    >>> attention = Attention(query_dim=8, heads=2, dim_head=4)
    >>> attends(attention), attends(attention.to_q)
    (True, False)
    """
    from diffusers.models.attention import AttentionModuleMixin

    return hasattr(module, "processor") and (_has_query(module) or isinstance(module, AttentionModuleMixin))


def streams_of_site(module: nn.Module, kind: Kind) -> tuple[str, ...]:
    """Name the parameters of a forward that its outputs continue: the first, and the text in joint attention."""
    parameters = parameters_of(module)
    joint = tuple(name for name in _STREAMS if name in parameters)
    return joint if kind is Kind.JOINT_ATTENTION and joint else parameters[:1]


def image_first(streams: tuple[str, ...]) -> tuple[str, ...]:
    """Order the streams of a block so that the image comes before the text, whatever the block returns first."""
    return tuple(sorted(streams, key=lambda name: name != _STREAMS[0]))


def _kind_of(module: nn.Module, name: str) -> Kind | None:
    """Classify an attention or feed-forward module; None for any other.

    `name` helps where one class serves for self- and cross-attention alike and keeps no flag for it.
    """
    if "FeedForward" in type(module).__name__:
        return Kind.FEED_FORWARD
    if not _is_attention(module):
        return None
    if _queries_context(module):
        return Kind.JOINT_ATTENTION
    return Kind.CROSS_ATTENTION if _is_cross_attention(module, name) else Kind.SELF_ATTENTION


def _is_attention(module: Any) -> bool:
    """Whether a module's output is the attention alone.

    The old attention blocks between convolutions add their input to it, others fuse a feed-forward with it.
    """
    adds_input = getattr(module, "residual_connection", False) or getattr(module, "group_norm", None) is not None
    return attends(module) and not adds_input and not _feeds_forward(module)


def _has_query(module: Any) -> bool:
    return any(hasattr(module, name) for name in ("to_q", "to_qkv", "to_query"))


def _feeds_forward(module: nn.Module) -> bool:
    """Whether an attention is fused with a feed-forward: its output is the sum or concatenation of both."""
    return any("mlp" in name for name, _ in module.named_children())


def _queries_context(module: Any) -> bool:
    """Whether the context has queries too, as in joint attention; keys and values alone are cross-attention."""
    return any(getattr(module, name, None) is not None for name in _QUERIES_OF_CONTEXT)


def _is_cross_attention(module: Any, name: str) -> bool:
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool):
        return flag
    leaf = name.rpartition(".")[2]
    return leaf.endswith("attn2") or "cross" in leaf or "Cross" in type(module).__name__


def _projections_of_text(module: nn.Module, kind: Kind) -> Iterator[str]:
    """Yield the names of the layers that project the context to keys and values, text or an image beside it.

    Where the image attends to itself and the context at once, and the context to nothing, these are the added ones.
    """
    if kind not in (Kind.CROSS_ATTENTION, Kind.SELF_ATTENTION):
        return
    fused = getattr(module, "fused_projections", False)
    own, added = (("to_kv",), ("to_added_kv",)) if fused else (("to_k", "to_v"), ("add_k_proj", "add_v_proj"))
    names = (*own, *added) if kind is Kind.CROSS_ATTENTION else added
    yield from (name for name in names if getattr(module, name, None) is not None)


def _attends_to_itself_alone(denoiser: Any) -> bool:
    """Whether a UNet's cross-attention has the widths of its blocks: it is given no text, and reads the image."""
    config = getattr(denoiser, "config", None)
    widths, blocks = getattr(config, "cross_attention_dim", None), getattr(config, "block_out_channels", None)
    return isinstance(widths, (list, tuple)) and list(widths) == list(blocks or ())


def _reads_its_own_width(module: Any) -> bool:
    return bool(module.cross_attention_dim == module.query_dim)


def _is_named_feed_forward(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module has a feed-forward's name and is the sibling of an attention, as in a block."""
    parent, _, leaf = name.rpartition(".")
    return leaf in _FEED_FORWARD and any(_is_attention(sibling) for sibling in modules[parent].children())
