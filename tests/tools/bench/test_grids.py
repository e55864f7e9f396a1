"""`cachekit bench grid`: grids, resumed and merged results, baselines, peers and executors, on tiny pipelines."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from support import commands, tiny

import cachekit
from cachekit import CachekitError, Choice, Mask, Policy, Reuse, WholeDenoiser
from cachekit.registry.catalog import installed
from cachekit.tools.bench import executors
from cachekit.tools.bench.cells import BenchError, Method, Setting, expand
from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.frechet import distance, gaussian_stats
from cachekit.tools.bench.results import Results, read
from cachekit.tools.bench.suite import Suite, fitting
from cachekit.tools.bench.summary import groups
from cachekit.tools.bench.tables import texts
from cachekit.tools.bench.workbench import measure
from cachekit.tools.workers import Crew

STORED = Path(__file__).parents[3] / "benchmarks" / "results"
GRID = ["--spec", "tgate:m=2|3+deepcache:interval=2"]
SMALL = ["--steps", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a pipeline without text encoder: its text is drawn at random, caption by caption."""
    folder = tmp_path_factory.mktemp("sd")
    tiny.small(layers_per_block=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    file = tmp_path_factory.mktemp("captions") / "captions.txt"
    file.write_text('a red cat\n\n<script>alert(1)</script> \u2028 & "so on"\n')
    return str(file)


@pytest.fixture(scope="module")
def measured(folder, captions, tmp_path_factory):
    """Make the file of one whole run, published packages included."""
    file = tmp_path_factory.mktemp("results") / "bench.jsonl"
    printed(folder, *GRID, *SMALL, "--captions", captions, "--output", file)
    return file


run, printed = (functools.partial(command, "bench", "grid") for command in (commands.run, commands.printed))


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def cells(file):
    return [result.cell for result in read(file)[0]]


# -- grids ------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_alternatives():
    found = expand(["tgate:m=3|5+deepcache:interval=2|3", "tgate:m=3"], installed())
    assert [sorted(map(str, made)) for made in found] == [
        ["deepcache:interval=2", "tgate:m=3"],
        ["deepcache", "tgate:m=3"],
        ["deepcache:interval=2", "tgate:m=5"],
        ["deepcache", "tgate:m=5"],
        ["tgate:m=3"],
    ]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (
            "cache:where=denoiser,when=every(2)|mask(0;1;4)",
            [["cache:where=denoiser"], ["cache:where=denoiser,when=mask(steps=0;1;4)"]],
        ),
        (
            "cache:where=denoiser,when=window(when=every(3),stop=8),what=linear|taylor(2,of=x0)",
            [
                ["cache:where=denoiser,when=window(stop=8,when=every(n=3)),what=linear"],
                ["cache:where=denoiser,when=window(stop=8,when=every(n=3)),what=taylor(of=x0,order=2)"],
            ],
        ),
        (
            "cache:where=sites(cross_attention;feed_forward)|self_attention+deepcache:power=1e+0|2",
            [
                ["cache:where=sites(cross_attention;feed_forward)", "deepcache:power=1.0"],
                ["cache:where=sites(cross_attention;feed_forward)", "deepcache:power=2.0"],
                ["cache:where=self_attention", "deepcache:power=1.0"],
                ["cache:where=self_attention", "deepcache:power=2.0"],
            ],
        ),
    ],
)
def test_separators_within_brackets_separate_nothing(grid, expected):
    assert [sorted(map(str, made)) for made in expand([grid], installed())] == expected


def test_alternatives_bind_weaker_than_lists():
    class Listed(Policy):
        name = "listed"
        steps: tuple[int, ...] = ()

        def choices(self):
            return {"denoiser": Choice(WholeDenoiser(), Mask(steps=self.steps or (0,)), Reuse())}

    words = dataclasses.replace(installed(), policies={"listed": Listed})
    assert [made.steps for (made,) in expand(["listed:steps=0;1|2;3|;"], words)] == [(0, 1), (2, 3), ()]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("cache:where=denoiser,when=every(2|3)", "when=every: n=2|3: "),
        ("cache:where=denoiser,when=every(2+3)", "when=every: n=2+3: "),
        ("cache:where=denoiser,when=every(2+tgate", "not closed"),
        ("cache:where=denoiser,when=every(2)|", "'when=' is not key=value"),
        ("tgate:m=2++deepcache", "nothing on one side of '+'"),
    ],
)
def test_a_grid_that_cannot_be_is_one_line(grid, said):
    with pytest.raises(CachekitError) as caught:
        expand([grid], installed())
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_equal_compositions_are_measured_once():
    found = expand(["tgate:m=10|10", "tgate", "deepcache+tgate", "tgate+deepcache"], installed())
    assert len(found) == 2


