"""Procedural scenes, and captions that describe them exactly.

A scene has one to three things, each in its own quarter of a 64 x 64 image, on a plain background with a slight
gradient. What the caption leaves open (exact position, radius, rotation, phase of the stripes, tints and gradient) is
drawn at random when the scene is rendered.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FILLS",
    "IMAGE_SIZE",
    "PLACES",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "caption",
    "coverage",
    "heldout_captions",
    "is_drawn",
    "is_heldout",
    "parse",
    "pixels",
    "random_scene",
    "render",
    "render_batch",
    "vocabulary",
]

Array = NDArray[np.float32]

IMAGE_SIZE = 64
CELL = IMAGE_SIZE // 2
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.14, 0.14),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.14, 0.26, 0.88),
    "yellow": (0.96, 0.82, 0.10),
    "purple": (0.60, 0.16, 0.70),
    "cyan": (0.10, 0.76, 0.84),
}
BACKGROUNDS: dict[str, float] = {"white": 0.92, "grey": 0.53, "black": 0.10}
SHAPES = ("circle", "square", "triangle", "cross", "star")
FILLS = ("solid", "striped", "hollow")
SIZES: dict[str, tuple[float, float]] = {"small": (8.0, 9.25), "large": (12.0, 13.25)}
PLACES = ("top left", "top right", "bottom left", "bottom right")

TILT = np.deg2rad(12.0)
STRIPE_PERIOD = 6.0
STRIPE_GAP = 0.3
LINE_WIDTH = 2.25
_EXTENT = {"circle": 1.0, "square": 1.03, "triangle": 1.16, "cross": 1.06, "star": 1.13}
_HELDOUT_SHARE = 6
_COUNTS = (0.25, 0.5, 0.25)


@dataclass(frozen=True)
class Thing:
    """One object of a scene, in the words of its caption."""

    size: str
    fill: str
    colour: str
    shape: str
    place: str

    def __str__(self) -> str:
        """Write the thing's part of a caption, which leaves out a solid fill."""
        fill = "" if self.fill == "solid" else f"{self.fill} "
        return f"a {self.size} {fill}{self.colour} {self.shape} {self.place}"


@dataclass(frozen=True)
class Scene:
    """One to three things in the order of the caption, and the name of the background."""

    things: tuple[Thing, ...]
    background: str


def caption(scene: Scene) -> str:
    """Write the caption of a scene."""
    return f"{' and '.join(map(str, scene.things))} on {scene.background}"


def parse(text: str) -> Scene:
    """Parse a caption.

    Raises `ValueError` for a text that `caption` doesn't write.
    """
    body, _, background = text.strip().rpartition(" on ")
    if background not in BACKGROUNDS:
        raise ValueError(f"no known background at the end of caption {text!r}; end it with {', '.join(BACKGROUNDS)}")
    things = tuple(_parse_thing(part, text) for part in body.split(" and "))
    if len({thing.place for thing in things}) < len(things):
        raise ValueError(f"two things in one place in caption {text!r}; give each a place of its own")
    return Scene(things, background)


def _parse_thing(part: str, text: str) -> Thing:
    words = part.split()
    if len(words) == 6:
        words.insert(2, "solid")
    if len(words) != 7 or words[0] != "a":
        raise ValueError(f"cannot read {part!r} in caption {text!r}; write 'a large red circle top left on white'")
    thing = Thing(words[1], words[2], words[3], words[4], " ".join(words[5:]))
    allowed = (tuple(SIZES), FILLS, tuple(COLOURS), SHAPES, PLACES)
    for word, options in zip((thing.size, thing.fill, thing.colour, thing.shape, thing.place), allowed, strict=True):
        if word not in options:
            raise ValueError(f"unknown word {word!r} in caption {text!r}, allowed: {', '.join(options)}")
    return thing


def vocabulary() -> tuple[str, ...]:
    """List every word of a caption, sorted."""
    words = {"a", "and", "on", *SIZES, *FILLS, *COLOURS, *SHAPES, *BACKGROUNDS}
    return tuple(sorted(words | {word for place in PLACES for word in place.split()}))


def is_drawn(thing: Thing) -> bool:
    """Whether scenes have such a thing: all but small hollow crosses and stars, which their outlines would fill."""
    return thing.size == "large" or thing.fill != "hollow" or thing.shape not in ("cross", "star")


