"""Tell which of its inputs a block carries on, from what it returns."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def streams_of_all(blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Return the streams that all blocks of a chain carry on alike, or () where they do not."""
    found = {streams_of(block) for block in {type(block): block for block in blocks}.values()}
    return found.pop() if len(found) == 1 else ()


def streams_of(block: nn.Module) -> tuple[str, ...]:
    """Return the parameters that a block's outputs continue, in the order of the outputs, or () where unknown.

    Blocks return their streams under the names that they came in by, so the block's own return statement tells; one
    tensor without such a name continues the first parameter. Where statements differ, what diffusers says of the
    class counts.
    """
    returned = set(_returned(block))
    return returned.pop() if len(returned) == 1 else _registered(block)


def takes_skips(block: nn.Module) -> bool:
    """Tell whether a block also reads the output of one that ran long before it, as in a UNet."""
    return "skip" in inspect.signature(type(block).forward).parameters


def _returned(block: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the parameters that each return statement continues, where it tells."""
    forward = inspect.unwrap(type(block).forward)
    parameters = inspect.signature(forward).parameters
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except OSError:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Return) and node.value is not None:
            inner = _called(block, node.value)
            if inner and set(inner) <= set(parameters):
                yield inner
                continue
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            names = tuple(value.id for value in values if isinstance(value, ast.Name) and value.id in parameters)
            if len(names) == len(values):
                yield names
            elif not isinstance(node.value, ast.Tuple):
                yield (list(parameters)[1],)


def _called(block: nn.Module, value: ast.expr) -> tuple[str, ...]:
    """Return the streams of the module within whose output a block hands out as it is, or () for any other value."""
    called = value.func if isinstance(value, ast.Call) else None
    if not isinstance(called, ast.Attribute) or ast.unparse(called.value) != "self":
        return ()
    inner = vars(block).get("_modules", {}).get(called.attr)
    return () if inner is None else streams_of(inner)


def _registered(block: nn.Module) -> tuple[str, ...]:
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(type(block))
    except ValueError:
        return ()
    places = {
        known.return_hidden_states_index: known.hidden_states_argument_name,
        known.return_encoder_hidden_states_index: known.encoder_hidden_states_argument_name,
    }
    return tuple(places[place] for place in sorted(place for place in places if place is not None))