# -- what is measured -------------------------------------------------------------------------------------


def test_each_composition_comes_with_its_peer_and_its_baselines(measured):
    methods = [cell.method for cell in cells(measured)]
    assert methods.count(Method.CACHEKIT) == 2
    assert methods.count(Method.PUBLISHED) == 2
    (group,) = groups(read(measured)[0])
    for row in group.rows:
        if row.cell.method is not Method.PLAIN:
            # A machine that is busy for a moment makes a cached image slower than the uncached one.
            wanted = [steps for steps in row.plain_steps().values() if steps <= row.cell.uncached_steps]
            assert row.plain_steps()["MACs"] in wanted
            assert all(group.plain(steps) is not None for steps in wanted)
            assert all(group.best_plain(steps) is not None for steps in wanted)


def test_published_packages_cost_and_draw_the_same(measured):
    (group,) = groups(read(measured)[0])
    rows = {(row.cell.method, row.cell.specs): row for row in group.rows}
    for (method, specs), row in rows.items():
        if method is Method.CACHEKIT:
            peer = rows[Method.PUBLISHED, specs]
            assert (row.macs, row.psnr, row.ssim) == (peer.macs, peer.psnr, peer.ssim)


def test_figures_are_those_of_the_report(measured, folder, captions):
    result = next(result for result in read(measured)[0] if result.cell.specs == ("deepcache:interval=2", "tgate:m=3"))
    assert [sample.caption for sample in result.samples] == ["a red cat", '<script>alert(1)</script> \u2028 & "so on"']
    for sample in result.samples:
        assert 0 < sample.macs < sample.uncached_macs
        assert min(sample.seconds, sample.uncached_seconds, sample.cache_bytes, sample.deciding_seconds) > 0
        assert math.isfinite(sample.psnr)
        assert (sample.shown, sample.peak_memory) == (None, None)
    assert sum(count["reused"] for count in result.counts) > 0
    assert len(result.plan["branches"]) == 4
    assert result.environment["threads"] == 1
    pipe = tiny.small(layers_per_block=1)
    with cachekit.apply(pipe, result.cell.specs) as attachment:
        tiny.latents(pipe, steps=4)
        report = attachment.report()
    assert result.samples[0].macs / result.samples[0].uncached_macs == pytest.approx(
        report.macs / report.baseline_macs, rel=0.05
    )


def test_a_policy_without_effect_gives_the_uncached_image(folder, captions, tmp_path):
    file = tmp_path / "r.jsonl"
    text = printed(folder, "--spec", "tgate:m=50", *SMALL, "--no-peers", "--captions", captions, "--output", file)
    assert "identical" in text
    assert "never fired" in text
    (result,) = read(file)[0][:1]
    assert result.samples[0].psnr == math.inf


def test_compiled_blocks_draw_the_same(measured, folder, captions):
    given = expand(["tgate:m=3+deepcache:interval=2"], installed())
    setting = Setting(model=folder, captions=("a red cat",), device="cpu", threads=1, compiled="eager")
    (cell,) = Suite(setting, given, steps=(4,), peers=False).cells()
    result = measure(setting, cell)
    (eager,) = (one for one in read(measured)[0] if (one.cell.method, one.cell.specs) == ("cachekit", cell.specs))
    assert result.cell.compiled == "eager"
    assert commands.parsed("cachekit bench grid demo --compile eager")[1]["compiled"] == "eager"
    assert result.samples[0].psnr == pytest.approx(eager.samples[0].psnr)


def test_schedulers_steps_and_seeds_are_cells_of_their_own(folder, captions):
    suite = Suite(
        Setting(model=folder, captions=("a",)),
        expand(["tgate:m=2|3"], installed()),
        schedulers=["DDIM", "EulerDiscreteScheduler"],
        steps=(4, 6),
        seeds=(0, 1),
        peers=False,
    )
    found = suite.cells()
    assert len({cell.id for cell in found}) == len(found) == 16
    assert {cell.scheduler for cell in found} == {"DDIMScheduler", "EulerDiscreteScheduler"}


