"""Comparisons: who runs when and how often, what the figures are, and how they are shown."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from support import tiny

import cachekit
from cachekit.attaching.lookup import attachment_of
from cachekit.bench.comparison import HEADER, Comparison, Configuration, Row, Sample, compare, equal_cost
from cachekit.bench.grid import picture_grid

CONFIGURATIONS = [
    Configuration(6),
    Configuration(6, ("tgate:m=2",)),
    Configuration(6, ("tgate:m=2", "deepcache:interval=2")),
    Configuration(6, ("adaptive_guidance:threshold=0.999",)),
]


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


@pytest.fixture(scope="module")
def compared(pipe):
    counts, Recorded.log = [], []
    result = compare(
        pipe,
        CONFIGURATIONS,
        ["1", "2", "3"],
        seed=5,
        judge=lambda image, prompt: prompt == "1",
        progress=lambda *count: counts.append(count),
    )
    return result, counts, list(Recorded.log)


def test_everything_is_warmed_up_before_turns_are_taken(compared):
    _, counts, log = compared
    assert counts == [(done, 20) for done in range(1, 21)]
    warm_up, timed = log[:5], log[5:]
    assert [specs for specs, *_ in warm_up[:4]] == [(), *(made.specs for made in CONFIGURATIONS[1:])]
    assert {prompt for _, _, prompt, _ in warm_up} == {"1"}
    rounds = [timed[start : start + 5] for start in range(0, 15, 5)]
    for index, turns in enumerate(rounds):
        assert {(prompt, seed) for _, _, prompt, seed in turns} == {(str(index + 1), 5 + index)}
        assert len({(specs, steps) for specs, steps, *_ in turns}) == 5
    assert len({turns[0][:2] for turns in rounds}) == 3


def test_plain_runs_are_timed_without_an_attachment(compared):
    _, _, log = compared
    assert [steps for specs, steps, *_ in log[5:] if specs is None].count(6) == 3
    assert () not in [specs for specs, *_ in log[5:]]


def test_nothing_stays_attached(pipe):
    before = {name: set(vars(module)) for name, module in pipe.unet.named_modules()}
    compare(pipe, CONFIGURATIONS[:2], ["1"], fewer_steps=False)
    assert {name: set(vars(module)) for name, module in pipe.unet.named_modules()} == before
    assert type(pipe) is Recorded


def test_costs_are_the_reports(compared, pipe):
    result, _, _ = compared
    for row in result.rows[1:4]:
        with cachekit.apply(pipe, row.configuration.specs) as attachment:
            pipe("1", num_inference_steps=6, generator=torch.Generator().manual_seed(5))
        report = attachment.report()
        assert row.samples[0].macs == report.macs
        assert row.samples[0].cache_bytes == report.cache_bytes
        assert result.rows[0].macs == report.baseline_macs


def test_fewer_steps_cost_most_nearly_what_the_composed_row_costs(compared):
    result, _, _ = compared
    uncached, composed, fewer = result.rows[0], result.rows[2], result.rows[-1]
    steps = fewer.configuration.steps
    assert fewer.configuration == Configuration(steps)
    assert fewer.macs == uncached.macs * steps / 6
    assert abs(fewer.macs - composed.macs) <= uncached.macs / 12


def test_equal_cost_looks_at_composed_configurations_first():
    made = [Configuration(10), Configuration(10, ("a",)), Configuration(10, ("a", "b")), Configuration(10, ("b", "c"))]
    assert equal_cost(made, [1000, 100, 480, 730]) == Configuration(5)
    assert equal_cost(made[:2], [1000, 110]) == Configuration(1)
    assert equal_cost(made[:2], [1000, 10]) == Configuration(1)
    assert equal_cost(made[:1], [1000]) == Configuration(10)


def test_likeness_and_verdicts(compared):
    result, _, _ = compared
    uncached, tgate = result.rows[:2]
    assert (uncached.psnr, uncached.ssim) == (math.inf, 1.0)
    assert 0 < tgate.psnr < math.inf
    assert 0 < tgate.ssim < 1
    assert [sample.shown for sample in tgate.samples] == [True, False, False]
    assert tgate.shown == 1


def test_without_a_judge_nothing_is_said_to_be_shown(pipe):
    result = compare(pipe, CONFIGURATIONS[:2], ["1"], fewer_steps=False)
    assert len(result.rows) == 2
    assert result.rows[1].shown is None
    assert result.cells(result.rows[1])[HEADER.index("shown")] == "-"


def test_a_policy_that_never_fires_is_told_once(pipe, caplog):
    result = compare(pipe, [Configuration(3), Configuration(3, ("tgate:m=9",))], ["1", "2"])
    assert result.warnings == ["tgate:m=9 never fired in this run of 3 guided steps"]
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


def sample(colour, seconds=0.5, macs=4_000_000_000, shown=True, psnr=30.0):
    return Sample(Image.new("RGB", (32, 32), colour), seconds, macs, 3 << 20, psnr, 0.9, shown)


@pytest.fixture
def drawn():
    plain = Row(Configuration(8), [sample("red", psnr=math.inf), sample("blue", psnr=math.inf)])
    cached = Row(Configuration(8, ("a", "b")), [sample("lime", 0.25, 10**9), sample("yellow", 0.25, 10**9, False)])
    return Comparison(("first", "second"), (plain, cached))


def test_the_table_as_markdown(drawn):
    assert drawn.markdown().splitlines() == [
        "| configuration | s/image | faster | GMACs | fewer | PSNR | SSIM | shown | kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| uncached, 8 steps | 0.500 | 1.00x | 4.000 | 1.00x | - | - | 2/2 | 3.0 MiB |",
        "| a + b | 0.250 | 2.00x | 1.000 | 4.00x | 30.0 | 0.900 | 1/2 | 3.0 MiB |",
    ]


def test_the_figures_as_json(drawn):
    data = json.loads(json.dumps(drawn.as_dict(), allow_nan=False))
    assert data["prompts"] == ["first", "second"]
    uncached, cached = data["rows"]
    assert (uncached["specs"], uncached["psnr"], uncached["images"][0]["psnr"]) == ([], None, None)
    assert (cached["specs"], cached["macs"], cached["shown"]) == (["a", "b"], 10**9, 1)
    assert [image["shown"] for image in cached["images"]] == [True, False]


def test_the_grid_has_a_row_per_prompt_and_a_column_per_configuration(drawn):
    picture = picture_grid(drawn, cell=40)
    colours = {colour: count for count, colour in picture.getcolors(1 << 16)}
    for name in ("red", "blue", "lime", "yellow"):
        assert colours[Image.new("RGB", (1, 1), name).getpixel((0, 0))] == 40 * 40


def test_the_grid_marks_what_is_shown(drawn):
    unjudged = Comparison(drawn.prompts, tuple(Row(row.configuration) for row in drawn.rows))
    for row, judged in zip(unjudged.rows, drawn.rows, strict=True):
        row.samples = [Sample(**{**vars(one), "shown": None}) for one in judged.samples]
    marked, plain = (dict(map(reversed, picture_grid(one).getcolors(1 << 16))) for one in (drawn, unjudged))
    green, red = (20, 140, 60), (200, 40, 40)
    assert green in marked
    assert red in marked
    assert green not in plain
    assert red not in plain
