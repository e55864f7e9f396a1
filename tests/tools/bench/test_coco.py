"""`cachekit bench coco`: images as files, resumed, and scored as a whole against rendered scenes."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from support import commands, networks

import cachekit
from cachekit.models.demo import DEMO_GUIDANCE, demo_pipeline, heldout_captions, scenes
from cachekit.tools.bench.captions import read_captions
from cachekit.tools.bench.frechet import distance, gaussian_stats
from cachekit.tools.bench.learned import pixels

CAPTIONS = heldout_captions(6, seed=11)
STEPS = 3
SPEC = "tgate:m=2"

run, printed = (functools.partial(command, "bench", "coco") for command in (commands.run, commands.printed))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Make a folder with captions, a rendered scene for each, and networks with random weights."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    (folder / "true").mkdir()
    rng = np.random.default_rng(0)
    for place, text in enumerate(CAPTIONS):
        image = Image.fromarray((scenes.render(scenes.parse(text), rng) * 255).astype(np.uint8))
        # True images come in all sizes.
        image.resize((64 + 8 * place, 64)).save(folder / "true" / f"{place:02}.png")
    networks.features(folder / "features.pt")
    networks.clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def given(data):
    """List all arguments but the folder of the images."""
    metrics = ["--metric", f"fid={data / 'features.pt'}", "--metric", f"clip={data / 'clip'}"]
    texts = ["--captions", data / "captions.txt", "--references", data / "true"]
    return ["demo", *texts, *metrics, "--spec", SPEC, "--steps", STEPS, "--seed", 7, "--threads", 1]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """Make the folder of one whole run."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    printed(*given, "--images", folder)
    return folder