def test_a_forecast_is_compared_with_every_spacing_of_plain_steps(folder, captions, tmp_path):
    file = tmp_path / "r.jsonl"
    given = ["--spec", "forecast:interval=2", "--steps", "5", "--threads", "1", "--no-peers", "--captions", captions]
    text = printed(folder, *given, "--scheduler", "EulerDiscrete", "--output", file)
    assert "plain steps left out: EulerDiscreteScheduler takes no use_lu_lambdas" in text
    spaced = [cell for cell in cells(file) if cell.steps == 3]
    assert {cell.spacing for cell in spaced} == {"", "karras", "full_steps:forecast"}
    assert all(cell.method is Method.PLAIN and cell.uncached_steps == 5 for cell in spaced)
    (group,) = groups(read(file)[0])
    (row,) = (row for row in group.rows if row.cell.specs)
    best, own = group.best_plain(3), group.plain(3)
    assert best.psnr == max(row.psnr for row in group.rows if row.cell.steps == 3)
    assert group.gain_by_spacing(3) == best.psnr - own.psnr
    shown = texts(group, row)["plain steps at equal MACs"]
    assert shown.startswith(f"3, {best.cell.spelled}: {best.psnr:.1f} dB" if best is not own else "3: ")
    assert {round(row.macs / group.uncached.macs, 6) for row in group.rows if row.cell.steps == 3} == {0.6}
    before = file.read_bytes()
    printed(folder, *given, "--scheduler", "EulerDiscrete", "--output", file)
    assert file.read_bytes() == before


def test_an_architecture_is_timed_with_random_weights_and_never_judged():
    setting = Setting(model="sd15", captions=("a",), height=64, width=64, threads=1)
    (cell,) = Suite(setting, expand(["deepcache:interval=2"], installed()), steps=(2,), peers=False).cells()
    assert cell.model_hash
    assert cell.scheduler == "DDIMScheduler"


def test_without_specs_those_are_measured_that_fit(folder, captions, tmp_path):
    denoiser = tiny.pixart()
    denoiser.save_pretrained(tmp_path / "pixart")
    usual = expand(["tgate:m=2", "deepcache", "tgate:m=2+deepcache"], installed())
    assert fitting(folder, usual) == usual
    assert fitting(str(tmp_path / "pixart"), usual) == usual[:1]
    with pytest.raises(BenchError, match=r"none of the usual specs fits PixArtTransformer2DModel; name others"):
        fitting(str(tmp_path / "pixart"), usual[1:])


def test_the_images_of_a_row_have_a_distance_to_true_ones_when_they_are_enough(tmp_path):
    file = tmp_path / "r.jsonl"
    text = printed("demo", "--spec", "tgate:m=1", "--steps", 2, "--no-peers", "--captions", 2, "--output", file)
    assert "Frechet" in text
    (measured,) = groups(read(file)[0])
    assert {texts(measured, row)["Frechet"] for row in (measured.uncached, *measured.rows)} == {"-"}
    result = next(result for result in read(file)[0] if result.cell.specs)

    def shifted(seed, specs=("tgate:m=1",)):
        """Make the result of another seed, whose cached images are one unit away from the uncached ones."""
        plain = np.random.default_rng(seed).normal(size=(2, 16))
        samples = [
            sample.model_copy(update={"features": list(found + 1), "uncached_features": list(found)})
            for sample, found in zip(result.samples, plain)
        ]
        cell = result.cell.model_copy(update={"seed": seed, "specs": specs})
        return result.model_copy(update={"cell": cell, "samples": samples})

    (few,) = groups(map(shifted, range(15)))
    assert (few.rows[0].frechet_images, few.rows[0].frechet) == (30, None)
    other = [shifted(seed, ("tgate:m=9",)) for seed in range(16)]
    (group,) = groups([*map(shifted, range(16)), *other])
    assert [texts(group, row)["first"] == "-" for row in (group.uncached, *group.rows)] == [True, False, False]
    assert [row.frechet_images for row in (group.uncached, *group.rows)] == [32, 32, 32]
    assert texts(group, group.uncached)["Frechet"].endswith(" (n=32)")
    found = [sample.features for sample in group.rows[0].samples]
    assert group.rows[0].frechet == distance(gaussian_stats(found), result.reference)
    assert group.rows[0].frechet > group.uncached.frechet > 0


