"""Measure how far generated images are, as a crowd, from scenes drawn from the same captions."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

__all__ = ["GaussianStats", "crowd", "distance", "is_enough", "rendered"]

RENDERED = 2000


class GaussianStats(BaseModel):
    """Hold what the distance needs to know of many feature vectors: their number, mean and covariance."""

    model_config = ConfigDict(frozen=True)

    n: int
    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]


def is_enough(images: int, features: int) -> bool:
    """Tell whether so many images make a covariance of so many features that is worth comparing."""
    return images >= 2 * features


def crowd(features: ArrayLike) -> GaussianStats:
    """Return number, mean and covariance of n x d features; n is at least 2."""
    values = np.asarray(features, dtype=np.float64)
    mean, covariance = values.mean(0), np.cov(values, rowvar=False)
    return GaussianStats(n=len(values), mean=tuple(mean.tolist()), covariance=tuple(map(tuple, covariance.tolist())))


def distance(one: GaussianStats, other: GaussianStats) -> float:
    """Return the squared Frechet distance between two normal distributions.

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), as in the Frechet inception distance (Heusel et al. 2017, eq. 6). It is
    biased: the fewer images there are, the larger it is, so only crowds of equal numbers can be compared.
    """
    from scipy.linalg import svdvals

    apart = np.subtract(one.mean, other.mean)
    c, d = np.array(one.covariance), np.array(other.covariance)
    # With C = R R^T and C' = S S^T, the trace of the root is the sum of the singular values of R^T S.
    shared = svdvals(_root(c).T @ _root(d)).sum()
    return max(float(apart @ apart + np.trace(c) + np.trace(d) - 2 * shared), 0.0)


@lru_cache(maxsize=8)
def rendered(captions: tuple[str, ...]) -> GaussianStats:
    """Return the crowd of scenes drawn from captions, each caption equally often, some thousands in all."""
    from cachekit.models.demo import features, scenes

    chosen = [scenes.parse(text) for text in captions]
    rng = np.random.default_rng(0)
    rounds = math.ceil(RENDERED / len(captions))
    return crowd(np.concatenate([features(scenes.render_batch(chosen, rng)) for _ in range(rounds)]))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return R with R R^T equal to a positive semidefinite matrix, in spite of rounding."""
    from scipy.linalg import eigh

    values, vectors = eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.clip(values, 0, None)))
