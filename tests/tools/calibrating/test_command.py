"""`cachekit calibrate`: files for several scales that go on where they were left, merging, and errors of one line."""

from __future__ import annotations

import pytest
from support import commands

from cachekit import Calibration
from cachekit.cli.fresh import fresh_prompts
from cachekit.models import demo
from cachekit.tools.bench.captions import read_captions
from cachekit.tools.calibrating import executors, verifying

ARGUMENTS = ("demo", "--prompts", "2", "--steps", "4", "--spec", "calibrated:interval=2", "--scheduler", "euler")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a calibration at one scale, and what the command printed."""
    path = tmp_path_factory.mktemp("made") / "weights.json"
    result = commands.run("calibrate", *ARGUMENTS, "--guidance", "3", "--output", path)
    assert result.exit_code == 0, result.output
    return path, result.stdout


def test_scales_that_the_file_has_are_left_out(made):
    path, printed = made
    assert "wrote" in printed
    first = Calibration.load(path)
    result = commands.run("calibrate", *ARGUMENTS, "--guidance", "3;5", "--output", path, "--verify")
    assert result.exit_code == 0, result.output
    both = Calibration.load(path)
    assert both.scales == [3.0, 5.0]
    assert both.fits[0] == first.fits[0]
    kept = f"guidance scale 3 is in {path} already, with 2 prompts; give another --output to measure anew\n"
    assert result.stdout.count(kept) == result.stdout.count(f"wrote {path}\n") == 1
    before = path.read_text()
    others = commands.printed(
        "calibrate", *ARGUMENTS, "--prompts", "3", "--seed", "9", "--guidance", "3", "--output", path
    )
    assert kept in others
    assert "wrote" not in others
    assert path.read_text() == before
    assert "3 plain steps" in result.stdout
    assert "Medians over 2 held-out captions that the calibration wasn't made with" in " ".join(result.stdout.split())


def test_files_are_merged(made, tmp_path):
    path, _ = made
    output, copy, other = (tmp_path / f"{name}.json" for name in ("merged", "copy", "other"))
    copy.write_text(path.read_text())
    result = commands.run("calibrate", "--merge", path, "--merge", copy, "--output", output)
    assert (result.exit_code, output.exists()) == (2, False), result.output
    assert result.stderr == f"error: calibrate: '{copy}' has what '{path}' has, and would count twice; leave it out\n"
    printed = commands.printed("calibrate", *ARGUMENTS, "--seed", "9", "--guidance", "3", "--output", other)
    assert "already" not in printed
    result = commands.run("calibrate", "--merge", path, "--merge", other, "--output", output)
    assert result.exit_code == 0, result.output
    assert [fit.runs for fit in Calibration.load(output).fits if fit.guidance == 3] == [2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no model and nothing to merge"),
        ((*ARGUMENTS, "--guidance", "3;x"), "guidance '3;x' is not a list of numbers"),
        ((*ARGUMENTS, "--executor", "rey"), "unknown executor 'rey' (did you mean 'ray'?)"),
        ((*ARGUMENTS, "--spec", "tgate:m=2"), "skips more or other than whole calls"),
        ((*ARGUMENTS, "--scheduler", "eular"), "unknown scheduler 'eular'"),
        (("--merge", "nowhere.json"), "cannot read 'nowhere.json'"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, said):
    result = commands.run("calibrate", *arguments, "--output", tmp_path / "no.json")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert said in result.stderr
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--steps", "5"), "steps 4, not 5"),
        (("--scheduler", "dpm++", "--guidance", "3"), "scheduler EulerDiscreteScheduler, not DPMSolverMultistep"),
        (("--reference-steps", "8"), "reference steps 4, not 8"),
    ],
)
def test_a_file_for_something_else_is_refused_before_anything_is_computed(made, monkeypatch, changes, said):
    path, _ = made
    before = path.read_text()
    monkeypatch.setattr(executors, "EXECUTORS", {"serial": None, "ray": None})
    result = commands.run("calibrate", *ARGUMENTS, "--guidance", "7", *changes, "--output", path)
    assert result.exit_code == 2, result.output
    *_, error = result.stderr.splitlines()
    assert f"weights.json' was made for {said}" in error
    assert error.endswith("; give another output, or the options of this one")
    assert path.read_text() == before


def test_a_merge_can_not_be_verified_in_the_same_call(tmp_path):
    result = commands.run("calibrate", "--merge", tmp_path / "a", "--merge", tmp_path / "b", "--verify")
    assert result.exit_code == 2
    assert "--merge has no model to verify with; merge first, then verify in a call of its own" in result.output


@pytest.fixture
def seen(monkeypatch):
    """The prompts that `--verify` compares images of; nothing is drawn, and an existing file isn't made again."""
    found = []
    monkeypatch.setattr(verifying, "compare", lambda request, prompts, path: found.extend(prompts) or [])
    return found


@pytest.mark.parametrize(("given", "count"), [(("--verify",), 2), (("--verify-prompts", "5"), 5)])
def test_a_calibration_is_verified_on_held_out_captions_that_it_was_not_made_with(made, seen, given, count):
    path, _ = made
    printed = commands.printed("calibrate", *ARGUMENTS, "--guidance", "3", "--output", path, *given)
    assert len(set(seen)) == count
    assert not set(seen) & set(read_captions("2").texts)
    assert f"Medians over {count} held-out captions" in " ".join(printed.split())


def test_held_out_captions_leave_out_those_of_the_calibration():
    drawn = demo.heldout_captions(6, 1)
    assert fresh_prompts("3", [drawn[0], drawn[2]], "a model").texts == (drawn[1], drawn[3], drawn[4])
    assert fresh_prompts(None, drawn, "demo-dit").texts == tuple(demo.heldout_captions(12, 1)[6:])


def test_a_calibration_is_verified_on_the_prompts_of_a_file(made, seen, tmp_path):
    path, _ = made
    prompts = tmp_path / "others.txt"
    prompts.write_text("a red circle\na blue star\n")
    given = ("--guidance", "3", "--output", path, "--verify", "--verify-prompts", prompts)
    printed = commands.printed("calibrate", *ARGUMENTS, *given)
    assert seen == ["a red circle", "a blue star"]
    assert "Medians over 2 prompts of" in printed


def test_prompts_that_are_not_fresh_are_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "EXECUTORS", {"serial": None})
    prompts = tmp_path / "others.txt"
    prompts.write_text("a blue star\n" + read_captions("2").texts[1])
    result = commands.run("calibrate", *ARGUMENTS, "--output", tmp_path / "no.json", "--verify-prompts", prompts)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert f"{prompts}: 1 of 2 are among the prompts of the calibration, such as '" in result.stderr
    result = commands.run("calibrate", tmp_path, *ARGUMENTS[1:], "--output", tmp_path / "no.json", "--verify")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert result.stderr.endswith("isn't made with; give --verify-prompts FILE\n")