def test_the_embedded_model_is_judged_by_what_it_shows(tmp_path):
    file = tmp_path / "r.jsonl"
    printed("demo", "--spec", "tgate:m=2", "--steps", 4, "--no-peers", "--captions", 1, "--output", file)
    for result in read(file)[0]:
        assert result.samples[0].shown in (True, False)
        assert result.samples[0].uncached_shown in (True, False)


# -- results ----------------------------------------------------------------------------------------------


def test_a_second_run_measures_nothing(measured, folder, captions):
    before = measured.read_bytes()
    printed(folder, *GRID, *SMALL, "--captions", captions, "--output", measured)
    assert measured.read_bytes() == before


def test_an_interrupted_run_goes_on_where_it_was(measured, folder, captions, tmp_path):
    lines = measured.read_bytes().splitlines(keepends=True)
    file = tmp_path / "half.jsonl"
    file.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    result = run(folder, *GRID, *SMALL, "--captions", captions, "--output", file)
    assert result.exit_code == 0
    assert "line 4 is half written" in result.stderr
    assert file.read_bytes().startswith(b"".join(lines[:3]))
    listed = cells(file)
    assert len({cell.id for cell in listed}) == len(listed) == len(file.read_bytes().splitlines())
    assert {cell.id for cell in cells(measured) if cell.method is not Method.PLAIN} <= {cell.id for cell in listed}


def test_a_line_cut_off_at_the_very_beginning_is_no_foreign_file(measured, tmp_path):
    file = tmp_path / "r.jsonl"
    for length in (1, 5, 200):
        file.write_bytes(measured.read_bytes()[:length])
        assert len(Results(file).problems) == 1
        assert file.read_bytes() == b""


def test_a_whole_last_line_without_its_end_counts(measured, tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_bytes(measured.read_bytes()[:-1])
    assert Results(file).problems == []
    assert file.read_bytes() == measured.read_bytes()


def test_files_merge_without_doubles(measured, tmp_path):
    lines = measured.read_bytes().splitlines(keepends=True)
    one, other, both = (tmp_path / name for name in ("one.jsonl", "other.jsonl", "both.jsonl"))
    one.write_bytes(b"".join(lines[:3]))
    other.write_bytes(b"".join(lines[2:]))
    text = printed("--merge", one, "--merge", other, "--output", both)
    assert f"merged {len(lines)} results" in text
    assert both.read_bytes() == measured.read_bytes()
    assert "merged 0 results" in printed("--merge", one, "--output", both)


def test_every_field_of_a_cell_is_in_its_key(measured):
    cell = cells(measured)[0]
    others = {"method": Method.PLAIN, "specs": ("x",), "metrics": ("x",), "guidance": 2.5}
    numbers = ("steps", "uncached_steps", "seed", "height", "width")
    assert cell.spacing == ""
    for name, _ in cell:
        other = cell.model_copy(update={name: others.get(name, 99 if name in numbers else "x")})
        assert other.id != cell.id, name


@pytest.mark.parametrize("name", ["demo", "demo-dit", "sd15", "pixart"])
def test_the_stored_results_can_be_read(name):
    results, problems = read(STORED / f"{name}.jsonl")
    assert problems == []
    assert all(result.cell.id == result.id for result in results)
    for group in groups(results):
        for row in (group.uncached, *group.rows):
            shown = texts(group, row)
            assert all(shown[figure.name] for figure in FIGURES.values())
            assert min(row.seconds, row.speedup, row.macs, row.mac_reduction) > 0
        assert group.uncached.checked_images in (0, len(group.uncached.samples) // len(group.rows))


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to report"),
        (["sdlx"], "did you mean 'sdxl'?"),
        (["./no-such-folder"], "there is no such folder"),
        (["nobody/nothing"], "cannot read model 'nobody/nothing'"),
        (["{folder}", "--spec", "tgat:m=2"], "did you mean 'tgate'?"),
        (["{folder}", "--spec", "tgate:m=2|x"], "m=x"),
        (["{folder}", "--spec", "deepcache:branch=99"], "99"),
        (["{folder}", "--scheduler", "EulerDiscret"], "unknown scheduler 'EulerDiscret'"),
        (["{folder}", "--metric", "lpisp=x"], "did you mean 'lpips'?"),
        (["{folder}", "--metric", "lpips"], "lpips=PATH"),
        (["{folder}", "--dtype", "float8"], "unknown dtype"),
        (["{folder}", "--device", "nowhere"], "cannot use device 'nowhere'"),
        (["{folder}", "--compile", "inducto"], "did you mean 'inductor'?"),
        (["{folder}", "--executor", "proces"], "did you mean 'process'?"),
        (["{folder}", "--captions", "no-such-file"], "give a file or a number"),
        (["{folder}", "--html", "no/such/folder/r.html"], "cannot write"),
        (["{folder}", "--html", "{folder}"], "it is a folder"),
    ],
)
def test_a_refusal_is_one_line_and_loses_nothing(arguments, said, folder, measured, tmp_path):
    file = tmp_path / "r.jsonl"
    if arguments:
        file.write_bytes(measured.read_bytes())
    assert said in refused(*(text.format(folder=folder) for text in arguments), "--output", file)
    assert not arguments or file.read_bytes() == measured.read_bytes()