def _random_thing(rng: np.random.Generator, place: str) -> Thing:
    options = (tuple(SIZES), FILLS, tuple(COLOURS), SHAPES)
    while True:
        size, fill, colour, shape = (words[rng.integers(len(words))] for words in options)
        thing = Thing(size, fill, colour, shape, place)
        if is_drawn(thing):
            return thing


def random_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene: one, two or three things in different places, in any order."""
    count = 1 + int(rng.choice(len(_COUNTS), p=_COUNTS))
    places = rng.permutation(len(PLACES))[:count]
    things = tuple(_random_thing(rng, PLACES[place]) for place in places)
    return Scene(things, tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))])


def is_heldout(scene: Scene) -> bool:
    """Whether a scene's colours, shapes and places are kept out of training: those of a sixth of all scenes are."""
    key = ",".join(sorted(f"{thing.colour} {thing.shape} {thing.place}" for thing in scene.things))
    return zlib.crc32(key.encode()) % _HELDOUT_SHARE == 0


def scenes(rng: np.random.Generator, heldout: bool) -> Iterator[Scene]:
    """Sample scenes without end, either held-out ones or the others."""
    while True:
        scene = random_scene(rng)
        if is_heldout(scene) == heldout:
            yield scene


def heldout_captions(n: int, seed: int = 0) -> list[str]:
    """Sample n different captions of scenes that the models were never trained on."""
    found: dict[str, None] = {}
    for scene in scenes(np.random.default_rng(seed), heldout=True):
        if len(found) == n:
            break
        found[caption(scene)] = None
    return list(found)


def _edge(u: Array, v: Array, radius: Array, angle: float) -> Array:
    """Measure the distance beyond a line at `radius` from the centre, whose normal is at `angle`."""
    return np.asarray(np.float32(np.cos(angle)) * u + np.float32(np.sin(angle)) * v - radius)


def _circle(u: Array, v: Array, r: Array) -> Array:
    return np.hypot(u, v) - r


def _square(u: Array, v: Array, r: Array) -> Array:
    return np.asarray(np.maximum(np.abs(u), np.abs(v)) - np.float32(0.86) * r)


def _triangle(u: Array, v: Array, r: Array) -> Array:
    inner = np.float32(0.575) * r
    sides = [_edge(u, v, inner, np.deg2rad(angle)) for angle in (90.0, 210.0, 330.0)]
    return np.asarray(np.maximum(np.maximum(sides[0], sides[1]), sides[2]))


def _cross(u: Array, v: Array, r: Array) -> Array:
    a, b, arm = np.abs(u), np.abs(v), np.float32(0.36) * r
    return np.asarray(np.minimum(np.maximum(a - r, b - arm), np.maximum(a - arm, b - r)))


def _star(u: Array, v: Array, r: Array) -> Array:
    """Fold the plane into one of ten wedges, and measure the distance from its line: tip at 1.12 r, notch at 0.52 r."""
    wedge = np.pi / 5
    angle = np.arctan2(u, -v)
    folded = np.abs((angle + wedge) % (2 * wedge) - wedge).astype(np.float32)
    rho = np.hypot(u, v)
    x, y = rho * np.cos(folded), rho * np.sin(folded)
    tip = 1.12
    notch = (0.52 * np.cos(wedge), 0.52 * np.sin(wedge))
    along = np.array([notch[0] - tip, notch[1]])
    normal = (np.array([along[1], -along[0]]) / np.hypot(*along)).astype(np.float32)
    return np.asarray(normal[0] * (x - np.float32(tip) * r) + normal[1] * y)


_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross, "star": _star}


def _grid(size: int) -> tuple[Array, Array]:
    """Make x and y of the pixel centres of a square window, 0 in its middle."""
    axis = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    return axis[None, None, :], axis[None, :, None]


def _fill(distance: Array, u: Array, v: Array, fill: str, phase: Array) -> Array:
    """Turn signed distances into coverage: solid, striped along the diagonal, or the outline alone."""
    inside = np.clip(0.5 - distance, 0, 1)
    if fill == "hollow":
        inside = inside * (1 - np.clip(0.5 - (distance + LINE_WIDTH), 0, 1))
    if fill == "striped":
        across = (u + v) * np.float32(np.sqrt(0.5)) / STRIPE_PERIOD + phase
        offset = np.abs(across % 1 - 0.5) * STRIPE_PERIOD
        inside = inside * (STRIPE_GAP + (1 - STRIPE_GAP) * np.clip(0.5 + STRIPE_PERIOD / 4 - offset, 0, 1))
    return np.asarray(inside, dtype=np.float32)


