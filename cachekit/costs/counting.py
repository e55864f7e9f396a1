"""Count the multiply-accumulates (MACs) of one forward on shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cachekit.errors import CostError, first_line
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


def count_forward(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Forward:
    """Run `model` once and count what it does; meant for the meta device, where that takes no memory and little time.

    Raises `CostError` where a model on the meta device asks for values.
    """
    layers: dict[str, int] = {}
    ran, handles = set(), []

    def watch(name: str, module: nn.Module) -> Any:
        def count(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            ran.add(name)
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                layers[name] = layers.get(name, 0) + macs_of_layer(module, next(tensors((inputs, named))), output)

        return module.register_forward_hook(count, with_kwargs=True)

    try:
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                handles.append(watch(name, module))
        with torch.no_grad(), _Shapes() as shapes:
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
    return Forward(sum(layers.values()), shapes.products, frozenset(ran), layers)


class _Shapes(TorchDispatchMode):
    """Memoises the shapes that operations return, and counts the MACs of attention's products.

    On the meta device PyTorch works out most shapes in Python. That is slow, and a denoiser asks for the same ones in
    each of its blocks.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.known: dict[Any, tuple[Any, int]] = {}
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = (func, _key(args), _key(list(kwargs.items())))
        if key in self.known:
            output, products = self.known[key]
            self.products += products
            return tree_map(_like, output)
        with self:  # in inference mode, composite operations arrive whole
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket) if any(name in str(func) for name in _PRODUCTS) else None
        products = count(*args, **kwargs, out_val=output) // 2 if count else 0
        self.products += products
        if _has_only_shapes(func, (args, kwargs), output):
            self.known[key] = tree_map(_like, output), products
        return output


def _key(value: Any) -> Any:
    """Build a key of all that an output's shape and dtype depend on; types too, as 1, 1.0 and True are equal."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device
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