def test_another_format_and_a_foreign_file_are_left_alone(measured, tmp_path):
    file = tmp_path / "r.jsonl"
    record = json.loads(measured.read_bytes().splitlines()[0])
    for content, said in (
        (json.dumps({**record, "format": 99}) + "\n", "format 99"),
        ("# Notes\nkeep them\n", "not a result"),
        ("half a note", "not a result"),
        (json.dumps({**record, "samples": 3}) + "\n" + json.dumps(record) + "\n", "line 1: damaged"),
    ):
        file.write_text(content)
        assert said in refused("--output", file)
        assert said in refused("--merge", file, "--output", tmp_path / "new.jsonl")
        assert file.read_text() == content


def test_an_unwritable_output_is_told_before_anything_is_measured(folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(folder, "--output", tmp_path / "file" / "r.jsonl")
    assert "cannot" in refused(folder, "--output", tmp_path)


# -- executors --------------------------------------------------------------------------------------------


def test_a_cell_that_fails_is_told_and_the_others_go_on(folder):
    setting = Setting(model=folder, captions=("a",), threads=1)
    good, bad = Suite(setting, expand(["tgate:m=2|3"], installed()), steps=(4,), peers=False).cells()
    bad = bad.model_copy(update={"method": Method.PUBLISHED, "specs": ("adaptive_guidance:m=2",)})
    outcomes = dict(executors.outcomes(Crew("serial", 1), setting, [bad, good]))
    assert "adaptive_guidance" in outcomes[bad]
    assert outcomes[good].cell == good


def test_two_workers_measure_what_one_does_and_one_that_dies_loses_nothing(folder):
    setting = Setting(model=folder, captions=("a",), device="cpu", threads=1)
    wanted = Suite(setting, expand(["tgate:m=1|2|3|4"], installed()), steps=(4, 5, 6), peers=False).cells()
    outcomes = {}
    with Crew("process", 2) as crew:
        for cell, outcome in executors.outcomes(crew, setting, wanted[:3]):
            outcomes[cell] = outcome
        first = spawned()
        for cell, outcome in executors.outcomes(crew, setting, wanted[3:]):
            outcomes[cell] = outcome
            if len(outcomes) == 5:
                assert spawned() == first
                for worker in first:
                    worker.kill()
    assert set(outcomes) == set(wanted)
    for cell in list(outcomes)[:2]:
        alone = measure(setting, cell)
        assert [sample.psnr for sample in outcomes[cell].samples] == [sample.psnr for sample in alone.samples]
        assert outcomes[cell].samples[0].macs == alone.samples[0].macs
    last = next(cell for cell in reversed(wanted) if isinstance(outcomes[cell], str))
    assert outcomes[last].startswith(f"{last.label}: a worker died, perhaps for want of memory")


def spawned():
    return {one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())}


def is_worker(process):
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:  # another child, which has ended meanwhile
        return False


def test_workers_end_with_a_command_that_is_killed(folder, tmp_path):
    words = ["bench", "grid", folder, "--spec", "tgate:m=2", "--steps", "4", "--limit", "1", "--no-peers"]
    words += ["--executor", "process", "--workers", "1", "--threads", "1", "--output", str(tmp_path / "results.jsonl")]
    command = psutil.Popen(
        [sys.executable, "-c", "from cachekit.cli import app; app()", *words], stdout=subprocess.DEVNULL
    )
    workers: list[psutil.Process] = []
    while not workers:
        assert command.poll() is None
        workers = [child for child in command.children() if is_worker(child)]
        time.sleep(0.1)
    command.kill()
    command.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
