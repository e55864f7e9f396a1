"""The demo's comparison: what runs when and how often, what the figures are, and how they are shown."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from support import tiny
from support.cells import cell

import cachekit
from cachekit.attaching.lookup import attachment_of
from cachekit.tools.bench import demo, workbench
from cachekit.tools.bench.cells import Method, Setting
from cachekit.tools.bench.grid import picture_grid
from cachekit.tools.bench.measuring import Configuration
from cachekit.tools.bench.results import Result, Sample
from cachekit.tools.bench.subjects import Subject
from cachekit.tools.bench.summary import Group, Row
from cachekit.tools.bench.tables import texts

STORED = Path(__file__).parents[3] / "benchmarks" / "results"
SPECS = [("tgate:m=2",), ("tgate:m=2", "deepcache:interval=2"), ("forecast",)]


class Recorded(StableDiffusionPipeline):
    """Read a prompt as a seed, and write down each call."""

    log: list = []

    def __call__(self, prompt=None, num_inference_steps=50, guidance_scale=5.0, timesteps=None, generator=None):
        attachment = attachment_of(self.unet)
        specs = None if attachment is None else tuple(map(str, attachment.policies))
        embeds = {"prompt_embeds": tiny.text(1, seed=int(prompt)), "negative_prompt_embeds": tiny.text(1, seed=4)}
        settings = {"guidance_scale": guidance_scale, "generator": generator, "timesteps": timesteps}
        output = super().__call__(num_inference_steps=num_inference_steps, **embeds, **settings)
        table = tuple(self.scheduler.timesteps.tolist())
        self.log.append((specs, num_inference_steps, prompt, generator.initial_seed(), table))
        return output


@pytest.fixture(scope="module")
def pipe():
    made = tiny.small(layers_per_block=1)
    made.__class__ = Recorded
    return made


def bench(pipe, captions, **more):
    setting = Setting(model="tiny", captions=captions, threads=1, pictures=len(captions))
    return workbench.Workbench(setting, Subject(pipe, lambda prompt: {"prompt": prompt}), **more)


@pytest.fixture(scope="module")
def compared(pipe):
    counts, prepared, Recorded.log = [], [], []
    measured = bench(pipe, ("1", "2", "3"), ran=lambda: counts.append(len(Recorded.log)))
    group = demo.compare(measured, [cell(specs) for specs in SPECS], prepared=prepared.append)
    return group, counts, prepared, list(Recorded.log)


def test_everything_is_warmed_up_before_turns_are_taken(compared):
    group, counts, (contenders,), log = compared
    assert counts == list(range(1, len(log) + 1))
    assert len(group.rows) == contenders
    warm_up, timed = log[: -3 * (contenders + 1)], log[-3 * (contenders + 1) :]
    assert [specs for specs, *_ in warm_up[:4]] == [(), *SPECS]
    # Plain rows run twice: to be counted, and as their first run.
    assert Counter(specs for specs, *_ in warm_up[4:]) == {(): contenders - 3, None: contenders - 3}
    assert {(prompt, seed) for _, _, prompt, seed, _ in warm_up} == {("1", 5)}
    rounds = [timed[start :: contenders + 1] for start in range(contenders + 1)]
    assert all([prompt for _, _, prompt, *_ in turns] == ["1", "2", "3"] for turns in rounds)
    assert all([seed for *_, seed, _ in turns] == [5, 6, 7] for turns in rounds)
    assert len({(specs, table) for specs, *_, table in timed}) == contenders + 1
    assert len({timed[start][::4] for start in range(0, len(timed), contenders + 1)}) == 3


def test_plain_runs_are_timed_without_an_attachment(compared):
    _, _, (contenders,), log = compared
    timed = log[-3 * (contenders + 1) :]
    assert Counter(steps for specs, steps, *_ in timed if specs is None)[6] == 3
    assert () not in [specs for specs, *_ in timed]


def test_nothing_stays_attached(pipe):
    before = {name: set(vars(module)) for name, module in pipe.unet.named_modules()}
    demo.compare(bench(pipe, ("1",)), [cell(SPECS[0])])
    assert {name: set(vars(module)) for name, module in pipe.unet.named_modules()} == before
    assert type(pipe) is Recorded


def test_costs_are_the_reports(compared, pipe):
    group = compared[0]
    for row in group.rows[:3]:
        with cachekit.apply(pipe, row.cell.specs) as attachment:
            pipe("1", num_inference_steps=6, generator=torch.Generator().manual_seed(5))
        report = attachment.report()
        assert row.samples[0].macs == report.macs
        assert row.samples[0].cache_bytes == report.cache_bytes
        assert group.uncached.macs == report.baseline_macs


def test_the_uncached_runs_that_all_rows_share_count_once(compared):
    group = compared[0]
    uncached = group.uncached
    assert [sample.caption for sample in uncached.samples] == ["1", "2", "3"]
    for row in group.rows:
        assert [sample.uncached_seconds for sample in row.samples] == [sample.seconds for sample in uncached.samples]


def test_plain_steps_cost_most_nearly_what_each_row_costs(compared):
    group = compared[0]
    for row in group.rows[:3]:
        steps = row.plain_steps()["MACs"]
        fewer = group.plain(steps)
        assert (fewer.cell.method, fewer.cell.specs) == (Method.PLAIN, ())
        assert fewer.macs == group.uncached.macs * steps / 6
        assert abs(fewer.macs - row.macs) <= group.uncached.macs / 12


def test_plain_steps_have_every_spacing(compared):
    group, _, _, log = compared
    spacings = [row.cell.spacing for row in group.rows if row.cell.method is Method.PLAIN and row.cell.steps == 4]
    assert spacings == ["", "lu_lambdas", "karras", "full_steps:forecast"]
    tables = {specs: table for specs, steps, _, _, table in log if steps == 6}
    whole = tables[None]
    spaced = {table for specs, steps, _, _, table in log if specs is None and steps == 4}
    assert len(spaced) == 4
    assert tuple(whole[step] for step in (0, 2, 4, 5)) in spaced


def test_a_scheduler_without_a_setting_has_no_row_for_it(pipe):
    group = demo.compare(bench(pipe, ("1",)), [cell(SPECS[2], scheduler="EulerDiscreteScheduler")])
    assert [row.cell.spacing for row in group.rows] == ["", "", "karras", "full_steps:forecast"]
    assert group.notes == ["plain steps left out: EulerDiscreteScheduler takes no use_lu_lambdas"]
    group = demo.compare(bench(pipe, ("1",)), [cell(SPECS[2], scheduler="DDIMScheduler")])
    assert [row.cell.spacing for row in group.rows] == ["", ""]
    assert group.notes == [
        "plain steps left out: DDIMScheduler takes no use_lu_lambdas",
        "plain steps left out: DDIMScheduler takes no use_karras_sigmas",
        "plain steps left out: DDIMScheduler takes no custom timesteps",
    ]


def test_the_pipeline_keeps_its_scheduler(pipe):
    demo.compare(bench(pipe, ("1",)), [cell(SPECS[2])])
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert not pipe.scheduler.config.use_lu_lambdas
    assert not pipe.scheduler.config.use_karras_sigmas


def test_only_optional_cells_are_left_out_when_they_are_refused(pipe):
    refused, fine = ("deepcache:branch=99",), cell(SPECS[0])
    group = demo.compare(bench(pipe, ("1",)), [cell(refused), fine], optional=[refused])
    assert group.rows[0].cell == fine
    (line,) = (note for note in group.notes if "branch" in note)
    assert line.startswith("deepcache:branch=99 is left out: ")
    with pytest.raises(cachekit.CachekitError, match="branches"):
        demo.compare(bench(pipe, ("1",)), [cell(refused), fine])


def test_only_optional_configurations_are_left_out_when_they_do_not_fit():
    good, bad = Configuration(4, ("tgate",)), Configuration(4, ("delta_dit",))
    chosen = demo.comparison([good, bad], ["a"], 0, optional=[bad])
    assert [one.specs for one in chosen.cells] == [("tgate",)]
    assert [line.partition(":")[0] for line in chosen.left_out] == ["delta_dit is left out"]
    with pytest.raises(cachekit.CachekitError):
        demo.comparison([good, bad], ["a"], 0)


def test_quality_is_that_of_the_images(compared):
    group = compared[0]
    assert (group.uncached.psnr, group.uncached.ssim) == (math.inf, 1.0)
    assert 0 < group.rows[0].psnr < math.inf
    assert 0 < group.rows[0].ssim < 1


def test_without_a_check_there_is_no_caption_match(compared):
    group = compared[0]
    assert group.rows[1].caption_match is None
    assert texts(group, group.rows[1])["caption match"] == "-"


def test_a_policy_that_never_fires_is_reported_once(pipe, caplog):
    group = demo.compare(bench(pipe, ("1", "2")), [cell(("tgate:m=9",), 6)])
    assert group.warnings == ["tgate:m=9 never fired in this run of 6 guided steps"]
    assert caplog.records == []


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("tgate", ("tgate",)),
        ("tgate:m=3+deepcache:interval=2", ("tgate:m=3", "deepcache:interval=2")),
        ("tgate + deepcache", ("tgate", "deepcache")),
        ("adaptive_guidance:threshold=1e+0", ("adaptive_guidance:threshold=1e+0",)),
    ],
)
def test_specs_are_joined_by_plus(text, specs):
    assert Configuration.parse(text, 4) == Configuration(4, specs)


@pytest.mark.parametrize("text", ["", "tgate+", "+tgate", "tgate++deepcache"])
def test_an_empty_side_of_plus_is_refused(text):
    with pytest.raises(cachekit.CachekitError, match=r"nothing on one side|no policy; write"):
        Configuration.parse(text, 4)


# -- how it is shown -------------------------------------------------------------------------------------------


def sample(caption, seconds, macs, shown):
    return Sample(
        caption=caption,
        seconds=seconds,
        uncached_seconds=0.5 if caption == "first" else 0.7,
        macs=macs,
        uncached_macs=4_000_000_000,
        cache_bytes=3 << 20,
        psnr=30.0,
        ssim=0.9,
        shown=shown,
        uncached_shown=True,
    )


def picture(colour):
    return workbench._data_uri(Image.new("RGB", (32, 32), colour))


def group_of(samples, colours):
    made = cell(("a", "b"))
    pictures = [
        (one.caption, picture(colour), picture(plain)) for one, colour, plain in zip(samples, colours, ["red", "blue"])
    ]
    result = Result(id=made.id, cell=made, environment={}, first_seconds=None, samples=samples, pictures=pictures)
    return Group([Row(made, [result])])


@pytest.fixture
def drawn():
    return group_of([sample("first", 0.25, 10**9, True), sample("second", 0.25, 10**9, False)], ["lime", "yellow"])


def test_the_table_as_markdown(drawn):
    assert demo.page(drawn).splitlines()[:4] == [
        "| configuration | GMACs | MAC reduction | s/image | speedup | PSNR | caption match | SSIM | kept"
        " | plain steps at equal MACs |",
        f"| --- |{' ---: |' * 9}",
        "| uncached, 6 steps | 4.000 | 1.00x | 0.600 | 1.00x | identical | 100% (n=2) | 1.000 | - | - |",
        "| a + b | 1.000 | 4.00x | 0.250 | 2.40x | 30.0 | 50% (n=2) | 0.900 | 3.0 MiB | 2 |",
    ]


def plain_row(spacing, psnr, shown=True):
    samples = [sample(name, 0.25, 10**9, shown).model_copy(update={"psnr": psnr}) for name in ("first", "second")]
    made = cell(("a", "b")).plain(2, spacing)
    return Row(made, [Result(id=made.id, cell=made, environment={}, first_seconds=None, samples=samples)])


@pytest.mark.parametrize(
    ("values", "psnr"), [((math.inf, 30.0), 30.0), ((math.inf, math.inf, 30.0), math.inf), ((20.0, 30.0), 25.0)]
)
def test_similarity_is_finite_unless_most_images_are_identical(values, psnr):
    samples = [sample("first", 0.25, 10**9, True).model_copy(update={"psnr": value}) for value in values]
    made = cell(("a",))
    assert Row(made, [Result(id="", cell=made, environment={}, first_seconds=None, samples=samples)]).psnr == psnr


def test_the_best_spacing_stands_for_its_number_of_steps(drawn):
    drawn.rows += [plain_row("", 20.0), plain_row("lu_lambdas", 23.5), plain_row("karras", 21.0)]
    *_, cached, plain = demo.table(drawn)
    assert cached[-1] == "2, lu_lambdas: 23.5 dB (3.5 by spacing), 100% match"
    assert plain[0] == "2 plain steps, lu_lambdas"
    assert len(demo.table(drawn)) == 3


@pytest.mark.parametrize(("spacing", "name"), [("", "the own spacing"), ("karras", "karras")])
def test_a_spacing_that_shows_more_captions_is_named_too(drawn, spacing, name):
    drawn.rows += [plain_row("lu_lambdas", 23.5, False), plain_row(spacing, 21.0)]
    shown = texts(drawn, drawn.rows[0])["plain steps at equal MACs"]
    assert shown.endswith(f", 0% match (100% with {name})")


def test_the_schedulers_own_spacing_can_be_the_best(drawn):
    drawn.rows += [plain_row("", 25.0), plain_row("full_steps:a+b", 23.5)]
    *_, cached, plain = demo.table(drawn)
    assert cached[-1] == "2: 25.0 dB, 100% match"
    assert plain[0] == "2 plain steps"
    assert drawn.rows[-1].label == "2 plain steps, timesteps of a+b"


def test_every_figure_of_the_table_is_explained(drawn):
    for name in demo.HEADER[1:-1]:
        assert f"{name}: " in demo.LEGEND
    assert "Plain steps at equal cost: " in demo.LEGEND


def test_the_figures_as_json(drawn):
    data = json.loads(json.dumps(demo.to_json(drawn), allow_nan=False))
    assert data["prompts"] == ["first", "second"]
    uncached, cached = data["rows"]
    assert (uncached["specs"], uncached["psnr"], uncached["images"][0]["psnr"]) == ([], None, None)
    assert (cached["specs"], cached["macs"], cached["caption_match"], cached["speedup"]) == (
        ["a", "b"],
        10**9,
        0.5,
        2.4,
    )
    assert [image["shown"] for image in cached["images"]] == [True, False]


def test_json_is_read_back(drawn, compared):
    for group in (drawn, compared[0]):
        data = {"seed": 5, "versions": {}, **demo.to_json(group)}
        assert demo.page(demo.from_json(json.loads(json.dumps(data)))) == demo.page(group)


@pytest.mark.parametrize("name", ["demo-table.json", "demo-table-euler.json"])
def test_the_stored_results_can_be_read(name):
    data = json.loads((STORED / name).read_text())
    group = demo.from_json(data)
    for row, kept in zip((group.uncached, *group.rows), data["rows"], strict=True):
        assert (list(row.cell.specs), row.cell.steps) == (kept["specs"], kept["steps"])
        assert row.cell.spacing == kept["spacing"]
        assert (row.seconds, row.macs, row.ssim) == (kept["seconds"], kept["macs"], kept["ssim"])
        assert row.psnr == (math.inf if kept["psnr"] is None else kept["psnr"])
        assert row.caption_match == pytest.approx(kept["caption_match"])


def test_the_picture_has_a_line_per_caption_and_a_column_per_configuration(drawn):
    picture = picture_grid(drawn, cell=40)
    colours = {colour: count for count, colour in picture.getcolors(1 << 16)}
    for name in ("red", "blue", "lime", "yellow"):
        assert colours[Image.new("RGB", (1, 1), name).getpixel((0, 0))] == 40 * 40


def test_the_picture_marks_caption_matches(drawn):
    unchecked = group_of(
        [one.model_copy(update={"shown": None, "uncached_shown": None}) for one in drawn.rows[0].samples],
        ["lime", "yellow"],
    )
    marked, plain = (dict(map(reversed, picture_grid(one).getcolors(1 << 16))) for one in (drawn, unchecked))
    green, red = (20, 140, 60), (200, 40, 40)
    assert green in marked
    assert red in marked
    assert green not in plain
    assert red not in plain
