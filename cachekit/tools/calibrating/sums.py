"""The normal equations of one step, which add up over batches, threads and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

#: The penalty on each weight, relative to its own term's sum of squares. It decides between terms that are multiples
#: of each other, as the sample in the calls of two branches is.
RIDGE = 1e-6


@dataclass(frozen=True)
class Sums:
    """Sums over all elements of a step: products of two terms, of term and target, and the squares of the target.

    `products` is `(terms, terms)`, `targets` is `(terms,)`, in double precision; `names` are those of the terms.
    """

    names: tuple[str, ...]
    products: np.ndarray
    targets: np.ndarray
    square: float
    elements: int

    @classmethod
    def of(cls, names: Sequence[str], terms: Sequence[Tensor], target: Tensor) -> Sums:
        """Sum up the elements of `terms` and `target`, tensors of one shape."""
        import torch

        wide = [tensor.detach().to("cpu", torch.float64).reshape(-1) for tensor in (*terms, target)]
        *rows, wanted = (tensor.numpy() for tensor in wide)
        table = np.stack(rows)
        return cls(tuple(names), table @ table.T, table @ wanted, float(wanted @ wanted), len(wanted))

    def __add__(self, other: Sums) -> Sums:
        """Add the sums of other samples."""
        return Sums(
            self.names,
            self.products + other.products,
            self.targets + other.targets,
            self.square + other.square,
            self.elements + other.elements,
        )

    def solve(self) -> np.ndarray:
        """Compute the weights `(terms,)` that minimise the squared error, with the penalty `RIDGE`."""
        scale = np.sqrt(np.diag(self.products))
        scale[scale == 0] = 1.0
        normal = self.products / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
        weights: np.ndarray = np.linalg.solve(normal, self.targets / scale) / scale
        return weights

    def error(self, weights: np.ndarray) -> float:
        """Compute the root of the squared error relative to the target's squares."""
        left = self.square - 2 * weights @ self.targets + weights @ self.products @ weights
        return float(np.sqrt(max(left, 0.0) / self.square)) if self.square else 0.0
