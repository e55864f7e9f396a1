"""A small classifier of scenes, whose features the Frechet distance compares."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cachekit.models.demo.scenes as scenes
from cachekit.models.demo.pipeline import WEIGHTS, verify

__all__ = ["ASPECTS", "FEATURES", "Classifier", "features", "load_classifier"]

FEATURES = 16
#: Number of words by aspect of a quarter of an image. Where no thing is present, only the background is defined.
ASPECTS = {
    "present": 2,
    "size": len(scenes.SIZES),
    "fill": len(scenes.FILLS),
    "colour": len(scenes.COLOURS),
    "shape": len(scenes.SHAPES),
    "background": len(scenes.BACKGROUNDS),
}
_CHANNELS = (3, 24, 48, 64, 96)
_BATCH = 100


class Classifier(nn.Module):
    """Convolutional classifier of each quarter of a 64 x 64 image, from 16 features of the quarter."""

    def __init__(self) -> None:
        """Create four convolutions that halve the image, one that makes features, and one linear head."""
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(_CHANNELS):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(_CHANNELS[-1], FEATURES, 2, stride=2))
        self.head = nn.Conv2d(FEATURES, sum(ASPECTS.values()), 1)

    def quarters(self, images: Tensor) -> Tensor:
        """Compute n x 16 x 2 x 2 features of n x 3 x 64 x 64 images in [0, 1]."""
        found: Tensor = self.trunk(2 * images - 1)
        return found

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the scores of each aspect: n x words x 2 x 2."""
        scores = self.head(self.quarters(images)).split(list(ASPECTS.values()), 1)
        return dict(zip(ASPECTS, scores))


@cache
def load_classifier() -> Classifier:
    """Check the files of the shipped classifier, and load it."""
    from safetensors.torch import load_file

    folder = WEIGHTS / "classifier"
    verify(folder)
    classifier = Classifier()
    weights = load_file(folder / "model.safetensors")
    classifier.load_state_dict({name: value.float() for name, value in weights.items()})
    return classifier.eval().requires_grad_(False)


def features(images: Iterable[Any]) -> NDArray[np.float64]:
    """Compute n x 16 features of unit variance of 64 x 64 images, PIL or arrays: means over their quarters."""
    pixels = torch.from_numpy(np.stack([scenes.pixels(image) for image in images])).permute(0, 3, 1, 2)
    classifier = load_classifier()
    found = [classifier.quarters(part).mean((2, 3)) for part in torch.split(pixels, _BATCH)]
    return np.asarray(torch.cat(found).double().numpy())
