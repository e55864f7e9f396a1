"""Figures of an analysis equal those computed by hand, and the command writes them as JSON, tables and pictures."""

from __future__ import annotations

import functools
import json
import math
from xml.etree import ElementTree

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from support import commands, tiny

import cachekit
from cachekit.models.demo import LCM_STEPS, heldout_captions
from cachekit.tools.analysis import noise
from cachekit.tools.analysis.captions import usable_captions
from cachekit.tools.analysis.changes import Changes, Notes, curves
from cachekit.tools.analysis.charts import Curve, chart
from cachekit.tools.analysis.comparing import gates, verdicts
from cachekit.tools.analysis.parts import Analysis
from cachekit.tools.bench import frechet
from cachekit.tools.bench.cells import BenchError, Setting
from cachekit.tools.bench.subjects import load
from cachekit.upstream.prediction import times_of
from cachekit.upstream.stepping import StepCall, predicted_noise, watched

STEPS = 4


@pytest.fixture(scope="module")
def recorded():
    """A tiny pipeline's curves, and every output of its cross-attention and of the denoiser, by hooks."""
    pipe, outputs = tiny.small(), {}
    for name, module in tiny.denoiser_of(pipe).named_modules():
        if name.endswith(".attn2") or not name:
            outputs[name] = []
            module.register_forward_hook(functools.partial(lambda name, *call: outputs[name].append(call[-1]), name))
    plain = tiny.latents(pipe, steps=STEPS)
    for kept in outputs.values():
        kept.clear()
    notes = Notes()
    with cachekit.apply(pipe, Changes.noting(cachekit.sites(pipe).values(), notes)) as attachment:
        assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)
        assert attachment.report().warnings == []
    notes.read()
    return curves(notes), {
        name: [one[0] if isinstance(one, tuple) else one for one in kept] for name, kept in outputs.items()
    }


def relative(new, old):
    return [float((one - other).norm() / other.norm()) for one, other in zip(new, old)]


def test_changes_of_cross_attention_are_those_of_its_outputs(recorded):
    found, outputs = recorded
    curve, sites = found["cross_attention"], [name for name in outputs if name]
    assert curve["sites"] == len(sites) == len(curve["by_site"])
    for place, step in enumerate(range(1, STEPS)):
        each = {name: relative(outputs[name][step], outputs[name][step - 1]) for name in sites}
        values = torch.tensor([value for one in each.values() for value in one])
        assert curve["steps"][place] == step
        assert curve["relative"]["mean"][place] == pytest.approx(float(values.mean()), rel=1e-4)
        assert curve["relative"]["spread"][place] == pytest.approx(float(values.std(correction=0)), rel=1e-3)
        for name, mine in each.items():
            assert curve["by_site"][name]["relative"]["mean"][place] == pytest.approx(sum(mine) / len(mine), rel=1e-4)


def test_changes_of_the_denoiser_and_of_guidance(recorded):
    found, outputs = recorded
    whole = outputs[""]
    wanted = [sum((one - other).norm() for one, other in zip(*pair)) / 2 for pair in zip(whole[1:], whole)]
    assert found["denoiser"]["l2"]["mean"] == pytest.approx([float(value) for value in wanted], rel=1e-4)
    differences = [output.chunk(2)[1] - output.chunk(2)[0] for output in whole]
    wanted = [relative(*pair)[0] for pair in zip(differences[1:], differences)]
    assert found["guidance"]["relative"]["mean"] == pytest.approx(wanted, rel=1e-4)
    assert {"self_attention", "feed_forward", "block"} <= found.keys()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_predicted_noise_of_a_perfect_prediction_is_the_noise(kind, prediction):
    scheduler = kind(prediction_type=prediction)
    scheduler.set_timesteps(5)
    clean, noise, place = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), 2
    timestep = scheduler.timesteps[place : place + 1]
    time = times_of(scheduler, None, 5)[place]
    velocity = time.alpha * noise - time.sigma * clean
    output = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction]
    sample = scheduler.add_noise(clean, noise, timestep)
    scheduler._step_index = place
    call = StepCall(scheduler, {"model_output": output, "sample": sample, "timestep": timestep[0]})
    assert torch.allclose(predicted_noise(call, time), noise, atol=1e-3)


def test_the_predicted_noise_of_a_flow():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    time = times_of(scheduler, None, 5)[2]
    sample = (1 - time.sigma) * clean + time.sigma * noise
    call = StepCall(scheduler, {"model_output": noise - clean, "sample": sample, "timestep": scheduler.timesteps[2]})
    assert torch.allclose(predicted_noise(call, time), noise, atol=1e-4)


