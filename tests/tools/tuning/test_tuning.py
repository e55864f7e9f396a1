"""Tuning: targets, the space of candidates, studies that are resumed or refused, and presets with their evidence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from support import commands, tiny
from support.cells import cell

import cachekit
from cachekit import CachekitError, Preset
from cachekit.cli.tune import print_report
from cachekit.interface.presets import Figures
from cachekit.models.demo import DEMO_GUIDANCE
from cachekit.registry.catalog import installed
from cachekit.tools.bench.cells import Setting
from cachekit.tools.bench.results import Result, Sample
from cachekit.tools.bench.subjects import subject_of
from cachekit.tools.bench.workbench import Contender
from cachekit.tools.tuning.candidates import PLAIN, Candidate, Space
from cachekit.tools.tuning.captions import lots_of
from cachekit.tools.tuning.measuring import Measurer, _Share
from cachekit.tools.tuning.search import Budget, Search
from cachekit.tools.tuning.study import Journal, Measured
from cachekit.tools.tuning.targets import Targets, TuningError
from cachekit.tools.tuning.tune import movable
from cachekit.tools.tuning.verdict import _best_plain, _promising
from cachekit.tools.tuning.weights import Weights
from cachekit.tools.workers import Lost
from cachekit.upstream.fingerprints import fingerprint

SMALL = {"fresh": 1, "num_inference_steps": 4, "policies": ["forecast"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def tuned(folder):
    """Tune the embedded UNet: a few trials of few steps, on one image."""
    lines = []
    found = cachekit.tune(
        "demo",
        1,
        at_least=10,
        trials=2,
        journal=folder / "study.log",
        output=folder / "fast.json",
        progress=lambda done, total, line: lines.append((done, total)),
        **SMALL,
    )
    return found, lines


# -- studies ----------------------------------------------------------------------------------------------


def test_a_study_has_caches_and_plain_steps(tuned):
    found, lines = tuned
    assert {bool(one.candidate.specs) for one in found.measured} == {True, False}
    assert len(found.measured) == 2
    assert lines[0] == (0, 2)
    assert lines[-1] == (2, 2)
    assert found.front
    assert {one.candidate for one in found.front} <= {one.candidate for one in found.measured}


def test_a_preset_has_the_evidence_of_fresh_captions(tuned, folder):
    found, _ = tuned
    assert found.preset == Preset.load(folder / "fast.json")
    evidence, pipe = found.preset.evidence, cachekit.demo_pipeline()
    assert evidence.model == fingerprint(pipe.unet)
    assert (evidence.denoiser, evidence.pipeline) == ("UNet2DConditionModel", "StableDiffusionPipeline")
    assert evidence.scheduler == type(pipe.scheduler).__name__
    assert (evidence.reference_steps, evidence.guidance) == (4, 3.5)
    assert evidence.target == ["at least 10 dB"]
    assert evidence.figures == found.verdict.best.figures
    assert evidence.figures.images == 1
    assert evidence.figures.mac_reduction > 1
    assert {"cachekit", "torch", "diffusers"} <= set(evidence.versions)
    assert found.preset.requires == {"forecast": "cachekit-diffusion"}
    with cachekit.apply(pipe, f"preset:{folder / 'fast.json'}") as attachment:
        assert [policy.name for policy in attachment.policies] == ["forecast"]


def test_a_stopped_study_resumes(tuned, folder):
    before = {one.candidate: one.figures for one in tuned[0].measured}
    lines = []
    again = cachekit.tune(
        "demo",
        1,
        at_least=90,
        trials=3,
        journal=folder / "study.log",
        progress=lambda done, total, line: lines.append(done),
        **SMALL,
    )
    after = {one.candidate: one.figures for one in again.measured}
    assert before.items() <= after.items()
    assert (lines[0], len(after)) == (2, 3)
    assert again.preset is None
    assert again.verdict.judged == []


JOIN = """
import sys, cachekit
given = {"num_inference_steps": 4, "policies": ["forecast"], "fresh": 1}
found = cachekit.tune("demo", 1, at_least=90, trials=2, journal=sys.argv[1], **given)
print(len(found.measured))
"""


def test_a_process_and_an_actor_of_ray_share_a_study(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    journal, given = tmp_path / "study.log", {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", JOIN, str(journal)], **given) as other:
        found = cachekit.tune("demo", 1, at_least=10, trials=2, journal=journal, executor="ray", **SMALL)
        printed, failures = other.communicate(timeout=120)
    assert other.returncode == 0, failures
    # A process that begins when the other has measured enough measures nothing.
    assert max(len(found.measured), int(printed)) >= 2
    assert found.preset is not None
    (study,) = optuna.get_all_study_summaries(JournalStorage(JournalFileBackend(str(journal))))
    assert study.n_trials >= 2


def test_a_study_of_another_model_is_refused_with_both_hashes(tuned, folder):
    ours = fingerprint(cachekit.demo_pipeline().unet)
    theirs = fingerprint(cachekit.demo_pipeline("dit").transformer)
    given = ["--fresh", 1, "--steps", 4, "--policy", "forecast", "--captions", 1, "--journal", folder / "study.log"]
    result = commands.run("tune", "demo-dit", "--at-least", "10dB", *given, "--output", folder / "other.json")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"has a study of model {ours}, not {theirs}; name another" in line


def test_a_study_of_other_captions_is_refused_with_the_first_that_differs(tmp_path):
    path = tmp_path / "study.log"
    Journal(path, {"captions": ["a cat", "a dog"]}, Targets(at_least=20), judged=False, seed=0)
    with pytest.raises(
        TuningError, match="has a study of captions, where number 2 is 'a dog', not 'a hen'; name another"
    ):
        Journal(path, {"captions": ["a cat", "a hen"]}, Targets(at_least=20), judged=False, seed=0)
    with pytest.raises(TuningError, match="has a study of another number of captions: 2, not 1; name another"):
        Journal(path, {"captions": ["a cat"]}, Targets(at_least=20), judged=False, seed=0)


def test_a_target_that_nothing_reaches_names_what_is_nearest(tuned, folder):
    given = ["--fresh", 1, "--steps", 4, "--policy", "forecast", "--trials", 3, "--captions", 1]
    journal, output = ["--journal", folder / "study.log"], folder / "none.json"
    result = commands.run("tune", "demo", "--at-least", "90dB", *given, *journal, "--output", output)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "no candidate that saves 1.05x or more reaches the target: at least 90 dB: nearest short of it" in line
    assert "nothing reaches it" in line
    assert not output.exists()
    assert output.with_suffix(".png").exists()
    assert "The search: what no other candidate beats." in result.stdout


def test_the_best_and_the_plain_steps_beside_it_are_printed(tuned, folder, capsys):
    found, _ = tuned
    print_report(found, folder / "fast.json")
    text = capsys.readouterr().out
    text, best = " ".join(text.split()), found.verdict.best.candidate
    assert f"preset:{folder / 'fast.json'}, {best.steps} steps: " in text
    assert f"wrote {folder / 'fast.json'}, which stands for {best.label}" in text
    assert "{folder}" not in text
    assert "The verdict: captions that the search never used." in text
    assert ("plain steps are the better choice" in text) == (found.verdict.rival is not None)
    for one in found.verdict.judged:
        assert one.plain is None or "beside it: " in text


@pytest.mark.parametrize(
    ("text", "wrong"), [("a cat\n\na dog\n", "empty"), ("a cat\n" + "a" * 1001, "1001 characters")]
)
def test_captions_of_a_file_are_refused_with_the_line(folder, text, wrong):
    path = folder / "captions.txt"
    path.write_text(text)
    result = commands.run("tune", "demo", "--at-least", "30dB", "--captions", path)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"captions, line 2: {wrong}; write one caption per line, of 1 to 1000 characters" in result.stderr


def test_an_output_whose_path_specs_cannot_hold_is_refused():
    with pytest.raises(TuningError, match=r"beside 'a,b.json': its path has a comma, .*; write it elsewhere"):
        cachekit.tune("demo", 1, at_least=30, output="a,b.json")


def test_a_study_of_other_policies_is_refused(tuned, folder):
    given = {**SMALL, "policies": ["tgate"]}
    with pytest.raises(TuningError, match="has a study of policies, where number 1 is 'forecast', not 'tgate'"):
        cachekit.tune("demo", 1, at_least=10, journal=folder / "study.log", **given)


def test_a_cluster_that_is_not_there_is_no_fault_of_the_candidates(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CachekitError, match="the ray executor needs Ray"):
        cachekit.tune("demo", 1, at_least=10, trials=1, executor="ray", **SMALL)


def test_a_picture_never_takes_the_place_of_the_preset(tmp_path):
    result = commands.run("tune", "demo", "--at-least", "10dB", "--output", tmp_path / "fast.png")
    assert result.exit_code == 2
    assert "is the name of the picture beside it; end it in .json" in result.stderr


@pytest.mark.parametrize("output", ["/fast.json", "/fast/fast.json"])
def test_a_preset_finds_its_weights_wherever_it_is_moved(output):
    weights = Path(output).with_name("fast-weights") / "a.json"
    assert movable(f"calibrated:interval=3,file={weights}", Path(output)) == (
        "calibrated:interval=3,file={folder}/fast-weights/a.json"
    )


def test_a_file_that_is_no_journal_is_refused(folder):
    path = folder / "notes.txt"
    path.write_text("not a journal\n")
    with pytest.raises(TuningError, match="is not a study of cachekit tune"):
        cachekit.tune("demo", 1, at_least=10, journal=path, **SMALL)


# -- candidates -------------------------------------------------------------------------------------------


class Scripted:
    """Chooses what it is given by name, which must be allowed as in Optuna, else the first value."""

    def __init__(self, **values):
        self.values = values

    def suggest_int(self, name, low, high):
        value = self.values.get(name, low)
        assert low <= value <= high
        return value

    def suggest_float(self, name, low, high, *, log=False):
        value = self.values.get(name, low)
        assert low <= value <= high
        return value

    def suggest_categorical(self, name, choices):
        value = self.values.get(name, choices[0])
        assert value in choices
        return value


@pytest.fixture(scope="module")
def space():
    return Space(tiny.unet(), installed(), 25, ("", "karras"))


def test_policies_without_sites_are_left_out(space):
    assert {"forecast", "calibrated", "deepcache", "tgate", "cache"} <= set(space.policies)
    assert not {"teacache", "delta_dit"} & set(space.policies)


def test_beginnings_are_policies_as_they_are_and_plain_steps(space):
    ladders = [[space.choose(Scripted(**rung)) for rung in ladder] for ladder in space.beginnings()]
    made = [one for ladder in ladders for one in ladder]
    specs = [[one.specs for one in ladder] for ladder in ladders]
    assert [(f"calibrated:interval={interval}",) for interval in (3, 4, 5, 6)] in specs
    assert {one.spacing for one in made if not one.specs} == {"", "karras"}
    caches = {one.specs[0] for one in made if one.specs}
    assert {"tgate", "forecast", "forecast:interval=3", "forecast:interval=4", "calibrated:interval=4"} <= caches
    varied = {space.choose(Scripted(**rung)).specs[0] for ladder in space.variations() for rung in ladder}
    assert {"tgate:m=11", "tgate:m=20", "tgate:m=auto"} <= varied - caches
    assert not any("," in one for one in caches if one.startswith("deepcache"))


def test_longer_runs_with_greater_intervals_go_on_from_beginnings(space):
    ladders = [[space.choose(Scripted(**rung)) for rung in ladder] for ladder in space.variations()]
    longer = [Candidate((f"calibrated:interval={interval}",), 50) for interval in (8, 10, 12)]
    assert longer in ladders[: len(space.policies)]


def test_a_candidate_may_have_two_policies_with_a_part_replaced(space):
    made = space.choose(
        Scripted(
            policy="tgate",
            steps=50,
            paired=True,
            **{"with": "deepcache", "0.tgate.m": 7, "1.deepcache.interval": 3},
            **{"1.deepcache.replaced": True, "1.deepcache.part": "what=linear"},
        )
    )
    assert made.steps == 50
    assert [spec.partition(":")[0] for spec in made.specs] == ["deepcache", "tgate"]
    assert "what=linear" in made.specs[0]
    assert "m=7" in made.specs[1]


@pytest.mark.parametrize(
    ("chosen", "spec"),
    [
        ({"0.deepcache.center": 3, "0.deepcache.interval": 4}, "deepcache:interval=4"),
        ({"0.deepcache.center": 3, "0.deepcache.schedule": "quadratic"}, "deepcache:schedule=quadratic,center=3"),
        ({"0.forecast.replaced": True, "0.forecast.part": "when=every", "0.forecast.first": 4}, "forecast:when=every"),
        # With a line, it would warn.
        (
            {"0.forecast.replaced": True, "0.forecast.part": "what=reuse", "0.forecast.order": 0}
            | {"0.forecast.interval": 3},
            "forecast:interval=3,order=0,what=reuse",
        ),
    ],
)
def test_numbers_that_change_nothing_are_left_out(space, chosen, spec):
    defaults = {"0.deepcache.branch": 0, "0.deepcache.power": 1.4, "0.deepcache.center": 15, "0.deepcache.start": 0}
    defaults |= {"0.deepcache.interval": 3, "0.forecast.order": 1, "0.forecast.last": True, "0.forecast.interval": 2}
    policy = spec.partition(":")[0]
    assert space.choose(Scripted(**{**defaults, **chosen, "policy": policy, "steps": 25})).specs == (spec,)


def test_parts_that_need_weights_are_left_to_their_policies(space):
    catalog = installed()
    parts = [*catalog.schedules.items(), *catalog.stand_ins.items()]
    with_files = {name for name, part in parts if "file" in part.model_fields}
    tried = {text.partition("=")[2] for text in space._replacements()}
    assert "linear" in tried
    assert with_files
    assert not with_files & tried


def test_places_without_targets_in_the_model_are_left_out(space):
    seen = []

    class Watching(Scripted):
        def suggest_categorical(self, name, choices):
            seen.extend(choices if name.endswith(".where") else ())
            return super().suggest_categorical(name, choices)

    space.choose(Watching(policy="cache", steps=25))
    assert {"denoiser", "cross_attention", "block"} <= set(seen)
    assert not {"joint_attention", "temporal_attention", "tail"} & set(seen)


def test_the_same_policy_twice_is_refused(space):
    with pytest.raises(CachekitError, match="given twice"):
        space.choose(Scripted(policy="tgate", paired=True, **{"with": "tgate", "0.tgate.m": 7}))


def test_an_unknown_policy_is_refused():
    with pytest.raises(CachekitError, match="unknown policy 'tgat'"):
        Space(tiny.unet(), installed(), 25, ("",), ["tgat"])


def test_plain_steps_are_candidates(space):
    made = space.choose(Scripted(policy=PLAIN, **{"plain.steps": 9, "plain.spacing": "karras"}))
    assert made.label == "9 plain steps, karras"


# -- targets and captions ---------------------------------------------------------------------------------


def test_targets_are_read_as_they_are_written():
    assert Targets.parse("35dB", "-1%", "800ms", "3x") == Targets(35, -0.01, 0.8, 3)
    assert Targets.parse("35", None, "2s", None) == Targets(at_least=35, at_most=2)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((None, None, None, None), "no target; give at least one"),
        (("35 apples", None, None, None), "--at-least '35 apples': not a number with its unit; write 35dB"),
        ((None, "-1", None, None), "--caption-match '-1': not a number with its unit; write -1%"),
        ((None, None, "2", None), "--at-most '2': not a time; write 2s or 800ms"),
        ((None, None, None, "0.5"), "speedup=0.5: out of range"),
    ],
)
def test_targets_that_make_no_sense_are_refused(given, reason):
    with pytest.raises(TuningError) as error:
        Targets.parse(*given)
    assert reason in str(error.value)


def test_all_targets_must_hold():
    fast = Figures(images=2, psnr=30, ssim=0.9, speedup=3.0, mac_reduction=3.2, caption_match=0.9, checked=2)
    same = Figures(images=2, ssim=1.0, speedup=1.0, mac_reduction=1.0)
    assert Targets(at_least=29, speedup=2).reached(fast)
    assert not Targets(at_least=31, speedup=2).reached(fast)
    assert Targets(at_least=90).reached(same)
    assert Targets(at_least=29).serves(fast)
    assert not Targets(at_least=90).serves(same)
    drop = fast.model_copy(update={"uncached_caption_match": 0.91})
    assert Targets(caption_match=-0.01).reached(drop)
    assert not Targets(caption_match=-0.005).reached(drop)
    assert not Targets(caption_match=-0.5).reached(same)


def test_what_shows_one_caption_too_few_in_the_search_is_judged_beside_what_shows_enough():
    def found(spec, saving, shown):
        figures = Figures(images=4, psnr=30, ssim=0.9, mac_reduction=saving, caption_match=shown, checked=4)
        candidate = Candidate((spec,) if spec else (), 4)
        return Measured(candidate, figures.model_copy(update={"uncached_caption_match": 1.0}))

    measured = [found("a", 2, 1.0), found("b", 4, 0.75), found("c", 5, 0.5), found("d", 1.5, 0.75), found("", 1.8, 1.0)]
    promising = _promising(SimpleNamespace(measured=measured), Targets(caption_match=-0.01))
    assert [candidate.specs for candidate in promising] == [("b",), ("a",), ()]
    promising = _promising(SimpleNamespace(measured=measured), Targets(at_least=20))
    assert [candidate.specs for candidate in promising] == [("c",), ("b",), (), ("a",), ("d",)]


class IntervalsMeasured:
    """Measures forecasts that save much and stay near, and all else as far off and dear; it may be stopped."""

    batch, steps = 3, 25

    def __init__(self, stop_at=""):
        self.stop_at, self.places = stop_at, set()

    def measure(self, candidates, captions, place=0):
        self.places.add((place, *captions))
        if self.stop_at in [candidate.label for candidate in candidates]:
            self.stop_at = ""
            raise KeyboardInterrupt
        return [self._result(candidate) for candidate in candidates]

    def _result(self, candidate):
        near = candidate.label.startswith("forecast")
        shared = {"caption": "", "seconds": 1, "uncached_seconds": 2, "uncached_macs": 100, "ssim": 0.9}
        sample = Sample(**shared, macs=10 if near else 90, psnr=50.0 if near else 5.0)
        made = cell(candidate.specs, candidate.steps)
        return Result(id="", cell=made, environment={}, first_seconds=None, samples=[sample])


TRIED = {"forecast", "forecast:interval=3", "calibrated:interval=3", "12 plain steps"}


class HalfThePrice:
    """Estimates that every candidate saves half; it may be stopped at one."""

    plan = SimpleNamespace(columns=list)
    baseline_macs, macs = 2, 1

    def __init__(self, stop_at=()):
        self.stop_at = stop_at

    def __call__(self, specs, num_inference_steps):
        if specs == self.stop_at:
            self.stop_at = ()
            raise KeyboardInterrupt
        return self


def searched(measurer, journal, estimator=None):
    space = Space(tiny.unet(), installed(), 25, ("",), policies=["forecast", "calibrated"])
    search = Search(space, journal, measurer, Targets(at_least=20), ["a", "b", "c"], estimator or HalfThePrice())
    search.run(Budget(4), lambda done, total, line: None)
    return {one.candidate.label for one in journal.measured}


def test_greater_intervals_are_tried_only_where_smaller_ones_may_win():
    journal, measurer = Journal(None, {}, Targets(at_least=20), judged=False, seed=0), IntervalsMeasured()
    assert searched(measurer, journal) == TRIED
    assert measurer.places == {(0, "a", "b"), (2, "c")}


@pytest.mark.parametrize("steps", [2, 4])
def test_short_runs_have_beginnings_too(steps):
    space = Space(tiny.unet(), installed(), steps, ("",))
    begun = {space.choose(Scripted(**ladder[0])).label.partition(":")[0] for ladder in space.beginnings()}
    assert {"easycache", "forecast", "tgate"} <= begun
    assert list(space.variations())


def test_other_numbers_are_tried_after_greater_intervals():
    journal, lines = Journal(None, {}, Targets(at_least=20), judged=False, seed=0), []
    space = Space(tiny.unet(), installed(), 25, ("",), policies=["forecast", "tgate"])
    search = Search(space, journal, IntervalsMeasured(), Targets(at_least=20), ["a", "b", "c"], HalfThePrice())
    search.run(Budget(10), lambda done, total, line: lines.append(line))
    found = [one.candidate.label for one in journal.measured]
    assert found.index("forecast:interval=3") < found.index("tgate:m=20")
    assert not any("+" in label for label in found[: found.index("tgate:m=20")])


def test_what_lies_far_behind_on_a_few_images_is_measured_on_no_more():
    journal = Journal(None, {}, Targets(at_least=20), judged=False, seed=0)
    searched(IntervalsMeasured(), journal)
    images = {one.candidate.label: one.figures.images for one in journal.measured}
    assert images["forecast"] > images["calibrated:interval=3"]


def test_what_saves_too_little_by_the_estimate_is_never_measured():
    journal, estimator = Journal(None, {}, Targets(at_least=20), judged=False, seed=0), HalfThePrice()
    estimator.macs = estimator.baseline_macs
    searched(IntervalsMeasured(), journal, estimator)
    assert all(one.candidate.steps < 25 for one in journal.measured)
    refused = {str(one.user_attrs.get("reason")): one for one in journal.study.get_trials()}
    one = refused["forecast: saves 1.00x MACs by the estimate, less than 1.05x"]
    assert one.state is TrialState.PRUNED
    assert one.constraints["refused"] > 0


def test_what_a_stopped_search_was_checking_is_tried_again(tmp_path):
    journal = Journal(tmp_path / "study.log", {"steps": 25}, Targets(at_least=20), judged=False, seed=0)
    with pytest.raises(KeyboardInterrupt):
        searched(IntervalsMeasured(), journal, HalfThePrice(stop_at=("forecast",)))
    assert journal.measured == []
    resumed = Journal(tmp_path / "study.log", {"steps": 25}, Targets(at_least=20), judged=False, seed=0)
    assert searched(IntervalsMeasured(), resumed) == TRIED


def test_what_a_stopped_search_was_measuring_is_tried_again(tmp_path):
    journal = Journal(tmp_path / "study.log", {"steps": 25}, Targets(at_least=20), judged=False, seed=0)
    with pytest.raises(KeyboardInterrupt):
        searched(IntervalsMeasured(stop_at="forecast"), journal)
    resumed = Journal(tmp_path / "study.log", {"steps": 25}, Targets(at_least=20), judged=False, seed=0)
    assert searched(IntervalsMeasured(), resumed) == TRIED


class SpacingsMeasured:
    """Measures plain steps whose similarity and caption match are given; remembers on how many captions."""

    def __init__(self, similar, shown=()):
        self.similar, self.shown, self.seen = similar, shown, []

    def measure_cells(self, cells, captions, place=0):
        self.seen += [(len(captions), place)] * len(cells)
        return [self._result(cell) for cell in cells]

    def _result(self, cell):
        one = cell.steps, cell.spacing
        if self.similar[one] is None:
            return "the scheduler has no such spacing"
        shared = {"caption": "", "seconds": 1, "uncached_seconds": 2, "macs": 1, "uncached_macs": 2, "ssim": 0.9}
        sample = Sample(**shared, psnr=self.similar[one], shown=one in self.shown, uncached_shown=True)
        return Result(id="", cell=cell, environment={}, first_seconds=None, samples=[sample])


SIMILAR = {(3, ""): 20.0, (3, "karras"): 25.0, (4, ""): 30.0, (4, "karras"): 28.0, (4, "lu_lambdas"): None}


@pytest.mark.parametrize(
    ("targets", "spacings"),
    [(Targets(at_least=20), {3: "karras", 4: ""}), (Targets(caption_match=0), {3: "", 4: ""})],
)
def test_a_few_fresh_captions_choose_the_spacing_that_all_of_them_judge(targets, spacings):
    cells = [cell((), steps).model_copy(update={"spacing": spacing}) for steps, spacing in SIMILAR]
    measurer = SpacingsMeasured(SIMILAR, shown={(3, ""), (4, ""), (4, "karras")})
    best = _best_plain(cells, measurer, targets, ["a caption"] * 9)
    assert {steps: plain.spacing for steps, plain in best.items()} == spacings
    # The noise goes on where the first captions end, as it does for the cached candidates.
    assert measurer.seen == [(8, 0)] * 5 + [(1, 8)] * 2
    few = SpacingsMeasured(SIMILAR)
    assert _best_plain(cells, few, Targets(at_least=20), ["a caption"] * 8)[4].figures.psnr == 30
    assert few.seen == [(8, 0)] * 5


class HalfBroken:
    """A bench on which one cell fails in the middle of a measurement, and everything that is measured with it."""

    def prepare(self, cell):
        if cell.specs == ("refused",):
            raise CachekitError("refused: no sites")
        return Contender(cell, run=None, first=None)

    def measure(self, contenders):
        if any(one.cell.specs == ("broken",) for one in contenders):
            raise RuntimeError("out of memory\nin a kernel")
        return [Result(id="", cell=one.cell, environment={}, first_seconds=None, samples=[]) for one in contenders]


def test_what_fails_is_told_and_the_others_are_measured():
    share = _Share(tuple(cell((name,)) for name in ("good", "broken", "refused", "fine")), ("a caption",), place=8)
    good, broken, refused, fine = share.measure(HalfBroken())
    assert (broken, refused) == ("RuntimeError: out of memory", "refused: no sites")
    assert (good.cell.specs, fine.cell.specs) == (("good",), ("fine",))
    assert good.cell.seed == cell(("good",)).seed + 8


class DyingCrew:
    """Loses every share in which one cell is."""

    name, workers = "process", 4

    def __init__(self):
        self.shares = []

    def share_out(self, work, shares):
        for share in shares:
            self.shares.append(share)
            is_deadly = any(one.specs == ("deadly",) for one in share.cells)
            yield (
                share,
                Lost("a worker died") if is_deadly else [f"{share.captions} {one.specs}" for one in share.cells],
            )


def test_a_worker_that_dies_loses_the_cell_that_killed_it_alone():
    crew = DyingCrew()
    measurer = Measurer(Setting(model="demo", captions=()), None, "", 4, 0, None, crew)
    cells = [cell((name,)) for name in ("good", "deadly", "fine")]
    good, deadly, fine = measurer.measure_cells(cells, ["a", "b"])
    assert (good, deadly, fine) == ("('a',) ('good',)", "a worker died", "('a',) ('fine',)")
    # Two captions for four workers, so that the cells are in two groups.
    assert [one.specs[0] for share in crew.shares[:4] for one in share.cells] == ["good", "fine", "deadly"] * 2


def test_workers_measure_what_one_process_does(tuned, tmp_path):
    given = {**SMALL, "at_least": 10, "trials": 2}
    with_two = cachekit.tune("demo", 3, **given, executor="process", workers=2)
    alone = cachekit.tune("demo", 3, **given)
    assert with_two.refused == alone.refused
    for one, other in zip(with_two.measured, alone.measured, strict=True):
        assert (one.candidate, one.figures.images) == (other.candidate, other.figures.images)
        assert (one.figures.psnr, one.figures.macs) == (other.figures.psnr, other.figures.macs)


class FailingMeasurer:
    """Has no figures for any candidate."""

    batch, steps = 2, 25

    def measure(self, candidates, captions, place=0):
        return ["out of memory" for _ in candidates]


def test_a_search_ends_where_all_candidates_fail(space):
    journal = Journal(None, {}, Targets(at_least=20), judged=False, seed=0)
    search, lines = Search(space, journal, FailingMeasurer(), Targets(at_least=20), ["a", "b"], HalfThePrice()), []
    search.run(Budget(1), lambda done, total, line: lines.append(line))
    assert journal.measured == []
    failures = [line for line in lines if line.endswith(": out of memory")]
    assert len(set(failures)) == len(failures) > 0
    assert lines[-1].endswith("refused or failed; name policies that fit")


def test_weights_that_do_not_ship_are_made_and_move_with_the_preset(tmp_path):
    (tmp_path / "here").mkdir()
    output, given = tmp_path / "here" / "fast.json", {**SMALL, "policies": ["calibrated"]}
    found = cachekit.tune("demo", 1, at_least=1, trials=1, output=output, **given)
    assert found.preset is not None
    assert "file={folder}/fast-weights/" in found.preset.specs[0]
    (tmp_path / "here").rename(tmp_path / "there")
    pipe = cachekit.demo_pipeline()
    with cachekit.apply(pipe, f"preset:{tmp_path / 'there' / 'fast.json'}") as attachment:
        pipe("a large red circle top left on white", num_inference_steps=4, guidance_scale=DEMO_GUIDANCE)
        assert attachment.report().left_out > 0


def test_weights_of_another_run_have_another_file(tmp_path):
    def file(pipe=None, prompts=("a cat",), guidance=None, steps=4):
        pipe = pipe or tiny.small()
        setting = Setting(model="tiny", captions=prompts, device="cpu", guidance=guidance)
        weights = Weights(subject_of(pipe, setting), type(pipe.scheduler).__name__, prompts, tmp_path)
        return weights._file("calibrated:interval=3", steps)

    other = tiny.small()
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    half = tiny.small().to(torch.float16)
    assert file() == file()
    files = {file(), file(other), file(half), file(prompts=("a dog",)), file(guidance=2.0), file(steps=5)}
    assert len(files) == 6


def test_fresh_captions_are_never_those_of_the_search():
    lots = lots_of(5, None, True)
    assert len(lots.search) == 5
    assert not set(lots.fresh) & {*lots.search, *lots.weights}
    lots = lots_of(["a cat", "a dog", "a cat", "a hen"], 1, False)
    assert (lots.search, lots.fresh) == (("a cat", "a dog"), ("a hen",))


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        (["a cat", " ", "a dog"], "captions, line 2: empty; write one caption per line, of 1 to 1000 characters"),
        (["a cat", "a dog " * 200], "captions, line 2: 1200 characters; write one"),
        (["a cat"], "1 different captions"),
        (4, "numbers are for embedded models"),
    ],
)
def test_captions_that_cannot_be_used_are_refused(captions, reason):
    with pytest.raises(TuningError) as error:
        lots_of(captions, None, False)
    assert reason in str(error.value)


def test_captions_that_an_embedded_model_cannot_be_checked_by_are_refused():
    with pytest.raises(TuningError, match="captions, line 2: no known background at the end of caption 'a cat'"):
        lots_of(["a large red circle top left on white", "a cat"], None, True)
