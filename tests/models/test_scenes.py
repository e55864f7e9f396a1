"""Captions, scenes, images and the checker agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cachekit.models.demo import scenes
from cachekit.models.demo.checker import read, shows

ASPECTS = {
    "size": (tuple(scenes.SIZES), "sizes"),
    "fill": (scenes.FILLS, "fills"),
    "colour": (tuple(scenes.COLOURS), "colours"),
    "shape": (scenes.SHAPES, "shapes"),
}


def _drawn(n: int, seed: int) -> tuple[list[scenes.Scene], np.ndarray]:
    rng = np.random.default_rng(seed)
    chosen = [scenes.random_scene(rng) for _ in range(n)]
    return chosen, scenes.render_batch(chosen, rng)


def test_true_images_pass() -> None:
    chosen, images = _drawn(120, 0)
    failed = [scenes.caption(s) for s, image in zip(chosen, images, strict=True) if not shows(image, scenes.caption(s))]
    assert failed == []


def test_shuffled_captions_fail() -> None:
    chosen, images = _drawn(60, 1)
    passed = [bool(shows(image, scenes.caption(s))) for s, image in zip(chosen[1:], images[:-1], strict=True)]
    assert sum(passed) == 0


@pytest.mark.parametrize("aspect", sorted(ASPECTS))
def test_each_wrong_word_fails(aspect: str) -> None:
    options, flag = ASPECTS[aspect]
    chosen, images = _drawn(12, 2)
    for scene, image in zip(chosen, images, strict=True):
        first, *rest = scene.things
        for word in set(options) - {getattr(first, aspect)}:
            wrong = replace(scene, things=(replace(first, **{aspect: word}), *rest))
            verdict = shows(image, scenes.caption(wrong))
            assert not verdict
            assert [name for name, value in vars(verdict).items() if not value] == [flag]


def test_wrong_place_fails() -> None:
    chosen, images = _drawn(30, 3)
    for scene, image in zip(chosen, images, strict=True):
        free = set(scenes.PLACES) - {thing.place for thing in scene.things}
        moved = replace(scene.things[0], place=sorted(free)[0])
        assert not shows(image, scenes.caption(replace(scene, things=(moved, *scene.things[1:])))).places


def test_a_thing_too_many_or_too_few_fails() -> None:
    chosen, images = _drawn(40, 4)
    for scene, image in zip(chosen, images, strict=True):
        if len(scene.things) > 1:
            assert not shows(image, scenes.caption(replace(scene, things=scene.things[1:]))).places


def test_wrong_background_fails() -> None:
    chosen, images = _drawn(20, 5)
    for scene, image in zip(chosen, images, strict=True):
        for name in set(scenes.BACKGROUNDS) - {scene.background}:
            assert not shows(image, scenes.caption(replace(scene, background=name))).background


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_nothing_is_read_from_a_plain_image(level: float) -> None:
    _, found = read(np.full((64, 64, 3), level, dtype=np.float32))
    assert found == {}


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(6).uniform(0, 1, (64, 64, 3)).astype(np.float32)
    assert not shows(noise, scenes.heldout_captions(1)[0])


def test_blurred_outlines_fail() -> None:
    chosen, images = _drawn(40, 7)
    fine = [index for index, scene in enumerate(chosen) if any(thing.fill == "hollow" for thing in scene.things)]
    moved = [np.roll(images[fine], (dy, dx), (1, 2)) for dy in range(-2, 3) for dx in range(-2, 3)]
    captions = [scenes.caption(chosen[index]) for index in fine]
    passed = [bool(shows(image, text)) for text, image in zip(captions, np.mean(moved, axis=0), strict=True)]
    assert len(fine) > 15
    assert sum(passed) <= len(fine) / 5


def test_bytes_and_floats_read_the_same() -> None:
    chosen, images = _drawn(10, 8)
    for scene, image in zip(chosen, images, strict=True):
        assert shows((image * 255 + 0.5).astype(np.uint8), scenes.caption(scene))


def test_the_checker_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="64 x 64 x 3"):
        read(np.zeros((32, 32, 3)))


def test_parse_undoes_caption() -> None:
    rng = np.random.default_rng(9)
    for _ in range(300):
        scene = scenes.random_scene(rng)
        assert scenes.parse(scenes.caption(scene)) == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a small red circle top left on pink",
        "a small red circle on white",
        "a small red pentagon top left on white",
        "a small pink circle top left on white",
        "the small red circle top left on white",
        "a small red circle top left and a large blue star top left on white",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        scenes.parse(text)


def test_rendering_is_repeatable() -> None:
    scene = scenes.parse(scenes.heldout_captions(1)[0])
    first, again, other = (scenes.render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (64, 64, 3)
    assert first.min() >= 0
    assert first.max() <= 1


def test_heldout_captions_are_different_and_repeatable() -> None:
    captions = scenes.heldout_captions(300, seed=4)
    assert len(set(captions)) == 300
    assert captions[:50] == scenes.heldout_captions(50, seed=4)
    assert captions != scenes.heldout_captions(300, seed=5)
    assert all(scenes.is_heldout(scenes.parse(text)) for text in captions)


def test_held_out_whatever_the_order_size_fill_and_background() -> None:
    rng = np.random.default_rng(10)
    for _ in range(100):
        scene = scenes.random_scene(rng)
        things = tuple(replace(thing, size="small", fill="hollow") for thing in reversed(scene.things))
        assert scenes.is_heldout(scene) == scenes.is_heldout(scenes.Scene(things, "black"))


def test_scenes_have_no_small_hollow_crosses_and_stars() -> None:
    rng = np.random.default_rng(12)
    things = [thing for _ in range(500) for thing in scenes.random_scene(rng).things]
    assert all(map(scenes.is_drawn, things))
    drawn = {(thing.size, thing.fill, thing.shape) for thing in things}
    assert len(drawn) == len(scenes.SIZES) * len(scenes.FILLS) * len(scenes.SHAPES) - 2


def test_a_sixth_is_held_out() -> None:
    rng = np.random.default_rng(11)
    share = np.mean([scenes.is_heldout(scenes.random_scene(rng)) for _ in range(3000)])
    assert 0.13 < share < 0.21