def test_gates_keep_their_share_of_the_run():
    assert (gates(25), gates(50), gates(4), gates(2)) == ([3, 5, 10], [6, 10, 20], [1, 2], [1])


def test_the_line_on_noise_says_which_curve_stays_with_the_text_in_all_steps():
    whole, near, far = ({"mean": mean, "spread": [0.5] * 4} for mean in ([1.0] * 4, [1, 1, 1.1, 1.1], [0, 0, 1.5, 1.5]))
    lines = {"the paper's order": (near, far), "not the paper's order": (far, near), "a tie": (whole, whole)}
    for verdict, (first, last) in lines.items():
        curves_of = {"text in all steps": whole, "text before step 2": first, "text from step 2 on": last}
        assert noise.order(curves_of, 2).endswith(f" text from step 2 on: {verdict}")
    assert noise.rows({"text": far}, 2) == [["text", *(f"{mean:.4f} +- 0.5000" for mean in (0, 0, 1.5, 1.5))]]


def test_verdicts_name_the_figures_by_which_the_papers_order_holds():
    verdict = {"spec": "null_text:after=3", "is_tie": False, "is_papers_order": True}
    found = [
        {**verdict, "figure": "frechet"},
        {**verdict, "figure": "psnr", "is_papers_order": False},
        {**verdict, "figure": "caption_match", "is_papers_order": False},
        {**verdict, "figure": "caption_match", "is_tie": True, "spec": "tgate:m=3"},
    ]
    assert verdicts(found) == {
        "null_text:after=3": "yes: Frechet; no: PSNR, caption match",
        "tgate:m=3": "tie: caption match",
    }


def test_a_chart_has_a_line_and_a_band_for_each_curve():
    drawn = chart("a & b", "L2", {"one <": Curve([1, 2], [0.5, 1.0], [0.1, 0.0]), "two": Curve([1], [0.2], [0.0])})
    tree = ElementTree.fromstring(drawn)
    tags = [element.tag.rpartition("}")[2] for element in tree.iter()]
    assert (tags.count("polyline"), tags.count("polygon")) == (2, 2)
    assert {"a & b", "one <", "two"} <= {element.text for element in tree.iter()}
    points = [tuple(map(float, pair.split(","))) for pair in tree.find(".//{*}polyline").get("points").split()]
    assert points[0][0] < points[1][0]
    assert points[0][1] > points[1][1]


class Words:
    """A tokenizer of words, with a begin and an end."""

    model_max_length = 6

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": [0, *text.split(), 1]})


class Worded:
    tokenizer = Words()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a red circle\n\na blue star\n", "line 2 is empty; write a caption in each line"),
        ("a red circle\n  \n\na blue star", "line 2 is empty"),
        ("a star\na star on a large square\n", "line 2 has 8 tokens; Worded takes at most 6, begin and end included"),
    ],
)
def test_captions_that_are_empty_or_cut_off_are_refused(tmp_path, text, reason):
    path = tmp_path / "captions.txt"
    path.write_text(text)
    with pytest.raises(BenchError) as error:
        usable_captions(str(path), None, Worded())
    assert reason in str(error.value)
    assert str(path) in str(error.value)
    assert usable_captions(str(path), 1, Worded()) == (text.split("\n")[0],)


def test_a_caption_beyond_what_the_pipeline_reads_is_refused(tmp_path):
    class Shorter(Worded):
        def __call__(self, prompt=None, max_sequence_length=5):
            """Read fewer tokens than the tokenizer gives, as PixArt does of T5's."""

    path = tmp_path / "captions.txt"
    path.write_text("a red star on white\n")
    with pytest.raises(BenchError, match="line 1 has 7 tokens; Shorter takes at most 5"):
        usable_captions(str(path), None, Shorter())


