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

import cachekit
from cachekit.attaching.lookup import attachment_of
from cachekit.bench import demo, workbench
from cachekit.bench.cells import Cell, Method, Setting
from cachekit.bench.grid import picture_grid
from cachekit.bench.measuring import Configuration
from cachekit.bench.results import Result, Sample
from cachekit.bench.subjects import Subject
from cachekit.bench.summary import Group, Row
from cachekit.bench.tables import texts

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "demo-table.json"
SPECS = [("tgate:m=2",), ("tgate:m=2", "deepcache:interval=2"), ("adaptive_guidance:threshold=0.999",)]


def cell(specs, steps=6, seed=5):
    shared = {"model": "tiny", "model_hash": "", "captions": "", "metrics": (), "environment": "", "uncached_steps": 6}
    none = dict.fromkeys(("dtype", "device", "compiled", "height", "width", "guidance"))
    method = Method.CACHEKIT if specs else Method.PLAIN
    return Cell(method=method, specs=specs, steps=steps, scheduler="DDIMScheduler", seed=seed, **shared, **none)


class Recorded(StableDiffusionPipeline):
    """Read a prompt as a seed, and write down each call."""

    log: list = []

    def __call__(self, prompt=None, num_inference_steps=50, guidance_scale=5.0, generator=None, output_type="pil"):
        attachment = attachment_of(self.unet)
        specs = None if attachment is None else tuple(map(str, attachment.policies))
        self.log.append((specs, num_inference_steps, prompt, generator.initial_seed()))
        embeds = {"prompt_embeds": tiny.text(1, seed=int(prompt)), "negative_prompt_embeds": tiny.text(1, seed=4)}
        settings = {"guidance_scale": guidance_scale, "generator": generator, "output_type": output_type}
        return super().__call__(num_inference_steps=num_inference_steps, **embeds, **settings)


@pytest.fixture(scope="module")
def pipe():
    made = tiny.small()
    made.__class__ = Recorded
    return made


def bench(pipe, captions, **more):
    setting = Setting(model="tiny", captions=captions, threads=1, pictures=len(captions))
    return workbench.Workbench(setting, Subject(pipe, lambda prompt: {"prompt": prompt}), **more)


@pytest.fixture(scope="module")
def compared(pipe):
    counts, Recorded.log = [], []
    measured = bench(pipe, ("1", "2", "3"), ran=lambda: counts.append(len(Recorded.log)))
    group = demo.compare(measured, [cell(specs) for specs in SPECS])
    return group, counts, list(Recorded.log)


def test_everything_is_warmed_up_before_turns_are_taken(compared):
    _, counts, log = compared
    assert counts == list(range(1, 22))
    warm_up, timed = log[:6], log[6:]
    # The plain row runs twice: to be counted, and as its first run.
    assert [specs for specs, *_ in warm_up] == [(), *SPECS, (), None]
    assert {(prompt, seed) for _, _, prompt, seed in warm_up} == {("1", 5)}
    rounds = [timed[start : start + 5] for start in range(0, 15, 5)]
    for index, turns in enumerate(rounds):
        assert {(prompt, seed) for _, _, prompt, seed in turns} == {(str(index + 1), 5 + index)}
        assert len({(specs, steps) for specs, steps, *_ in turns}) == 5
    assert len({turns[0][:2] for turns in rounds}) == 3


def test_plain_runs_are_timed_without_an_attachment(compared):
    _, _, log = compared
    assert Counter(steps for specs, steps, *_ in log[6:] if specs is None)[6] == 3
    assert () not in [specs for specs, *_ in log[6:]]


def test_nothing_stays_attached(pipe):
    before = {name: set(vars(module)) for name, module in pipe.unet.named_modules()}
    demo.compare(bench(pipe, ("1",)), [cell(SPECS[0])])
    assert {name: set(vars(module)) for name, module in pipe.unet.named_modules()} == before
    assert type(pipe) is Recorded


def test_costs_are_the_reports(compared, pipe):
    group, _, _ = compared
    for row in group.rows[:3]:
        with cachekit.apply(pipe, row.cell.specs) as attachment:
            pipe("1", num_inference_steps=6, generator=torch.Generator().manual_seed(5))
        report = attachment.report()
        assert row.samples[0].macs == report.macs
        assert row.samples[0].cache_bytes == report.cache_bytes
        assert group.uncached.macs == report.baseline_macs


def test_the_uncached_runs_that_all_rows_share_count_once(compared):
    group, _, _ = compared
    uncached = group.uncached
    assert [sample.caption for sample in uncached.samples] == ["1", "2", "3"]
    for row in group.rows:
        assert [sample.uncached_seconds for sample in row.samples] == [sample.seconds for sample in uncached.samples]


def test_fewer_steps_cost_most_nearly_what_the_composed_row_costs(compared):
    group, _, _ = compared
    composed, fewer = group.rows[1], group.rows[-1]
    steps = fewer.cell.steps
    assert (fewer.cell.method, fewer.cell.specs) == (Method.PLAIN, ())
    assert fewer.macs == group.uncached.macs * steps / 6
    assert abs(fewer.macs - composed.macs) <= group.uncached.macs / 12


@pytest.mark.parametrize(
    ("costs", "steps"),
    [({("a",): 100, ("a", "b"): 480, ("b", "c"): 730}, 3), ({("a",): 170}, 1), ({("a",): 10}, 1), ({("a",): 999}, 6)],
)
def test_equal_cost_looks_at_composed_cells_first(costs, steps):
    assert demo.equal_cost({cell(specs): cost for specs, cost in costs.items()}, 1000) == cell((), steps)


def test_quality_is_that_of_the_images(compared):
    group, _, _ = compared
    assert (group.uncached.psnr, group.uncached.ssim) == (math.inf, 1.0)
    assert 0 < group.rows[0].psnr < math.inf
    assert 0 < group.rows[0].ssim < 1


def test_without_a_check_there_is_no_caption_match(compared):
    group, _, _ = compared
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
    with pytest.raises(cachekit.CachekitError, match="nothing on one side"):
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
        "| configuration | s/image | speedup | GMACs | MAC reduction | PSNR | SSIM | caption match | kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| uncached, 6 steps | 0.600 | 1.00x | 4.000 | 1.00x | identical | 1.000 | 100% (n=2) | - |",
        "| a + b | 0.250 | 2.40x | 1.000 | 4.00x | 30.0 | 0.900 | 50% (n=2) | 3.0 MiB |",
    ]


def test_every_figure_of_the_table_is_explained(drawn):
    for name in demo.HEADER[1:]:
        assert f"{name}: " in demo.LEGEND


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
        assert demo.table(demo.from_json(json.loads(json.dumps(data)))) == demo.table(group)


def test_the_stored_results_can_be_read():
    data = json.loads(STORED.read_text())
    group = demo.from_json(data)
    for row, kept in zip((group.uncached, *group.rows), data["rows"], strict=True):
        assert (list(row.cell.specs), row.cell.steps) == (kept["specs"], kept["steps"])
        assert (row.seconds, row.macs, row.ssim) == (kept["seconds"], kept["macs"], kept["ssim"])
        assert row.psnr == (math.inf if kept["psnr"] is None else kept["psnr"])
        assert row.caption_match == pytest.approx(kept["shown"] / len(kept["images"]))


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
