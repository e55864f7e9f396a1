"""Count multiply-accumulates by replaying a run's distinct calls on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .tree import tree_map

if TYPE_CHECKING:
    from .engine import Attachment
    from .plan import Row
    from .run import Record


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


def cost_of(attachment: Attachment, record: Record) -> Cost:
    """Return what the calls of `record` cost, and what they would have cost uncached.

    Calls with the same actions cost the same, so each distinct one is replayed once, in order, by the same
    engine on a copy of the model that has shapes only.
    """
    from .engine import Attachment, remove

    twin = meta_copy(attachment.denoiser)
    remove(twin)
    inputs = {batch: tree_map(_on_meta, arguments) for batch, arguments in record.inputs.items()}
    with MacCounter(twin) as counter, torch.no_grad():
        full = {batch: counter.count(twin, *arguments) for batch, arguments in inputs.items()}
        with Attachment(twin, attachment.policies, attachment.catalog) as replica:
            replica.install(twin)
            per_call = _replay(replica, counter, record, inputs)
    return Cost(sum(per_call), sum(full[batch] for batch, _ in record.calls), tuple(per_call))


def _replay(replica: Attachment, counter: MacCounter, record: Record, inputs: dict[int, Any]) -> list[int]:
    distinct: dict[Any, tuple[int, Row]] = {}
    for batch, row in record.calls:
        distinct.setdefault((batch, row.signature), (batch, row))
    costs: dict[Any, int] = {}
    with replica.replaying([row for _, row in distinct.values()], record):
        for key, (batch, _) in distinct.items():
            costs[key] = counter.count(replica.denoiser, *inputs[batch])
    return [costs[batch, row.signature] for batch, row in record.calls]


def meta_copy(denoiser: nn.Module) -> nn.Module:
    """Return a deep copy with shapes only: LoRA, processors and switches included, no weights copied."""
    memo: dict[int, Any] = {}
    for parameter in denoiser.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=False)
    for buffer in denoiser.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(denoiser, memo)


class MacCounter:
    """Count what Linear and convolution modules of a model multiply, by hooks, while entered."""

    def __init__(self, model: nn.Module) -> None:
        """Count for `model`; the hooks live from `__enter__` to `__exit__`."""
        self.total = 0
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> MacCounter:
        """Put a hook on each layer that multiplies."""
        for module in self._model.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                self._handles.append(module.register_forward_hook(self._add))
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def count(self, model: nn.Module, args: Any, kwargs: Any) -> int:
        """Return the multiply-accumulates of one forward."""
        self.total = 0
        model(*args, **kwargs)
        return self.total

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.total += macs_of_layer(module, inputs[0], output)


def macs_of_layer(module: nn.Module, entered: Tensor, output: Tensor) -> int:
    """Return the multiply-accumulates of one Linear or convolution layer; biases count nothing."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Linear):
        return output.numel() * weight.shape[1]
    if getattr(module, "transposed", False):
        return entered.numel() * weight[0].numel()
    return output.numel() * weight[0].numel()


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
