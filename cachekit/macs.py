"""Count multiply-accumulates by replaying a run's distinct calls on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .compiled import without_compiler
from .errors import CostError
from .offloading import computing_dtype
from .policy import Action
from .tree import tensors, tree_map

if TYPE_CHECKING:
    from .adapter import Layout
    from .engine import Attachment
    from .run import Made, Record

#: Attributes by which accelerate and diffusers hang hooks that move weights on modules.
_MOVERS = ("_hf_hook", "_diffusers_hook")
#: Operations that multiply activations: where no fused attention exists, as on the meta device, it is two of `bmm`.
_PRODUCTS = ("attention", "bmm")


@dataclass(frozen=True)
class Cost:
    """Hold multiply-accumulates of Linear and convolution layers over all calls and branches of a run."""

    macs: int
    baseline_macs: int
    per_call: tuple[int, ...]

    @property
    def speedup(self) -> float:
        """Return how many times fewer there are than uncached."""
        return self.baseline_macs / self.macs if self.macs else 1.0


@dataclass(frozen=True)
class Forward:
    """Hold what one forward of the denoiser did: multiply-accumulates, and which modules with weights ran.

    `layers` are the multiply-accumulates of each Linear or convolution layer, by name.
    """

    macs: int
    attention_macs: int
    ran: frozenset[str]
    layers: dict[str, int] = field(default_factory=dict)


def cost_of(attachment: Attachment, record: Record) -> Cost:
    """Return what the calls of `record` cost, and what they would have cost uncached."""
    from .engine import Attachment

    twins = {name: meta_copy(denoiser.module) for name, denoiser in attachment.denoisers.items()}
    inputs = {key: tree_map(on_meta, arguments) for key, arguments in record.inputs.items()}
    full = {key: count_forward(twins[key[0]], *arguments) for key, arguments in inputs.items()}
    with Attachment(twins, attachment.policies, attachment.catalog) as replica:
        replica.install(next(iter(twins.values())))
        forwards, _ = replay(replica, record.calls, inputs, full, record.layout, record.steps)
    per_call = tuple(forward.macs for forward in forwards)
    return Cost(sum(per_call), sum(full[made.inputs].macs for made in record.calls), per_call)


def replay(
    attachment: Attachment,
    calls: Sequence[Made],
    inputs: dict[Any, Any],
    full: dict[Any, Forward],
    layout: Layout,
    steps: int,
) -> tuple[list[Forward], int]:
    """Return what each call does, and the peak of bytes kept.

    Calls with the same shapes and actions cost the same, so each distinct one runs once, in order, by the same
    engine that drives a run; again only where it keeps what had been dropped meanwhile. `inputs` maps
    `Made.inputs` to the arguments (args, kwargs) of the uncached forward, `full` to what that did: so does a call
    that keeps and reuses nothing.
    """
    found: dict[Any, Forward] = {}
    with attachment.driver.replaying(layout, steps) as run:
        for made in calls:
            if made.signature in found and not _keeps_anew(attachment, made, run.store.sizes()):
                continue
            if made.dropped:
                found[made.signature] = Forward(0, 0, frozenset())
                continue
            if made.row.narrowed_by < 0 and set(made.row.actions) <= {Action.COMPUTE}:
                found[made.signature] = full[made.inputs]
                continue
            attachment.driver.expect(made)
            args, kwargs = inputs[made.inputs]
            module = attachment.denoisers[made.denoiser].module
            found[made.signature] = count_forward(module, args, kwargs)
        peak = run.store.peak_bytes
    return [found[made.signature] for made in calls], peak


def _keeps_anew(attachment: Attachment, made: Made, kept: Collection[int]) -> bool:
    """Tell whether a call keeps something that is not there, so that a later one could not reuse it."""
    own = (i for i, action in enumerate(made.row.actions) if action is Action.STORE)
    return any(i not in kept and attachment.assignments[i].denoiser == made.denoiser for i in own)


def meta_copy(denoiser: nn.Module) -> nn.Module:
    """Return a plain copy with shapes only: LoRA and processors included, no weights, no offload hooks, no switches."""
    from .engine import remove

    memo: dict[int, Any] = {}
    for module in denoiser.modules():
        dtype = computing_dtype(module)
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(_without_values(parameter, dtype), requires_grad=False)
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = _without_values(buffer, dtype)
        # They hold devices and streams, and would find none here.
        memo.update({id(vars(module)[name]): None for name in _MOVERS if name in vars(module)})
    for module in reversed(list(denoiser.modules())):  # those within first
        inner = without_compiler(module)
        if inner is not module:
            memo[id(module)] = _Uncompiled(copy.deepcopy(inner, memo))
    twin = copy.deepcopy(denoiser, memo)
    remove(twin)
    for module in twin.modules():
        for name in (*_MOVERS, "forward", "_old_forward"):
            vars(module).pop(name, None)
    return twin


class _Uncompiled(nn.Module):
    """Stand for a module as torch's compiled one does, under the same names, without compiling."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def _without_values(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor without memory, in `dtype` where one is given and this one holds floating numbers."""
    return torch.empty_like(tensor, device="meta", dtype=dtype if dtype and tensor.is_floating_point() else None)


def count_forward(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Forward:
    """Return what one forward of `model` does; meant for the meta device, where it takes little time."""
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
        reason = str(error).strip().splitlines()[0]
        raise CostError(
            f"{type(model).__name__} cannot run on shapes alone, so its costs are unknown: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return Forward(sum(layers.values()), shapes.products, frozenset(ran), layers)


class _Shapes(TorchDispatchMode):
    """Hand out the shapes that an operation had before, and count the products of attention.

    On the meta device most shapes are found in Python, which takes long, and a denoiser asks for the same ones in
    each of its blocks.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.known: dict[Any, tuple[Any, int]] = {}
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = (func, _described(args), _described(list(kwargs.items())))
        if key in self.known:
            output, products = self.known[key]
            self.products += products
            return tree_map(_anew, output)
        with self:  # in inference mode, operations come that consist of others
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket) if any(name in str(func) for name in _PRODUCTS) else None
        products = count(*args, **kwargs, out_val=output) // 2 if count else 0
        self.products += products
        if _has_only_shapes(func, (args, kwargs), output):
            self.known[key] = tree_map(_anew, output), products
        return output


def _described(value: Any) -> Any:
    """Return what an operation's shapes depend on; 1, 1.0 and True are equal, and give other dtypes."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_described, value)) if isinstance(value, (tuple, list)) else (type(value), value)


def _has_only_shapes(func: Any, given: Any, output: Any) -> bool:
    """Tell whether an operation made new plain tensors, no views of what it was `given`, and read no values."""
    if func._schema.is_mutable or any(value.alias_info for value in func._schema.returns):
        return False
    plain = all(tensor.is_meta and type(tensor) in (Tensor, nn.Parameter) for tensor in tensors((given, output)))
    return plain and next(tensors(output), None) is not None


def _anew(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def macs_of_layer(module: nn.Module, entered: Tensor, output: Tensor) -> int:
    """Return the multiply-accumulates of one Linear or convolution layer; biases count nothing."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Linear):
        return output.numel() * weight.shape[1]
    if getattr(module, "transposed", False):
        return entered.numel() * weight[0].numel()
    return output.numel() * weight[0].numel()


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype without memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
