"""Find out which of its inputs a block carries on, from the outputs that it returns."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def streams_of_all(blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Find the streams that all blocks of a chain carry on alike, or () where they differ."""
    found = {streams_of(block) for block in {type(block): block for block in blocks}.values()}
    return found.pop() if len(found) == 1 else ()


def streams_of(block: nn.Module) -> tuple[str, ...]:
    """Find the parameters that a block's outputs continue, in the order of the outputs, or () where unknown.

    Blocks return their streams under the names of the parameters, so the block's own return statements are read;
    a single tensor under another name continues the first parameter. Where the statements disagree, diffusers'
    registry of blocks decides.
    """
    returned = set(_returned(block))
    return returned.pop() if len(returned) == 1 else _registered(block)


def takes_skips(block: nn.Module) -> bool:
    """Whether a block also reads the output of one that ran long before it, as in a UNet."""
    return "skip" in inspect.signature(type(block).forward).parameters


def _returned(block: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the parameters that each return statement continues, leaving out statements that don't show it."""
    parameters, values = _read(inspect.unwrap(type(block).forward))
    for value in values:
        found = _continued(block, value, parameters)
        if found is not None:
            yield found


@functools.lru_cache(maxsize=256)
def _read(forward: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[ast.expr, ...]]:
    """Read the parameters of a function and the values that it returns; none of these where it has no source."""
    parameters = tuple(inspect.signature(forward).parameters)
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except OSError:
        return parameters, ()
    returns = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return))
    return parameters, tuple(node.value for node in returns if node.value is not None)


def _continued(block: nn.Module, value: ast.expr, parameters: Sequence[str]) -> tuple[str, ...] | None:
    """Find the parameters that a returned value continues; None where it doesn't show."""
    inner = _streams_of_called(block, value)
    if inner and set(inner) <= set(parameters):
        return inner
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    names = tuple(it.id for it in values if isinstance(it, ast.Name) and it.id in parameters)
    if len(names) == len(values):
        return names
    return None if isinstance(value, ast.Tuple) else (parameters[1],)


def _streams_of_called(block: nn.Module, value: ast.expr) -> tuple[str, ...]:
    """Find the streams of an inner module whose output a block returns as it is, or () for any other value."""
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
    # Before diffusers 0.37 the names are fixed.
    places = {
        known.return_hidden_states_index: getattr(known, "hidden_states_argument_name", "hidden_states"),
        known.return_encoder_hidden_states_index: getattr(
            known, "encoder_hidden_states_argument_name", "encoder_hidden_states"
        ),
    }
    return tuple(places[place] for place in sorted(place for place in places if place is not None))