def coverage(shape: str, fill: str, centre: Array, radius: Array, tilt: Array, phase: Array, size: int = CELL) -> Array:
    """Draw n shapes of one kind, one per window: n x size x size in [0, 1].

    `centre` is n x 2 (x, y) in pixels from the middle of the window, `radius` in pixels, `tilt` in radians and `phase`
    in periods of the stripes.
    """
    x, y = _grid(size)
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    cos, sin = np.cos(tilt)[:, None, None], np.sin(tilt)[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance = _DISTANCE[shape](u, v, radius[:, None, None])
    return _fill(distance, u, v, fill, phase[:, None, None])


def _uniform(rng: np.random.Generator, low: float, high: float, shape: int | tuple[int, ...]) -> Array:
    return rng.uniform(low, high, shape).astype(np.float32)


def _backgrounds(names: Sequence[str], rng: np.random.Generator) -> Array:
    """Draw n x 64 x 64 x 3: the named grey, slightly tinted, with a gradient in any direction."""
    n = len(names)
    level = np.array([BACKGROUNDS[name] for name in names], dtype=np.float32)[:, None] + _uniform(
        rng, -0.03, 0.03, (n, 3)
    )
    slope = _uniform(rng, -0.05, 0.05, (n, 2)) / np.float32(IMAGE_SIZE / 2)
    x, y = _grid(IMAGE_SIZE)
    gradient = slope[:, 0, None, None] * x + slope[:, 1, None, None] * y
    return np.asarray(level[:, None, None, :] + gradient[..., None])


def _draw(shape: str, fill: str, things: Sequence[Thing], rng: np.random.Generator) -> Array:
    """Draw things of one shape and fill, each in a window of the size of a quarter."""
    n = len(things)
    ranges = np.array([SIZES[thing.size] for thing in things], dtype=np.float32)
    radius = ranges[:, 0] + _uniform(rng, 0, 1, n) * (ranges[:, 1] - ranges[:, 0])
    room = np.float32(CELL / 2 - 0.5) - np.float32(_EXTENT[shape]) * radius
    centre = _uniform(rng, -1, 1, (n, 2)) * np.maximum(room, 0)[:, None]
    return coverage(shape, fill, centre, radius, _uniform(rng, -TILT, TILT, n), _uniform(rng, 0, 1, n))


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> Array:
    """Render scenes to n x 64 x 64 x 3 in [0, 1]."""
    images = _backgrounds([scene.background for scene in scenes], rng)
    groups: dict[tuple[str, str], list[tuple[int, Thing]]] = {}
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            groups.setdefault((thing.shape, thing.fill), []).append((index, thing))
    for (shape, fill), members in groups.items():
        alphas = _draw(shape, fill, [thing for _, thing in members], rng)
        for (index, thing), alpha in zip(members, alphas, strict=True):
            colour = np.array(COLOURS[thing.colour], dtype=np.float32) + _uniform(rng, -0.03, 0.03, 3)
            rows, columns = quarter(thing.place)
            cell = images[index, rows, columns]
            cell += alpha[..., None] * (colour - cell)
    return np.clip(images, 0, 1)


def pixels(image: Any) -> Array:
    """Convert a PIL image or an array, of bytes or of floats in [0, 1], to 64 x 64 x 3 floats in [0, 1].

    Raises `ValueError` for another size.
    """
    array = np.asarray(image)
    if array.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"scenes are 64 x 64 x 3 images, not {' x '.join(map(str, array.shape))}")
    scale = 255 if array.dtype == np.uint8 else 1
    return np.asarray(array.astype(np.float32) / np.float32(scale))


def quarter(place: str) -> tuple[slice, slice]:
    """Find the rows and columns of a place's quarter of the image."""
    index = PLACES.index(place)
    row, column = divmod(index, 2)
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)


def render(scene: Scene, rng: np.random.Generator) -> Array:
    """Render one scene to 64 x 64 x 3 in [0, 1]."""
    return np.asarray(render_batch([scene], rng)[0])
