"""The Frechet distance between sets of images, and the classifier whose features it compares."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

import cachekit
from cachekit.models.demo import DEMO_GUIDANCE, classifier, demo_pipeline, features, heldout_captions, scenes
from cachekit.models.demo.pipeline import WEIGHTS, WeightsError
from cachekit.tools.bench.frechet import distance, gaussian_stats, is_enough, rendered

FOLDER = WEIGHTS / "classifier"
N = 64


def draw(captions, seed):
    chosen = [scenes.parse(text) for text in captions]
    return scenes.render_batch(chosen, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def captions():
    return tuple(heldout_captions(N, seed=3))


@pytest.fixture(scope="module")
def images(captions):
    return draw(captions, 1)


@pytest.fixture(scope="module")
def apart(captions):
    """Distance of images to rendered scenes of the same captions."""
    return lambda images: distance(gaussian_stats(features(images)), rendered(captions))


# -- the distance -----------------------------------------------------------------------------------------


def test_it_is_zero_to_itself_and_the_same_both_ways(images):
    one, other = gaussian_stats(features(images)), gaussian_stats(features(images[::-1] ** 2))
    assert distance(one, one) == pytest.approx(0, abs=1e-9)
    assert distance(one, other) == pytest.approx(distance(other, one), rel=1e-9)


def test_it_is_the_published_formula():
    rng = np.random.default_rng(0)
    one, other = (gaussian_stats(rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)) + shift) for shift in (0.0, 1.0))
    c, d = np.array(one.covariance), np.array(other.covariance)
    wanted = np.sum(np.subtract(one.mean, other.mean) ** 2) + np.trace(c + d - 2 * linalg.sqrtm(c @ d).real)
    assert distance(one, other) == pytest.approx(wanted, rel=1e-9)


def test_normal_distributions_of_one_dimension_have_a_closed_form():
    values = np.random.default_rng(1).normal(size=(200, 1))
    one, other = (
        gaussian_stats(np.hstack([values, 0 * values])),
        gaussian_stats(np.hstack([3 * values + 2, 0 * values])),
    )
    spread = values.std(ddof=1)
    shift = 3 * values.mean() + 2 - values.mean()
    assert distance(one, other) == pytest.approx(shift**2 + (2 * spread) ** 2, rel=1e-9)


def test_images_that_are_all_the_same_have_a_distance(images, apart):
    assert np.isfinite(apart(np.repeat(images[:1], 40, 0)))


def test_few_images_are_too_few():
    assert not is_enough(31, classifier.FEATURES)
    assert is_enough(32, classifier.FEATURES)


# -- what it measures -------------------------------------------------------------------------------------


def test_it_grows_with_noise(images, apart):
    noise = np.random.default_rng(3).normal(size=images.shape)
    found = [apart(np.clip(images + level * noise, 0, 1)) for level in (0.0, 0.1, 0.2, 0.4)]
    assert found == sorted(found)
    assert found[2] > 4 * found[0]


def test_it_grows_with_blur(images, apart):
    found = [apart(ndimage.gaussian_filter(images, (0, width, width, 0))) for width in (0.0, 1.4, 2.8)]
    assert found == sorted(found)
    assert found[1] > 2 * found[0]


def test_it_grows_with_the_share_of_wrong_scenes(captions, images, apart):
    other = [text.replace("hollow", "striped").replace("star", "circle") for text in captions]
    wrong = draw(other, 4)
    found = [apart(np.concatenate([wrong[:count], images[count:]])) for count in (0, N // 2, N)]
    assert found == sorted(found)
    assert found[-1] > 4 * found[0]


def test_a_cache_that_loses_the_text_is_further_away_than_the_plain_pipeline():
    captions = tuple(heldout_captions(32, seed=5))
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def drawn():
        generators = [torch.Generator().manual_seed(index) for index in range(len(captions))]
        settings = {"num_inference_steps": 6, "guidance_scale": DEMO_GUIDANCE, "output_type": "np"}
        return pipe(list(captions), generator=generators, **settings).images

    plain = distance(gaussian_stats(features(drawn())), rendered(captions))
    with cachekit.apply(pipe, "tgate:m=1"):
        cached = distance(gaussian_stats(features(drawn())), rendered(captions))
    assert cached > 2 * plain


# -- the classifier ---------------------------------------------------------------------------------------


def test_it_names_most_things(captions, images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    scores = classifier.load_classifier()(pixels)
    right = []
    for index, text in enumerate(captions):
        for thing in scenes.parse(text).things:
            row, column = divmod(scenes.PLACES.index(thing.place), 2)
            found = scores["shape"][index, :, row, column].argmax()
            right.append(scenes.SHAPES[found] == thing.shape)
    assert np.mean(right) > 0.8


def test_features_do_not_depend_on_the_kind_of_image_or_the_batch(images):
    together = features(images[:3])
    bytes_ = (images[:3] * 255 + 0.5).astype(np.uint8)
    assert together.shape == (3, classifier.FEATURES)
    assert together.dtype == np.float64
    np.testing.assert_allclose(features(images[1:2])[0], together[1], atol=1e-5)
    np.testing.assert_allclose(features(bytes_), together, atol=0.1)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="64 x 64 x 3 images, not 32 x 32 x 3"):
        features(np.zeros((1, 32, 32, 3)))


def test_it_is_small_and_checked(tmp_path, monkeypatch):
    assert (FOLDER / "model.safetensors").stat().st_size < 1e6
    copy = shutil.copytree(FOLDER, tmp_path / "classifier")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(classifier, "WEIGHTS", tmp_path)
    with pytest.raises(WeightsError, match=r"model\.safetensors has the wrong SHA-256"):
        classifier.load_classifier.__wrapped__()
