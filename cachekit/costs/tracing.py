"""Trace one forward of a denoiser on the meta device: outputs of targets, inputs of regions, MACs of layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cachekit.costs.counting import count_forward
from cachekit.costs.meta import meta_copy, on_meta
from cachekit.interface.moment import Streams
from cachekit.planning.assignments import Assignment
from cachekit.switches.roles import entry_of
from cachekit.tensors import tree_map
from cachekit.upstream.arguments import by_name, parameters_of


@dataclass
class ForwardTrace:
    """What one uncached forward makes, in tensors on the meta device.

    `outputs` are those of the targets' modules by name, in the order in which the modules finish; "" is the denoiser
    itself. `entered` are the tensors that enter regions, by the name of the entry module and those of its parameters.
    `layers` are the MACs of each Linear or convolution layer.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    entered: dict[tuple[str, tuple[str, ...]], Streams] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)

    def add_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Record the output of the module called `name`; a forward hook."""
        self.outputs[name] = output

    def add_entered(
        self, name: str, streams: tuple[str, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Record the arguments `streams` of the module called `name`; a forward pre-hook."""
        given = by_name(parameters_of(module), args, kwargs)
        self.entered[name, streams] = tuple(given[stream] for stream in streams)


def trace_forward(denoiser: nn.Module, bound: Sequence[Assignment], arguments: dict[str, Any]) -> ForwardTrace:
    """Run a copy of `denoiser` without weights once, and record what the targets of assignments make and take.

    Raises `CostError` where the denoiser doesn't run on the meta device.
    """
    trace, twin = ForwardTrace(), meta_copy(denoiser)
    exits = {one.target.exit for one in bound if not one.is_guidance and not one.is_whole}
    modules = dict(twin.named_modules())
    for name in {"", *exits}:
        twin.get_submodule(name).register_forward_hook(functools.partial(trace.add_output, name))
    for entry, streams in set(filter(None, (entry_of(one, modules) for one in bound))):
        hook = functools.partial(trace.add_entered, entry, streams)
        twin.get_submodule(entry).register_forward_pre_hook(hook, with_kwargs=True)
    trace.layers = count_forward(twin, (), tree_map(on_meta, arguments)).layers
    return trace
