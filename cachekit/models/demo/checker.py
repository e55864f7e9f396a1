"""Read a scene back from an image, and check it against a caption.

Each quarter of the image is fitted as background plus coverage times one colour of the palette. The coverage is
compared with a bank of templates of every shape, fill, radius, tilt and stripe phase. A thing counts as shown only if
the best template has the words of the caption and fits well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cachekit.models.demo.scenes as scenes

__all__ = ["Reading", "Verdict", "read", "shows"]

Array = NDArray[np.float32]

FIT = 0.80
COLOUR_FIT = 0.80
LEVEL_TOLERANCE = 0.12
STRAY_PIXELS = 6
_FOREGROUND = 0.22
_WINDOW = 34
_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Reading:
    """What one quarter of an image shows: the nearest words, and how well they fit (1 is perfect)."""

    size: str
    fill: str
    colour: str
    shape: str
    fit: float
    colour_fit: float


@dataclass(frozen=True)
class Verdict:
    """Whether an image agrees with its caption in each aspect; true if it does in all."""

    colours: bool
    shapes: bool
    fills: bool
    sizes: bool
    places: bool
    background: bool
    fit: bool

    def __bool__(self) -> bool:
        """Whether all aspects agree."""
        return all(vars(self).values())


@dataclass(frozen=True)
class _Bank:
    """Flattened templates, centred on their mass, and the words for each."""

    templates: Array
    energy: Array
    words: tuple[tuple[str, str, str], ...]


def _parameters(fill: str, size: str) -> tuple[Array, Array, Array]:
    """Make the radii, tilts and stripe phases of the templates for one size and fill."""
    low, high = scenes.SIZES[size]
    phases = np.arange(8) / 8 if fill == "striped" else np.zeros(1)
    radii = np.linspace(low, high, 4)
    tilts = np.array([-2.0, 0.0, 2.0]) / 3 * scenes.TILT
    grids = np.meshgrid(radii, tilts, phases)
    radius, tilt, phase = (grid.ravel().astype(np.float32) for grid in grids)
    return radius, tilt, phase


@cache
def _bank() -> _Bank:
    """Draw all templates, once."""
    templates, words = [], []
    for shape in scenes.SHAPES:
        for fill in scenes.FILLS:
            for size in scenes.SIZES:
                radius, tilt, phase = _parameters(fill, size)
                middle = np.zeros((len(radius), 2), dtype=np.float32)
                drawn = scenes.coverage(shape, fill, middle, radius, tilt, phase, _WINDOW)
                templates.append(scenes.coverage(shape, fill, -_mass(drawn), radius, tilt, phase, _WINDOW))
                words += [(size, fill, shape)] * len(radius)
    stacked = np.concatenate(templates).reshape(len(words), -1)
    return _Bank(stacked, (stacked**2).sum(1), tuple(words))


def _mass(windows: Array) -> Array:
    """Find the centres of mass, n x 2 (x, y) from the middle, of n windows."""
    axis = np.arange(windows.shape[-1], dtype=np.float32) - np.float32((windows.shape[-1] - 1) / 2)
    total = windows.sum((1, 2)) + np.float32(1e-6)
    return np.stack([(windows * axis).sum((1, 2)) / total, (windows * axis[:, None]).sum((1, 2)) / total], 1)


def _shifted(alpha: Array, x: float, y: float) -> Array:
    """Move a quarter by (x, y) pixels into a template's window, by linear interpolation."""
    pad = (_WINDOW - alpha.shape[0]) // 2
    alpha = np.pad(alpha, pad)
    for axis, amount in ((1, x), (0, y)):
        whole = int(np.floor(amount))
        part = np.float32(amount - whole)
        near = np.roll(alpha, whole, axis)
        alpha = (1 - part) * near + part * np.roll(near, 1, axis)
    return alpha


