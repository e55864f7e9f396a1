"""Muon: momentum, made orthogonal, for the weight matrices of a transformer's blocks (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM, DECAY = 0.95, 0.01
#: Coefficients of the odd polynomial whose iterations bring all singular values near 1.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonal(matrices: Tensor) -> Tensor:
    """Replace the singular values of each of `(n, rows, columns)` by about 1 (Newton-Schulz iterations in bf16)."""
    a, b, c = COEFFICIENTS
    found: Any = matrices.bfloat16()
    tall = found.shape[1] > found.shape[2]
    found = found.mT if tall else found
    found = found / (found.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = a * found + (b * square + c * square @ square) @ found
    made: Tensor = found.mT if tall else found
    return made


class Muon:
    """Optimiser of matrices, those of one shape together; the rate is a tensor, so that CUDA graphs see it change."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: Tensor) -> None:
        """Start without momentum."""
        self.rate = rate
        self._groups: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            self._groups.setdefault(parameter.shape, []).append(parameter)
        self._momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix by its gradient."""
        for shape, group in self._groups.items():
            gradients = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            momentum = self._momenta[shape].lerp_(gradients, 1 - MOMENTUM)
            update = orthogonal(gradients.lerp(momentum, MOMENTUM)).float()
            update *= -self.rate * max(1.0, shape[0] / shape[1]) ** 0.5
            matrices: Any = group
            torch._foreach_mul_(matrices, 1 - self.rate * DECAY)
            torch._foreach_add_(matrices, [*update])
