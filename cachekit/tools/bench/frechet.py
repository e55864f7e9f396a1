"""The Frechet distance of generated images to scenes rendered from the same captions."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

__all__ = ["GaussianStats", "distance", "gaussian_stats", "is_enough", "rendered"]

#: Scenes rendered as the reference, at least.
RENDERED = 2000


class GaussianStats(BaseModel):
    """Number, mean and covariance of feature vectors: a normal distribution fitted to them."""

    model_config = ConfigDict(frozen=True)

    n: int
    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]


def is_enough(images: int, features: int) -> bool:
    """Whether the images suffice to estimate the features' covariance to compare it."""
    return images >= 2 * features


def gaussian_stats(features: ArrayLike) -> GaussianStats:
    """Fit a normal distribution to features (images, features) of at least 2 images."""
    values = np.asarray(features, dtype=np.float64)
    mean, covariance = values.mean(0), np.cov(values, rowvar=False)
    return GaussianStats(n=len(values), mean=tuple(mean.tolist()), covariance=tuple(map(tuple, covariance.tolist())))


def distance(one: GaussianStats, other: GaussianStats) -> float:
    """Squared Frechet distance between two normal distributions.

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), as in the Frechet inception distance (Heusel et al. 2017, eq. 6). It is
    biased, larger for fewer images, so only distances of equally many images can be compared.
    """
    from scipy.linalg import svdvals

    apart = np.subtract(one.mean, other.mean)
    c, d = np.array(one.covariance), np.array(other.covariance)
    # With C = R R^T and C' = S S^T, the trace of the root is the sum of the singular values of R^T S.
    shared = svdvals(_root(c).T @ _root(d)).sum()
    return max(float(apart @ apart + np.trace(c) + np.trace(d) - 2 * shared), 0.0)


@lru_cache(maxsize=8)
def rendered(captions: tuple[str, ...]) -> GaussianStats:
    """Statistics of at least `RENDERED` scenes rendered from captions, each caption equally often."""
    from cachekit.models.demo import features, scenes

    chosen = [scenes.parse(text) for text in captions]
    rng = np.random.default_rng(0)
    rounds = math.ceil(RENDERED / len(captions))
    return gaussian_stats(np.concatenate([features(scenes.render_batch(chosen, rng)) for _ in range(rounds)]))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """R with R R^T equal to a positive semidefinite matrix; eigenvalues that rounding made negative count as 0."""
    from scipy.linalg import eigh

    values, vectors = eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.clip(values, 0, None)))