def _best_template(alpha: Array) -> tuple[tuple[str, str, str], float]:
    """Find the words of the template nearest to a quarter's coverage, and the soft overlap (Dice) of both."""
    bank = _bank()
    x, y = _mass(alpha[None])[0]
    moved = np.stack([_shifted(alpha, dx - x, dy - y).ravel() for dx in _SHIFTS for dy in _SHIFTS])
    overlap = 2 * moved @ bank.templates.T / ((moved**2).sum(1)[:, None] + bank.energy + 1e-6)
    best = int(overlap.max(0).argmax())
    return bank.words[best], float(overlap[:, best].max())


def _background(image: Array) -> tuple[str, bool, Array]:
    """Fit a plane per channel to the pixels near the border's median.

    Returns the name of the nearest background, whether it is near enough, and the plane (64 x 64 x 3).
    """
    axis = np.linspace(-1, 1, scenes.IMAGE_SIZE, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    basis = np.stack([np.ones_like(x), x, y], -1)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    plane = np.broadcast_to(np.median(border, 0), image.shape)
    for _ in range(3):
        near = np.abs(image - plane).max(-1) < 0.12
        if near.sum() < 50:
            return "", False, plane
        plane = basis @ np.linalg.lstsq(basis[near], image[near], rcond=None)[0]
    level = plane.mean((0, 1))
    name = min(scenes.BACKGROUNDS, key=lambda key: abs(scenes.BACKGROUNDS[key] - float(level.mean())))
    return name, bool(np.abs(level - scenes.BACKGROUNDS[name]).max() < LEVEL_TOLERANCE), plane


def _explain(difference: Array, plane: Array) -> tuple[str, float, Array]:
    """Fit one colour of the palette to a quarter's difference from the background.

    Returns the colour's name, the share of the difference that it explains, and the coverage.
    """
    best: tuple[str, float, Array] = ("", -1.0, difference[..., 0])
    energy = float((difference**2).sum()) + 1e-6
    for name, colour in scenes.COLOURS.items():
        direction = np.array(colour, dtype=np.float32) - plane
        alpha = np.clip((difference * direction).sum(-1) / (direction**2).sum(-1), 0, 1.1)
        share = 1 - float(((difference - alpha[..., None] * direction) ** 2).sum()) / energy
        if share > best[1]:
            best = (name, share, np.minimum(alpha, 1))
    return best


def _read_quarter(image: Array, plane: Array) -> Reading | None:
    difference = image - plane
    if (np.abs(difference).max(-1) > _FOREGROUND).sum() <= STRAY_PIXELS:
        return None
    colour, share, alpha = _explain(difference, plane)
    (size, fill, shape), fit = _best_template(alpha)
    return Reading(size, fill, colour, shape, fit, share)


def read(image: Any) -> tuple[str, dict[str, Reading]]:
    """Read an image: the name of its background, "" if none fits, and what each occupied place shows."""
    array = scenes.pixels(image)
    name, near, plane = _background(array)
    readings = {
        place: _read_quarter(array[scenes.quarter(place)], plane[scenes.quarter(place)]) for place in scenes.PLACES
    }
    return (name if near else ""), {place: found for place, found in readings.items() if found is not None}


def shows(image: Any, caption: str, fit: float = FIT) -> Verdict:
    """Check an image (PIL, or 64 x 64 x 3 floats in [0, 1]) against a caption.

    `fit` is the least overlap (soft Dice) with its template that a thing needs. Raises `ValueError` for an image of
    another size or a caption that isn't one of `scenes.caption`'s.
    """
    scene = scenes.parse(caption)
    background, readings = read(image)
    pairs = [(thing, readings.get(thing.place)) for thing in scene.things]
    return Verdict(
        colours=all(found is not None and found.colour == thing.colour for thing, found in pairs),
        shapes=all(found is not None and found.shape == thing.shape for thing, found in pairs),
        fills=all(found is not None and found.fill == thing.fill for thing, found in pairs),
        sizes=all(found is not None and found.size == thing.size for thing, found in pairs),
        places={thing.place for thing in scene.things} == set(readings),
        background=background == scene.background,
        fit=all(found.fit >= fit and found.colour_fit >= COLOUR_FIT for found in readings.values()),
    )
