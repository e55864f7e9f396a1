"""`cachekit generate --prompts`: what is drawn, kept, resumed, scored, and lost when a worker dies: nothing."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from support import commands, deadly, networks
from support.actors import kill_an_actor

import cachekit
from cachekit.models.demo import demo_pipeline, heldout_captions
from cachekit.tools.batch import running
from cachekit.tools.batch.drawing import Drawing, Job
from cachekit.tools.batch.manifest import Folder
from cachekit.tools.batch.rows import BatchError, Defaults, read_rows, tasks_of
from cachekit.tools.bench.learned import clip_score
from cachekit.tools.workers import Lost, share_out

PROMPTS = heldout_captions(4, seed=3)
ROWS = [
    {"prompt": PROMPTS[0], "seed": 7},
    {"prompt": PROMPTS[1], "spec": "tgate:m=1+deepcache:interval=2", "steps": 3, "guidance": 2},
    {"prompt": PROMPTS[2], "size": "17x17"},
    {"prompt": PROMPTS[3], "spec": []},
    {"prompt": PROMPTS[0], "seed": 7},
    {"prompt": PROMPTS[0], "sede": 7},
]
SPEC = "forecast:interval=2"
JOB = Job("demo", device="cpu", threads=1)


def generate(file, folder, *more):
    given = ("--steps", 2, "--spec", SPEC, "--device", "cpu", "--threads", 1)
    return commands.run("generate", "demo", "--prompts", file, "--output", folder, *given, *more)


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def images(folder):
    return sorted(folder.glob("*.png"))


def colours(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return file


@pytest.fixture(scope="module")
def drawn(rows, tmp_path_factory):
    """Draw all rows that can be drawn; the result of the command and its folder."""
    folder = tmp_path_factory.mktemp("drawn") / "images"
    return generate(rows, folder), folder


@pytest.fixture
def tasks(tmp_path):
    file = tmp_path / "four.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return tasks_of(read_rows(str(file)), Defaults(steps=2), JOB.identity)[0]


# -- images and the manifest ---------------------------------------------------------------------------------


def test_each_row_is_drawn_as_python_draws_it_and_a_broken_one_ends_nothing(drawn):
    result, folder = drawn
    assert result.exit_code == 1
    assert "rows.jsonl:6: unknown key 'sede' (did you mean 'seed'?); allowed: prompt, seed," in result.stderr
    assert "line 3: StableDiffusionPipeline refuses its arguments: " in result.stderr
    assert "3 drawn in " in result.stdout
    assert "3 of 4 images in" in result.stdout
    assert "rows: 1 failed, 1 not read" in result.stdout
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    expected = [(0, 7, SPEC, {"num_inference_steps": 2}), (3, 3, [], {"num_inference_steps": 2})]
    expected += [(1, 1, ["tgate:m=1", "deepcache:interval=2"], {"num_inference_steps": 3, "guidance_scale": 2.0})]
    for number, seed, specs, given in expected:
        (file,) = folder.glob(f"{number:06}-*.png")
        with cachekit.apply(pipe, specs):
            image = pipe(ROWS[number]["prompt"], generator=torch.Generator().manual_seed(seed), **given).images[0]
        assert np.array_equal(colours(file), np.asarray(image))


def test_images_and_manifest_say_what_they_are_of(drawn):
    _, folder = drawn
    lines = {line["line"]: line for line in manifest(folder)}
    assert sorted(lines) == [1, 2, 3, 4]
    assert lines[3]["file"] is None
    assert "divisible by 8" in lines[3]["error"]
    for line in (lines[1], lines[2], lines[4]):
        info = json.loads(Image.open(folder / line["file"]).info["cachekit"])
        assert info == {key: line[key] for key in info}
        assert info["prompt"] == ROWS[line["line"] - 1]["prompt"]
        assert {"cachekit", "torch", "diffusers"} <= set(info["versions"])
        assert info["seconds"] > 0
        assert info["macs"] > 0
    assert lines[2]["specs"] == ["deepcache:interval=2", "tgate:m=1"]
    assert lines[2]["report"]["calls"] == 3
    assert lines[2]["report"]["counts"][0]["reused"] > 0
    assert lines[4]["report"] is None


def test_what_exists_is_never_drawn_again_and_what_failed_is_tried_again(drawn, rows):
    _, folder = drawn
    before = {path: path.stat().st_mtime_ns for path in images(folder)}
    images(folder)[1].rename(folder / "x.part")
    result = generate(rows, folder, "--json", "-")
    (folder / "x.part").unlink()
    data = json.loads(result.stdout)
    assert (data["images"], data["kept"], data["drawn"], data["failed"]) == (4, 3, 1, 1)
    assert data["images_per_minute"] > 0
    after = {path: path.stat().st_mtime_ns for path in images(folder)}
    assert [path for path in before if after[path] != before[path]] == [sorted(before)[1]]


def test_a_finished_batch_draws_nothing(tasks, tmp_path):
    folder = Folder(tmp_path / "images")
    assert [one.failure for one in running.Batch(JOB, tasks[:1], folder).run("serial", 1)] == [""]
    again = running.Batch(JOB, tasks[:1], Folder(tmp_path / "images"))
    assert list(again.run("serial", 1)) == []
    assert (again.kept, again.drawn) == (1, 0)


def test_rows_that_all_fail_alike_end_the_batch(tmp_path):
    file = tmp_path / "many.txt"
    file.write_text("\n".join(f"{PROMPTS[0]} {number}" for number in range(9)))
    found, _ = tasks_of(read_rows(str(file)), Defaults(steps=1, size=(17, 17)), {})
    with pytest.raises(BatchError, match="none of the first 5 rows can be drawn, all for one reason: "):
        list(running.Batch(JOB, found, Folder(tmp_path / "images")).run("serial", 1))
    assert len(manifest(tmp_path / "images")) == 5


# -- workers ------------------------------------------------------------------------------------------------


def test_rows_of_a_killed_actor_are_drawn_again(tasks, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder, said = Folder(tmp_path / "images"), []
    batch = running.Batch(JOB, tasks, folder)
    for done in batch.run("ray", 2, said.append):
        assert done.failure == ""
        if batch.drawn == 1:
            kill_an_actor()
    assert not ray.is_initialized()
    assert (batch.drawn, batch.kept, batch.failed) == (4, 4, 0)
    assert len(said) >= 1
    assert all("its row is drawn again" in line for line in said)
    lines = manifest(folder.path)
    assert sorted(line["row"] for line in lines) == [0, 1, 2, 3]
    assert len({line["worker"] for line in lines}) > 1
    alone = Drawing(JOB).do(tasks[3])
    assert np.array_equal(colours(images(folder.path)[3]), colours(io.BytesIO(alone.png)))


def test_an_item_that_kills_every_worker_is_lost_and_the_others_are_not():
    again = []
    found = dict(share_out("process", deadly.Deadly(), ["a", "x", "b"], 2, 2, lambda *given: again.append(given)))
    assert (found["a"], found["b"]) == ("A", "B")
    assert isinstance(found["x"], Lost)
    assert [item for item, _ in again] == ["x"]


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch):
    file, folder, do = tmp_path / "p.txt", tmp_path / "images", Drawing.do
    file.write_text("\n".join(PROMPTS) + "\n")

    def interrupted(self, task):
        if task.number == 2:
            raise KeyboardInterrupt
        return do(self, task)

    monkeypatch.setattr(Drawing, "do", interrupted)
    monkeypatch.setattr(sys, "argv", ["/bin/cachekit", "generate", "a b"])
    result = generate(file, folder)
    assert result.exit_code == 130, result.output
    assert (
        f"stopped: 2 images are kept in {folder}, 2 are left; to go on:\n  cachekit generate 'a b'\n" in result.stderr
    )
    monkeypatch.setattr(Drawing, "do", do)
    assert "2 drawn in" in generate(file, folder).stdout
    assert [line["row"] for line in manifest(folder)] == [0, 1, 2, 3]


# -- beside the command --------------------------------------------------------------------------------------


def test_bench_coco_scores_a_folder_as_it_is(drawn, tmp_path):
    _, folder = drawn
    networks.clip(tmp_path / "clip")
    before = images(folder)
    result = commands.run("bench", "coco", folder, "--metric", f"clip={tmp_path / 'clip'}", "--json", "-")
    assert result.exit_code == 0, result.output
    found = {tuple(one["drawing"]["specs"]): one for one in json.loads(result.stdout)}
    assert sorted(found) == [(), ("deepcache:interval=2", "tgate:m=1"), ("forecast",)]
    judge = clip_score(str(tmp_path / "clip"), "cpu")
    for path in before:
        info = json.loads(Image.open(path).info["cachekit"])
        one = found[tuple(info["specs"])]
        assert one["scores"]["clip"] == pytest.approx(judge(Image.open(path), info["prompt"]))
        assert (one["images"], one["macs"], one["seconds"]) == (1, info["macs"], info["seconds"])
    assert images(folder) == before
    assert not (folder / "scores.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a cat", "--prompts", "{rows}"], "exclude each other"),
        (["{rows}"], "is the name of a file; to draw its rows, give --prompts "),
        (["--prompts", "none.txt"], "cannot read prompts 'none.txt': No such file"),
        (["--prompts", "{rows}", "--output", "{rows}"], "cannot write images to"),
        (["--prompts", "{rows}", "--spec", "tgat"], "did you mean 'tgate'?"),
        (["--prompts", "{rows}", "--spec", "deepcache:branch=99"], "has branches 0.."),
        (
            ["--prompts", "{rows}", "--executor", "proces"],
            "(did you mean 'process'?); allowed: serial",
        ),
        (["--prompts", "{rows}", "--size", "big"], "--size 'big': give width x height in pixels"),
    ],
)
def test_a_refusal_is_one_line_before_any_work(words, said, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = commands.run("generate", "demo", *(word.format(rows=rows) for word in words))
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert said in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.rglob("*.png"))


# -- what is warned of ---------------------------------------------------------------------------------------


def test_arguments_that_nothing_reads_and_policies_that_never_act_are_a_line_each(tmp_path):
    file = tmp_path / "two.txt"
    file.write_text("\n".join(PROMPTS[:2]) + "\n")
    done = generate(file, tmp_path / "images", "--set", "foo=3", "--spec", "adaptive_guidance:m=9")
    assert done.exit_code == 0
    text = " ".join(done.output.split())
    assert "--set foo: StableDiffusionPipeline has no argument of that name, and may not read it (2 of 2 images" in text
    assert "adaptive_guidance:m=9 never fired in this run of 2 guided steps (2 of 2 images drawn now)" in text
