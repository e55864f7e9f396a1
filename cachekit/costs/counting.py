"""Count the multiply-accumulates (MACs) of one forward on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cachekit.errors import CostError, first_line
from cachekit.switches.subclassing import is_intercepted
from cachekit.tensors import tensors, tree_map
from cachekit.upstream.weights import width_of

#: Operations that multiply activations with each other. Where there is no fused attention, as on the meta device, it
#: is two `bmm`.
_PRODUCTS = ("attention", "bmm")


@dataclass(frozen=True)
class Forward:
    """What one forward of a denoiser did.

    `macs` are those of Linear and convolution layers, by name in `layers`; `attention_macs` are those of the products
    QK and AV. `ran` names the modules with weights of their own that were called.
    """

    macs: int
    attention_macs: int
    ran: frozenset[str]
    layers: dict[str, int] = field(default_factory=dict)


class Known:
    """What the forwards of one model have shown so far, on shapes alone: outputs of operations and of modules.

    Counting another forward with it takes a tenth of the time.
    """

    def __init__(self) -> None:
        """Begin without any."""
        #: Outputs and MACs of operations by their arguments, and what modules did by theirs.
        self.operations: dict[Any, tuple[Any, int]] = {}
        self.modules: dict[Any, tuple[Any, list[_Event]]] = {}


@dataclass(frozen=True)
class _Event:
    """A module with weights that ran, or a product of attention, whose `name` is None."""

    name: str | None
    macs: int = 0


def count_forward(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], known: Known | None = None) -> Forward:
    """Run `model` once and count what it does; meant for the meta device, where that takes no memory and little time.

    `known` is what former forwards of the same model have shown. Modules that ran before with the same shapes, and
    hold no switch, are not run again: what is hooked into such a module is not called.

    Raises `CostError` where a model on the meta device asks for values.
    """
    events: list[_Event] = []
    handles, modules = [], dict(model.named_modules())

    def watch(name: str, module: nn.Module) -> Any:
        def count(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            is_counted = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            macs = macs_of_layer(module, next(tensors((inputs, named))), output) if is_counted else 0
            events.append(_Event(name, macs))

        return module.register_forward_hook(count, with_kwargs=True)

    try:
        for name, module in modules.items():
            if next(module.parameters(recurse=False), None) is not None:
                handles.append(watch(name, module))
        with torch.no_grad(), _looked_up(modules, known, events), _Shapes(known or Known(), events):
            model(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
        raise CostError(
            f"{type(model).__name__} cannot run on shapes alone, so its costs are unknown: {first_line(error)}; read"
            " seconds in place of MACs"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _forward_of(events)


def _forward_of(events: Sequence[_Event]) -> Forward:
    layers: dict[str, int] = {}
    for event in events:
        if event.macs and event.name is not None:
            layers[event.name] = layers.get(event.name, 0) + event.macs
    products = sum(event.macs for event in events if event.name is None)
    ran = frozenset(event.name for event in events if event.name is not None)
    return Forward(sum(layers.values()), products, ran, layers)


@contextmanager
def _looked_up(modules: Mapping[str, nn.Module], known: Known | None, events: list[_Event]) -> Iterator[None]:
    """Look up modules that have children and no switch among them, instead of running them again."""
    replaced = [] if known is None else [*_without_switches(modules)]
    try:
        for module in replaced:
            vars(module)["forward"] = _lookup(module, known, events)
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _without_switches(modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield modules whose forwards do nothing but compute; looking up a single layer would save no time."""
    switched = [name for name, module in modules.items() if is_intercepted(module)]
    holding = {"", *(name[:place] for name in switched for place, letter in enumerate(name) if letter == ".")}
    for name, module in modules.items():
        if name not in holding and next(module.children(), None) is not None and "forward" not in vars(module):
            yield module


def _lookup(module: nn.Module, known: Any, events: list[_Event]) -> Callable[..., Any]:
    """Make a forward for `module` that looks up what its own gave, and what it did, for the same shapes."""
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        key = (module, _key(args), _key(kwargs))
        try:
            found = known.modules.get(key)
        except TypeError:  # something that can't be a key
            return forward(*args, **kwargs)
        if found is not None:
            events.extend(found[1])
            return tree_map(_like, found[0])
        start = len(events)
        output = forward(*args, **kwargs)
        is_unchanged = key == (module, _key(args), _key(kwargs))
        if is_unchanged and _are_shapes((args, kwargs)) and _are_shapes(output):
            known.modules[key] = tree_map(_like, output), events[start:]
        return output

    return call


def _are_shapes(tree: Any) -> bool:
    """Whether a tree has plain tensors without values, and besides them nothing but plain data."""
    if isinstance(tree, dict):
        return all(map(_are_shapes, tree.values()))
    if isinstance(tree, (tuple, list)):
        return all(map(_are_shapes, tree))
    if isinstance(tree, Tensor):
        return tree.is_meta and type(tree) in (Tensor, nn.Parameter)
    return tree is None or isinstance(tree, (bool, int, float, str, torch.dtype))


class _Shapes(TorchDispatchMode):
    """Memoises the shapes that operations return, and counts the MACs of attention's products.

    On the meta device PyTorch works out most shapes in Python. That is slow, and a denoiser asks for the same ones in
    each of its blocks.
    """

    def __init__(self, known: Known, events: list[_Event]) -> None:
        TorchDispatchMode.__init__(self)
        self.known = known.operations
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = (func, _key(args), _key(list(kwargs.items())))
        if key in self.known:
            output, products = self.known[key]
            self._note(products)
            return tree_map(_like, output)
        with self:  # in inference mode, composite operations arrive whole
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket) if any(name in str(func) for name in _PRODUCTS) else None
        products = count(*args, **kwargs, out_val=output) // 2 if count else 0
        self._note(products)
        if _has_only_shapes(func, (args, kwargs), output):
            self.known[key] = tree_map(_like, output), products
        return output

    def _note(self, products: int) -> None:
        if products:
            self.events.append(_Event(None, products))


def _key(value: Any) -> Any:
    """Build a key of all that an output's shape and dtype depend on; types too, as 1, 1.0 and True are equal."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in value.items())
    return tuple(map(_key, value)) if isinstance(value, (tuple, list)) else (type(value), value)


def _has_only_shapes(func: Any, given: Any, output: Any) -> bool:
    """Whether an operation returned new plain tensors: no views of what it was `given`, nothing read from values."""
    if func._schema.is_mutable or any(value.alias_info for value in func._schema.returns):
        return False
    plain = all(tensor.is_meta and type(tensor) in (Tensor, nn.Parameter) for tensor in tensors((given, output)))
    return plain and next(tensors(output), None) is not None


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def macs_of_layer(module: nn.Module, entered: Tensor, output: Tensor) -> int:
    """Count the MACs of one Linear or convolution layer; bias additions are not counted."""
    if isinstance(module, nn.Linear):
        return output.numel() * width_of(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    if getattr(module, "transposed", False):
        return entered.numel() * weight[0].numel()
    return output.numel() * weight[0].numel()
