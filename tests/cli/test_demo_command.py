"""`cachekit demo` on the embedded model: one table, the same as files, and a picture."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import cachekit
from cachekit.cli import app
from cachekit.cli.demo import CALIBRATED, SPECS
from cachekit.models.demo import heldout_captions

EXTRA = "tgate:m=2+deepcache:interval=2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the command once, briefly; return what it printed and its folder."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    options = ["--captions", "2", "--steps", "12", "--seed", "3", "--spec", EXTRA, "--output", str(folder)]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 0, result.output
    return result.stdout, folder


@pytest.fixture(scope="module")
def data(run):
    return json.loads((run[1] / "table.json").read_text())


@pytest.fixture(scope="module")
def cached(data):
    return [row for row in data["rows"] if row["specs"]]


@pytest.fixture(scope="module")
def plain(data):
    return [row for row in data["rows"][1:] if not row["specs"]]


def test_it_measures_uncached_each_policy_a_composition_and_fewer_steps(data, cached, plain):
    specs = ["+".join(row["specs"]) for row in cached]
    assert [spec for spec in specs if spec not in CALIBRATED] == [*SPECS, EXTRA]
    assert any("+" in spec for spec in SPECS)
    assert data["rows"][0]["specs"] == []
    assert {row["steps"] for row in (data["rows"][0], *cached)} == {12}
    assert data["scheduler"] == "DPMSolverMultistepScheduler"
    assert {row["spacing"] for row in plain} >= {"", "lu_lambdas", "karras", "full_steps:forecast:interval=2"}


def test_the_policy_that_needs_a_calibration_is_there_or_its_absence_is_explained(run, cached):
    listed = ["+".join(row["specs"]) for row in cached]
    for spec in CALIBRATED if "calibrated" in cachekit.policies() else ():
        assert spec in listed or f"{spec} is left out: " in run[0]


def test_it_draws_the_held_out_captions(data):
    assert data["prompts"] == heldout_captions(2, 3)
    assert all(len(row["images"]) == 2 for row in data["rows"])


def test_caching_saves_multiply_accumulates_and_changes_the_image(data, cached, plain):
    uncached = data["rows"][0]
    assert all(row["macs"] < uncached["macs"] for row in cached)
    assert all(row["psnr"] is not None and row["ssim"] < 1 for row in cached)
    for row in cached:
        fewer = min(plain, key=lambda other: abs(other["macs"] - row["macs"]))
        assert abs(fewer["macs"] - row["macs"]) <= uncached["macs"] / 24
        assert fewer["macs"] == uncached["macs"] * fewer["steps"] // 12


def test_it_prints_the_table_that_it_writes(run):
    stdout, folder = run
    for line in (folder / "table.md").read_text().splitlines()[2 : 4 + len(SPECS)]:
        for word in line.strip("| ").replace(" | ", " ").split():
            assert word in stdout
    for name in ("pictures.png", "table.md", "table.json"):
        assert f"wrote {folder / name}\n" in stdout


def test_the_picture_can_be_opened(run):
    with Image.open(run[1] / "pictures.png") as picture:
        assert picture.width > 7 * 128
        assert picture.height > 2 * 128


def test_it_says_on_what_it_measured(data):
    assert data["threads"] >= 1
    assert set(data["versions"]) == {"python", "torch", "diffusers"}


def test_a_bad_spec_is_refused_before_anything_is_drawn(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--spec", "deepcache:branch=99", "--output", str(tmp_path / "out")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has branches 0.." in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_scheduler_that_the_model_does_not_take_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--scheduler", "EulerDiscret", "--output", str(tmp_path / "out")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "did you mean 'EulerDiscreteScheduler'" in result.stderr


def test_generate_draws_with_the_embedded_model(tmp_path):
    path = tmp_path / "one.png"
    options = ["--spec", "tgate:m=2", "--spec", "deepcache", "--steps", "5", "--output", str(path)]
    result = CliRunner().invoke(app, ["generate", "demo", heldout_captions(1)[0], *options])
    assert result.exit_code == 0, result.output
    assert "steps 5, denoiser calls 5, guided" in result.stdout
    assert "tgate:m=2 cross_attention x 7" in result.stdout
    with Image.open(path) as image:
        assert image.size == (64, 64)