def scored(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def files(folder, kind):
    (found,) = folder.glob(f"{kind}-*/")
    return sorted(found.glob("*.png"))


def colours(file):
    return np.asarray(Image.open(file).convert("RGB"))


# -- images -----------------------------------------------------------------------------------------------


def test_each_caption_has_the_image_that_the_pipeline_draws(whole):
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for kind, specs in (("3-plain-steps", []), ("tgate", [SPEC])):
        drawn = files(whole, kind)
        assert len(drawn) == len(CAPTIONS)
        with cachekit.apply(pipe, specs):
            for place in (0, 5):
                generator = torch.Generator().manual_seed(7 + place)
                call = {"num_inference_steps": STEPS, "guidance_scale": DEMO_GUIDANCE, "generator": generator}
                assert np.array_equal(colours(drawn[place]), np.asarray(pipe(CAPTIONS[place], **call).images[0]))
    assert not np.array_equal(colours(files(whole, "3-plain-steps")[0]), colours(files(whole, "tgate")[0]))


def test_an_image_says_what_it_is_and_what_it_cost(whole):
    told = json.loads(Image.open(files(whole, "tgate")[2]).info["cachekit"])
    assert (told["caption"], told["seed"], told["specs"]) == (CAPTIONS[2], 9, [SPEC])
    plain, cached = scored(whole)
    assert told["macs"] == cached["macs"] < plain["macs"]
    assert told["seconds"] > 0


def test_an_interrupted_run_draws_only_what_is_missing(whole, given, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "images")
    drawn = files(folder, "tgate")
    before = colours(drawn[3])
    drawn[3].unlink()
    drawn[4].replace(drawn[4].with_suffix(".part"))
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")}
    printed(*given, "--images", folder)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert files(folder, "tgate") == drawn
    assert np.array_equal(colours(drawn[3]), before)
    assert scored(folder)[-1]["scores"] == scored(whole)[-1]["scores"]


def test_a_second_run_draws_and_adds_nothing(whole, given):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*.png")}
    printed(*given, "--images", whole)
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*.png")} == before
    assert len(scored(whole)) == 2


def test_a_damaged_image_is_named_and_the_others_stay(whole, given, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "images")
    before = {file: file.read_bytes() for file in folder.rglob("*.*")}
    drawn = files(folder, "tgate")
    bare = Image.open(drawn[1]).copy()
    for damage, said in (
        (lambda: drawn[1].write_bytes(b"x"), "cannot read image"),
        (lambda: bare.save(drawn[1]), "does not hold its costs"),
    ):
        damage()
        result = run(*given, "--images", folder)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert said in result.stderr
        assert str(drawn[1]) in result.stderr
    assert {file: file.read_bytes() for file in before if file != drawn[1]} == {
        file: data for file, data in before.items() if file != drawn[1]
    }


# -- scores -----------------------------------------------------------------------------------------------


def features(data, paths):
    network = networks.features(data / "again.pt")
    with torch.no_grad():
        return np.concatenate([network(pixels(Image.open(path), "cpu"), True).double().numpy() for path in paths])


def frechet(one, other):
    c, d = (np.cov(values, rowvar=False) for values in (one, other))
    root = linalg.sqrtm(c @ d).real
    return np.sum((one.mean(0) - other.mean(0)) ** 2) + np.trace(c + d - 2 * root)


def test_the_fid_is_the_published_formula_over_the_networks_features(whole, data):
    true = features(data, sorted((data / "true").iterdir()))
    for kind, found in zip(("3-plain-steps", "tgate"), scored(whole)):
        drawn = features(data, files(whole, kind))
        assert found["scores"]["fid"] == pytest.approx(frechet(drawn, true), rel=1e-3)
        assert found["scores"]["fid"] == pytest.approx(distance(gaussian_stats(drawn), gaussian_stats(true)), rel=1e-3)
    assert scored(whole)[0]["scores"] != scored(whole)[1]["scores"]


def test_the_clip_score_is_the_mean_over_images_with_their_own_captions(whole, data):
    model, processor = networks.clip(data / "clip-again")
    for kind, found in zip(("3-plain-steps", "tgate"), scored(whole)):
        values = []
        for file, text in zip(files(whole, kind), CAPTIONS):
            given = processor(text=[text], images=[Image.open(file)], return_tensors="pt")
            image, words = (
                model.get_image_features(given["pixel_values"]).pooler_output,
                model.get_text_features(given["input_ids"], given["attention_mask"]).pooler_output,
            )
            values.append(max(100 * float(torch.cosine_similarity(image, words).detach()), 0))
        assert found["scores"]["clip"] == pytest.approx(np.mean(values), rel=1e-4)
        assert found["scores"]["clip"] > 0


def test_the_table_has_the_scores(whole, given):
    result = run(*given, "--images", whole)
    for found in scored(whole):
        for value in found["scores"].values():
            assert f"{value:.3f}" in result.stdout
    assert "3 plain steps" in result.stdout
    assert "warning" not in result.stderr


def test_true_images_are_nearer_to_themselves_than_drawn_ones(whole, data):
    from cachekit.tools.bench.cells import Setting
    from cachekit.tools.bench.coco import SCORES, Coco

    captions = read_captions(str(data / "captions.txt"))
    references = captions.references(data / "true")
    coco = Coco(Setting(model="demo", captions=captions.texts), captions, [], whole, references)
    fid, _ = SCORES["fid"](str(data / "features.pt"), "cpu", coco)
    assert fid(references, CAPTIONS) == pytest.approx(0, abs=1e-5)
    assert fid(files(whole, "tgate"), CAPTIONS) > 1e-3


# -- captions ---------------------------------------------------------------------------------------------


@pytest.fixture
def annotations(data, tmp_path):
    """Write captions as MS-COCO does: several for an image, in no order."""
    images = [{"id": 100 - place, "file_name": f"{place:02}.png"} for place in range(6)]
    rows = [{"id": 50 + place, "image_id": 100 - place, "caption": CAPTIONS[place] + "\n"} for place in range(6)]
    rows.insert(0, {"id": 99, "image_id": 100, "caption": "a later one"})
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": rows}))
    return file


def test_annotations_give_the_first_caption_and_the_name_of_each_image(annotations, data):
    found = read_captions(str(annotations), 4)
    assert found.texts == tuple(reversed(CAPTIONS))[:4]
    assert [path.name for path in found.references(data / "true")] == ["05.png", "04.png", "03.png", "02.png"]


def test_annotations_and_a_limit_draw_only_so_many(annotations, data, tmp_path):
    result = run(
        *("demo", "--captions", annotations, "--limit", 3, "--references", data / "true"),
        *("--metric", f"fid={data / 'features.pt'}", "--steps", 1, "--images", tmp_path / "images"),
    )
    assert result.exit_code == 0, result.output
    assert "warning: fid of 3 images over 5 features" in result.stderr
    assert len(files(tmp_path / "images", "1-plain-step")) == 3


def test_a_file_of_lines_is_cut_at_the_ends_of_lines_only(tmp_path):
    (tmp_path / "c.txt").write_text("one\u2028two\n\n  three \n", encoding="utf-8")
    assert read_captions(str(tmp_path / "c.txt")).texts == ("one\u2028two", "three")


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def wrong(data, annotations, tmp_path):
    """Make a folder with what cannot be used."""
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    shutil.copytree(data / "true", tmp_path / "damaged")
    (tmp_path / "damaged" / "02.png").write_bytes(b"\x89PNG")
    (tmp_path / "bare.json").write_text('{"images": []}')
    (tmp_path / "none.json").write_text('{"images": [], "annotations": []}')
    return tmp_path


REFERENCES = ["--references", "{data}/true"]
FID = ["--metric", "fid={data}/features.pt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", *REFERENCES, "--metric", "fdi=x"], "unknown metric 'fdi' (did you mean 'fid'?)"),
        (["demo", *REFERENCES, "--metric", "lpips=x"], "unknown metric 'lpips'"),
        (["demo", *REFERENCES, "--metric", "fid=no/such.pt"], "fid=PATH"),
        (["demo", *REFERENCES, "--metric", "fid={wrong}/notes.txt"], "cannot read it as a TorchScript network"),
        (["demo", "--metric", "clip={wrong}/empty"], "cannot read it as the folder of a CLIP model"),
        (["demo", *REFERENCES], "needs a metric"),
        (["demo", *FID], "--references FOLDER"),
        (["demo", *FID, "--references", "{wrong}/nowhere"], "there is no such folder"),
        (["demo", *FID, "--references", "{wrong}/empty"], "6 captions in"),
        (["demo", *FID, *REFERENCES, "--limit", "5"], "5 captions in"),
        (["demo", *FID, "--references", "{wrong}/damaged"], "02.png': "),
        (["demo", *FID, "--references", "{wrong}/empty", "--captions", "{wrong}/captions.json"], "lack '05.png'"),
        (["demo", *FID, *REFERENCES, "--captions", "{wrong}/bare.json"], "not annotations of MS-COCO"),
        (
            ["demo", *FID, *REFERENCES, "--captions", "{wrong}/none.json"],
            "the file has no captions; write one on each line",
        ),
        (["demo", *FID, *REFERENCES, "--captions", "{wrong}/captions.json", "--limit", "1"], "at least 2 captions"),
        (["sd15", *FID, *REFERENCES], "sd15 is an architecture, which has no weights"),
        (["./no-such-folder", *FID, *REFERENCES], "there is no such folder"),
        (["demo", *FID, *REFERENCES, "--scheduler", "DDIN"], "unknown scheduler 'DDIN'"),
        (["demo", *FID, *REFERENCES, "--spec", "deepcache:branch=99"], "99"),
        (["demo", *FID, *REFERENCES, "--images", "{wrong}/notes.txt"], "cannot write images"),
    ],
)
def test_a_refusal_is_one_line_and_draws_nothing(arguments, said, data, wrong):
    images = wrong / "images"
    named = [text.format(data=data, wrong=wrong) for text in arguments]
    result = run("--captions", data / "captions.txt", "--images", images, *named)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not list(wrong.rglob("images/**/*.png"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["coco", "demo", "--html", "r.html"], "No such option: --html"),
        (["grid", "demo", "--references", "x"], "No such option: --references"),
        (["paper", "--spec", "tgate"], "No such option: --spec"),
        (["coco", *FID], "Missing argument 'models"),
        (["papr"], "No such command 'papr'"),
    ],
)
def test_commands_and_their_options_are_known(arguments, said):
    result = commands.run("bench", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
