"""LPIPS, CLIP score and networks of features from files, with random weights, beside computations of their own."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import commands, networks, tiny
from torchmetrics.functional.image import lpips as reference_lpips
from torchmetrics.functional.multimodal import clip_score as reference_clip_score

from cachekit.models.demo import heldout_captions, scenes
from cachekit.tools.bench import learned
from cachekit.tools.bench.cells import BenchError

CAPTIONS = heldout_captions(2, seed=5)


def picture(index=0):
    rendered = scenes.render(scenes.parse(CAPTIONS[index]), np.random.default_rng(index))
    return Image.fromarray((rendered * 255).astype(np.uint8))


def noisy(image, level):
    noise = np.random.default_rng(9).normal(0, level, (*image.size, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def alexnet(folder):
    return networks.alexnet(folder / "alexnet.pth")


@pytest.fixture(scope="module")
def lpips(folder, alexnet):
    return learned.lpips(str(folder / "alexnet.pth"), "cpu")


@pytest.fixture(scope="module")
def clip(folder):
    return networks.clip(folder / "clip")


# -- LPIPS ------------------------------------------------------------------------------------------------


def test_lpips_is_zero_to_itself_and_the_same_both_ways(lpips):
    one, other = picture(0), picture(1)
    assert lpips(one, one) == 0
    assert lpips(one, other) == pytest.approx(lpips(other, one), rel=1e-6)
    assert lpips(one, other) > 0


def test_lpips_grows_with_distortion(lpips):
    found = [lpips(noisy(picture(), level), picture()) for level in (0, 5, 20, 60)]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] > 2 * found[1] > 0


def test_lpips_is_that_of_torchmetrics(lpips, alexnet, monkeypatch):
    layers = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 64, 11, 4, 2), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2)),
        *(torch.nn.Conv2d(64, 192, 5, padding=2), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2)),
        *(torch.nn.Conv2d(192, 384, 3, padding=1), torch.nn.ReLU()),
        *(torch.nn.Conv2d(384, 256, 3, padding=1), torch.nn.ReLU()),
        *(torch.nn.Conv2d(256, 256, 3, padding=1), torch.nn.ReLU()),
    )
    layers.load_state_dict({name[9:]: value for name, value in alexnet.items() if name.startswith("features.")})
    # There the structure comes with torchvision, which is a package of its own.
    monkeypatch.setattr(reference_lpips, "_get_tv_model_features", lambda *_: layers)
    net = reference_lpips._LPIPS(net="alex", pnet_rand=True)
    one, other = (learned.pixels(picture(index), "cpu") / 127.5 - 1 for index in (0, 1))
    assert lpips(picture(0), picture(1)) == pytest.approx(float(net(one, other)), rel=1e-4)


# -- CLIP score -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
def test_the_clip_score_is_a_hundred_times_the_cosine(clip, folder):
    judge = learned.clip_score(str(folder / "clip"), "cpu")
    model, processor = clip

    # transformers 5 wraps what torchmetrics expects bare.
    def unwrapped(output):
        return getattr(output, "pooler_output", output)

    bare = SimpleNamespace(
        config=model.config,
        to=lambda device: bare,
        get_image_features=lambda values: unwrapped(model.get_image_features(values)),
        get_text_features=lambda ids, mask: unwrapped(model.get_text_features(ids, mask)),
    )
    pairs = [(picture(place), text) for place in (0, 1) for text in CAPTIONS]
    found = [judge(image, text) for image, text in pairs]
    with torch.no_grad():
        wanted = [
            float(reference_clip_score(learned.pixels(image, "cpu")[0], text, lambda: (bare, processor)))
            for image, text in pairs
        ]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert len({round(value, 3) for value in found} - {0}) > 1


def test_a_caption_that_is_too_long_is_cut(clip, folder):
    judge = learned.clip_score(str(folder / "clip"), "cpu")
    assert 0 <= judge(picture(), " and ".join(CAPTIONS * 9)) <= 100


# -- features ---------------------------------------------------------------------------------------------


def test_features_are_asked_for_and_not_the_classes(folder):
    network = networks.features(folder / "features.pt")
    found = learned.Features(str(folder / "features.pt"), "cpu")
    image = learned.pixels(picture(), "cpu")
    assert found.num_features == networks.FEATURES
    assert torch.equal(found(image), network(image, return_features=True))


# -- in a grid --------------------------------------------------------------------------------------------


def test_a_grid_reports_both_for_the_contender_and_the_uncached_image(folder, alexnet, clip, tmp_path):
    file = tmp_path / "r.jsonl"
    tiny.small(layers_per_block=1).save_pretrained(tmp_path / "model")
    metrics = ["--metric", f"lpips={folder / 'alexnet.pth'}", "--metric", f"clip={folder / 'clip'}"]
    given = ["--spec", "tgate:m=2", "--steps", 4, "--captions", 1, "--no-peers", "--threads", 1]
    text = commands.printed("bench", "grid", tmp_path / "model", *given, *metrics, "--output", file)
    assert "lpips" in text
    (sample,) = json.loads(file.read_text().splitlines()[0])["samples"]
    assert sample["uncached_metrics"]["lpips"] == 0
    assert sample["metrics"]["lpips"] > 0
    assert all(math.isfinite(sample[name]["clip"]) for name in ("metrics", "uncached_metrics"))


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_file_that_holds_something_else_is_named(folder, alexnet, clip, tmp_path):
    notes, empty = tmp_path / "notes.txt", tmp_path / "empty"
    notes.write_text("not weights")
    empty.mkdir()
    wrong = tmp_path / "wrong.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, wrong)
    scriptless = tmp_path / "nine.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Flatten(0), torch.zeros(1, 3)), str(scriptless))
    for load, path in (
        *((learned.lpips, path) for path in (notes, empty, wrong)),
        *((learned.clip_score, path) for path in (notes, empty)),
        *((learned.Features, path) for path in (notes, empty, folder / "alexnet.pth", scriptless)),
    ):
        with pytest.raises(BenchError, match=r"^metric \w+=.*: cannot read it as ") as caught:
            load(str(path), "cpu")
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_clip_model_without_all_its_weights_is_refused(folder, clip, tmp_path):
    broken = shutil.copytree(folder / "clip", tmp_path / "clip")
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(BenchError, match="weights are missing"):
        learned.clip_score(str(broken), "cpu")