def test_a_caption_that_one_of_several_encoders_reads_to_its_end_is_taken(tmp_path):
    class Longer(Words):
        model_max_length = 8

    class Twice(Worded):
        tokenizer_2 = Longer()

    path = tmp_path / "captions.txt"
    path.write_text("a star on a large square\n")
    assert usable_captions(str(path), None, Twice()) == ("a star on a large square",)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command printed for the embedded model, and its folder."""
    folder = tmp_path_factory.mktemp("analysis") / "out"
    captions = folder.parent / "captions.txt"
    captions.write_text(heldout_captions(1, 78)[0])  # its statistics are remembered, and other tests don't use it
    options = ["--captions", captions, "--steps", STEPS, "--scheduler", "euler", "--output", folder]
    parts = [word for part in ("changes", "noise", "schedulers") for word in ("--only", part)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frechet, "RENDERED", 2)
        return commands.printed("analyze", "demo", *options, *parts), folder


def test_the_command_writes_figures_tables_and_pictures(written):
    printed, folder = written
    data = json.loads((folder / "analysis.json").read_text())
    assert data.keys() == {"settings", "changes", "noise", "schedulers"}
    assert len(data["changes"]["cross_attention"]["relative"]["mean"]) == STEPS - 1
    assert list(data["noise"]) == ["text in all steps", "text before step 2", "text from step 2 on"]
    whole, first, last = (one["mean"] for one in data["noise"].values())
    assert len(whole) == STEPS
    assert whole[:2] == first[:2]
    assert whole[2:] != first[2:]
    assert whole[0] != last[0]
    (group,) = data["schedulers"]["groups"]
    assert [row["specs"] for row in group["rows"]] == [[], ["tgate:m=2"], ["null_text:after=2"], ["null_text:before=2"]]
    assert all(math.isfinite(row["psnr"]) for row in group["rows"][1:])
    assert {order["figure"] for order in data["schedulers"]["orders"]} == {"caption_match", "psnr"}
    Image.open(folder / "schedulers-EulerDiscreteScheduler-4.png").verify()
    assert {"changes.svg", "changes-cross_attention.svg", "noise.svg"} <= {path.name for path in folder.iterdir()}
    assert (
        "- mean of the predicted noise from step 2 on, distance to text in all steps: "
        in (folder / "tables.md").read_text()
    )
    for text in (
        "Mean of the predicted noise",
        "text from step 2 on",
        "cross_attention",
        "tgate:m=2",
        "papers' order",
    ):
        assert text in printed
        assert text in (folder / "tables.md").read_text()


def test_without_guidance_there_are_no_images_with_text_in_a_part_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(frechet, "RENDERED", 2)
    folder = tmp_path / "out"
    captions = tmp_path / "captions.txt"
    captions.write_text(heldout_captions(1, 78)[0])
    parts = [word for part in ("noise", "lengths", "schedulers") for word in ("--only", part)]
    printed = commands.printed("analyze", "demo-lcm", "--captions", captions, *parts, "--output", folder)
    assert "without guidance there is no branch without text" in printed
    data = json.loads((folder / "analysis.json").read_text())
    assert data["settings"]["steps"] == LCM_STEPS
    assert list(data["noise"]) == ["text in all steps"]
    assert data["lengths"] == {"groups": [], "orders": []}
    (group,) = data["schedulers"]["groups"]
    assert (group["scheduler"], [row["specs"] for row in group["rows"]]) == ("LCMScheduler", [[], ["tgate:m=2"]])


def test_a_run_that_the_scheduler_refuses_is_left_out_with_its_reason():
    setting = Setting(model="demo-lcm", captions=tuple(heldout_captions(1, 78)))
    found = Analysis(setting, load(setting), steps=51, seed=0).run("schedulers")
    (note,) = found.notes
    assert note.startswith("LCMScheduler, 51 steps, is left out: The combination of `original_steps x strength`: 50")
    assert (found.tables, found.data["groups"]) == ([], [])


def test_noise_that_a_scheduler_adds_is_of_the_seed_where_its_steps_are_watched():
    pipe = cachekit.demo_pipeline("lcm")
    call = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe(**call, generator=torch.Generator().manual_seed(1)).images
    twin = watched(pipe, lambda step: step.run())
    assert torch.equal(twin(**call, generator=torch.Generator().manual_seed(1)).images, plain)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("demo", "--only", "nois"), "unknown part 'nois' (did you mean 'noise'?); allowed: changes, noise, text, "),
        (("sd15",), "sd15 is an architecture, which has no weights; give a folder, a hub id, or 'demo'"),
        (("demo", "--scheduler", "eular"), "unknown scheduler 'eular'"),
        (("demo", "--captions", "nowhere.txt"), "cannot read captions 'nowhere.txt'"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, reason):
    result = commands.run("analyze", *arguments, "--output", tmp_path / "no")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert reason in result.stderr
    assert not (tmp_path / "no").exists()
