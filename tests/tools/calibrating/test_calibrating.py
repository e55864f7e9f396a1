"""Calibrations lead closer to the uncached trajectory, add up, and serve nothing else than they were made for."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from support import tiny
from support.comparisons import ROUNDING, compared

import cachekit
from cachekit import Calibrated, Calibration, CalibrationError, Moment
from cachekit.tools.calibrating import trajectories
from cachekit.tools.calibrating.sums import RIDGE

STEPS = 9
SPEC = "calibrated:interval=3"
COUNT = 3
#: Arguments that each prompt has of its own, `(1, tokens, ...)`.
PER_PROMPT = ("embeds", "mask")


def prompts_for(pipe: Any) -> list[dict[str, Any]]:
    """Arguments of a call for each of a few prompts."""
    many = tiny.arguments(pipe, batch=COUNT)
    texts = {name: value for name, value in many.items() if name.endswith(PER_PROMPT)}
    if type(pipe).__name__ == "FluxPipeline":
        texts |= {"negative_prompt_embeds": tiny.text(COUNT, seed=4)}
        texts |= {"negative_pooled_prompt_embeds": tiny.text(COUNT, seed=4)[:, 0]}
    return [{name: value[place : place + 1] for name, value in texts.items()} for place in range(COUNT)]


def arguments_for(pipe: Any) -> dict[str, Any]:
    """Arguments that all calls share, without those of prompts."""
    left_out = ("num_inference_steps", "generator", "guidance_scale")
    given = tiny.arguments(pipe)
    return {name: value for name, value in given.items() if name not in left_out and not name.endswith(PER_PROMPT)}


def latents(pipe: Any, prompt: dict[str, Any], seed: int, steps: int = STEPS, **changes: Any) -> torch.Tensor:
    """The latents of one prompt."""
    noise = torch.Generator().manual_seed(seed)
    given = {**arguments_for(pipe), **prompt, "guidance_scale": 5.0, **changes}
    output = pipe(num_inference_steps=steps, generator=noise, **given)
    return output.frames if hasattr(output, "frames") else output.images


def calibrated(pipe: Any, **changes: Any) -> Calibration:
    """A calibration with all prompts."""
    given = {"num_inference_steps": STEPS, "guidance_scale": 5.0, **arguments_for(pipe), **changes}
    return cachekit.calibrate(pipe, given.pop("spec", SPEC), given.pop("prompts", prompts_for(pipe)), **given)


def euler(pipe: Any) -> Any:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def dpm(pipe: Any) -> Any:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


#: Branches in one batch, in calls of their own, true guidance, and a learned variance under a multistep scheduler.
PIPES = {
    "sd": lambda: euler(tiny.small()),
    "wan": tiny.wan,
    "flux": tiny.flux,
    "pixart": lambda: dpm(tiny.pixart()),
}
CHANGES: dict[str, dict[str, Any]] = {"flux": {"true_cfg_scale": 3.0}}


@pytest.fixture(scope="module", params=PIPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline, its calibration and the file, and the changes of its calls."""
    changes = CHANGES.get(request.param, {})
    pipe = PIPES[request.param]()
    scale = {"guidance_scale": 3.0} if changes else {}
    calibration = calibrated(pipe, **scale)
    path = tmp_path_factory.mktemp(request.param) / "weights.json"
    calibration.save(path)
    return pipe, calibration, path, ({**changes, "guidance_scale": 3.5} if changes else {})


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SD under Euler, its calibration and the file."""
    pipe = euler(tiny.small())
    calibration = calibrated(pipe)
    path = tmp_path_factory.mktemp("sd") / "weights.json"
    calibration.save(path)
    return pipe, calibration, path


def distance(pipe: Any, wanted: list[torch.Tensor], changes: dict[str, Any]) -> float:
    made = [latents(pipe, prompt, seed, **changes) for seed, prompt in enumerate(prompts_for(pipe))]
    return float(sum((one - other).norm() ** 2 for one, other in zip(made, wanted)))


def test_it_comes_closer_to_the_uncached_latents_than_a_line(made: Any) -> None:
    pipe, _, path, changes = made
    wanted = [latents(pipe, prompt, seed, **changes) for seed, prompt in enumerate(prompts_for(pipe))]
    with cachekit.apply(pipe, "forecast:interval=3"):
        line = distance(pipe, wanted, changes)
    with cachekit.apply(pipe, f"calibrated:file={path}"):
        found = distance(pipe, wanted, changes)
    assert 0 < found < line / 2
    assert distance(pipe, wanted, changes) == 0  # undone to the bit


def test_the_counts_are_those_of_the_plan(made: Any) -> None:
    pipe, calibration, path, changes = made
    calls = 2 if calibration.key.separate else 1
    with cachekit.apply(pipe, f"calibrated:file={path}") as attachment:
        latents(pipe, prompts_for(pipe)[0], 0, **changes)
        report, plan = attachment.report(), attachment.plan(STEPS)
    full = [step for step, row in enumerate(plan.rows) if row.actions[0] is not cachekit.Action.REUSE]
    assert full == calibration.key.full == [0, 3, 6, 8]
    assert (report.calls, report.left_out) == (len(full) * calls, (STEPS - len(full)) * calls)
    assert report.baseline_macs == pytest.approx(report.macs * STEPS / len(full))


def test_a_run_is_the_one_that_was_fitted(sd: Any) -> None:
    """What the last step lacks of the uncached latents is the error in the file."""
    pipe, calibration, path = sd
    wanted = [latents(pipe, prompt, seed) for seed, prompt in enumerate(prompts_for(pipe))]
    with cachekit.apply(pipe, f"calibrated:file={path}"):
        off = distance(pipe, wanted, {})
    last = calibration.fits[0].steps[-1]
    sigma = calibration_sigma(pipe)
    assert off == pytest.approx(sigma**2 * last.error**2 * last.square, rel=1e-2)


def calibration_sigma(pipe: Any) -> float:
    """By how much an output moves the sample in Euler's last step."""
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    return float(scheduler.sigmas[-2] - scheduler.sigmas[-1])


@compared("calibrated", "least squares by numpy: the weights of a step", ["small"], ROUNDING)
def test_weights_are_those_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a step equal what numpy finds for the terms of all elements, one row for each."""
    seen = []

    class Spy(trajectories.Sums):
        @classmethod
        def of(cls, names: Any, terms: Any, target: Any) -> Any:
            seen.append((names, [term.double().numpy().ravel() for term in terms], target.double().numpy().ravel()))
            return super().of(names, terms, target)

    monkeypatch.setattr(trajectories, "Sums", Spy)
    found = calibrated(euler(tiny.small())).fits[0].steps
    names, terms, target = seen[4]
    assert set(names) == {"last.uncond", "last.cond", "before.uncond", "before.cond", "sample"}
    table = np.stack(terms, 1)
    penalty = np.diag(np.sqrt(RIDGE * (table**2).sum(0)))
    naive, *_ = np.linalg.lstsq(np.vstack([table, penalty]), np.concatenate([target, np.zeros(len(names))]), rcond=None)
    assert np.allclose(naive, [found[4].weights[name] for name in names], rtol=1e-5, atol=1e-7)
    full = seen[6][0]
    assert set(full) == {*names, "fresh.uncond", "fresh.cond"}


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_batches_in_threads_have_the_weights_of_one_batch(name: str) -> None:
    pipe = PIPES[name]()
    whole, parts = calibrated(pipe, batch=COUNT), calibrated(pipe, batch=1)
    for one, other in zip(whole.fits[0].steps, parts.fits[0].steps):
        assert one.elements == other.elements
        assert other.error == pytest.approx(one.error, rel=1e-2, abs=1e-4)
        assert np.allclose(one.sums.products, other.sums.products, rtol=1e-2)


def test_sums_of_other_processes_are_added() -> None:
    """Two calibrations that exchange their sums have the weights of one with all prompts."""
    pipes = [euler(tiny.small()), euler(tiny.small())]
    shares = [prompts_for(pipes[0])[:1], prompts_for(pipes[0])[1:]]
    barrier, table, found = threading.Barrier(2, timeout=60), {}, {}

    def exchange(place: int) -> Any:
        def add(step: int, sums: Any) -> Any:
            table[step, place] = sums
            barrier.wait()
            return table[step, 0] + table[step, 1]

        return add

    def run(place: int) -> None:
        found[place] = calibrated(pipes[place], prompts=shares[place], seed=place, exchange=exchange(place))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = calibrated(euler(tiny.small())).fits[0].steps
    assert [step.weights for step in found[0].fits[0].steps] == [step.weights for step in found[1].fits[0].steps]
    for one, other in zip(whole, found[0].fits[0].steps):
        assert other.error == pytest.approx(one.error, rel=1e-2, abs=1e-4)


def test_a_longer_reference_is_met_at_the_same_points(tmp_path: Any) -> None:
    """Aimed at many uncached steps, the images come closer to these than as many uncached steps as the run has."""
    pipe = euler(tiny.small())
    wanted = [latents(pipe, prompt, seed, steps=60) for seed, prompt in enumerate(prompts_for(pipe))]
    plain = distance(pipe, wanted, {})
    found = calibrated(pipe, reference_steps=60, spec="calibrated:interval=2")
    assert found.reference_steps == 60
    found.save(tmp_path / "long.json")
    with cachekit.apply(pipe, f"calibrated:file={tmp_path / 'long.json'}"):
        assert distance(pipe, wanted, {}) < plain * 0.75


# -- files ------------------------------------------------------------------------------------------------


def test_a_saved_calibration_is_loaded_as_it_was(sd: Any) -> None:
    _, calibration, path = sd
    assert Calibration.load(path) == calibration
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_merged_sums_are_added_and_solved_anew(sd: Any) -> None:
    pipe, calibration, _ = sd
    other = calibrated(pipe, seed=50)
    fit = Calibration.merge(calibration, other).fits[0]
    assert (fit.prompts, fit.runs) == (2 * COUNT, 2)
    for merged, one, two in zip(fit.steps, calibration.fits[0].steps, other.fits[0].steps):
        sums = one.sums + two.sums
        assert np.allclose(merged.sums.products, sums.products)
        assert np.allclose(list(merged.weights.values()), sums.solve())
    twice = Calibration.merge(calibration, calibration).fits[0].steps[5]
    assert twice.weights == pytest.approx(calibration.fits[0].steps[5].weights)


def test_calibrations_of_something_else_are_not_merged(sd: Any) -> None:
    pipe, calibration, _ = sd
    with pytest.raises(CalibrationError, match="to merge differ: steps 9, not 6"):
        Calibration.merge(calibration, calibrated(pipe, num_inference_steps=6))


def damaged(path: Any, **changes: Any) -> str:
    data = json.loads(path.read_text())
    data.update(changes)
    return json.dumps(data)


def with_weight(value: Any) -> Any:
    """Make a file with another weight of the sample in step 4."""

    def change(path: Any) -> str:
        data = json.loads(path.read_text())
        data["fits"][0]["steps"][4]["weights"]["sample"] = value
        return json.dumps(data)

    return change


def with_term(old: str, new: str, steps: tuple[int, ...] = (4,)) -> Any:
    """Make a file with another name for a term of some steps."""

    def change(path: Any) -> str:
        data = json.loads(path.read_text())
        for step in steps:
            weights = data["fits"][0]["steps"][step]["weights"]
            data["fits"][0]["steps"][step]["weights"] = {
                name.replace(old, new): value for name, value in weights.items()
            }
        return json.dumps(data)

    return change


def with_key(**changes: Any) -> Any:
    """Make a file that is for something else."""
    return lambda path: damaged(path, key={**json.loads(path.read_text())["key"], **changes})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda path: path.read_text()[:500], "not a complete calibration file"),
        (lambda path: damaged(path, version=7), "has version 7, this cachekit reads 1"),
        (with_weight(float("nan")), "fits.0.steps.4.weights.sample: Input should be a finite number"),
        (with_weight("0.25"), "fits.0.steps.4.weights.sample: Input should be a valid number"),
        (
            with_term("last.cond", "latest.cond"),
            "step 4 has weights for .*latest.cond, .*, where its .* give before.co",
        ),
        (with_term("", "x", tuple(range(STEPS))), "other.json': calibration: step 0 has weights for x"),
        (with_term("last", "fresh"), "step 4 has weights for .*fresh.cond.* give .*last.cond"),
        (with_key(full=[0, 4, 6, 8]), "step 3 has weights for .*fresh.cond.* give last.cond, last.uncond, sample;"),
        (with_key(full=[]), "full steps none are not those of a run of 9 steps, in order from 0 on; make it again"),
        (with_key(full=[0, 6, 3, 8]), "full steps 0;6;3;8 are not those"),
        (with_key(full=[3, 6, 8]), "full steps 3;6;8 are not those"),
        (with_key(full=[0, 3, 6, 9]), "full steps 0;3;6;9 are not those"),
        (with_key(timesteps=[9.0, 4.0]), "calibration: 2 timesteps for 9 steps"),
        (with_key(branches=[]), "key.branches: List should have at least 1 item"),
        (with_key(branches=[""]), "key.branches.0: String should have at least 1 character"),
        (with_key(branches=["cond"]), "step 0 has weights for fresh.cond, fresh.uncond, sample"),
        (with_key(separate=True), "step 0 has weights for .* give fresh.cond, .*, sample.cond, sample.uncond; make"),
        (lambda path: damaged(path, colour="red"), "colour: Extra inputs are not permitted"),
        (lambda path: damaged(path, fits=[]), "fits: List should have at least 1 item"),
        (lambda path: "[]", "has version None"),
        (lambda path: None, "cannot read"),
    ],
)
def test_a_file_that_is_no_calibration_is_one_line(sd: Any, tmp_path: Any, content: Any, said: str) -> None:
    pipe, _, path = sd
    text, other = content(path), tmp_path / "other.json"
    if text is not None:
        other.write_text(text)
    with pytest.raises(CalibrationError, match=said) as caught:
        cachekit.apply(pipe, f"calibrated:file={other}")
    assert "\n" not in str(caught.value)
    cachekit.remove(pipe)


# -- what a calibration isn't for -------------------------------------------------------------------------


def another_model(pipe: Any) -> None:
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.5)


def ancestral(pipe: Any) -> None:
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)


def karras(pipe: Any) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)


@pytest.mark.parametrize(
    ("change", "spec", "changes", "said"),
    [
        (another_model, "", {}, r"the run has model \w+, not \w+"),
        (ancestral, "", {}, "scheduler EulerAncestralDiscreteScheduler, not EulerDiscreteScheduler"),
        (karras, "", {}, "the scheduler's use_karras_sigmas true, not false"),
        (None, "", {"steps": 10}, "steps 10, not 9"),
        (None, ",interval=2", {}, r"full steps every\(last=true\) 0;2;4;6;8, not every\(n=3,last=true\) 0;3;6;8"),
        (None, "", {"guidance_scale": 4.0}, "guidance scale 4, not 5"),
        (None, "", {"guidance_scale": 1.0}, "branches cond in one call, not uncond and cond in one call"),
        (None, "", {"guidance_rescale": 0.5}, "scales beside guidance"),
    ],
)
def test_it_serves_nothing_else(sd: Any, change: Any, spec: str, changes: dict[str, Any], said: str) -> None:
    _, _, path = sd
    pipe = euler(tiny.small())
    if change:
        change(pipe)
    prompt = prompts_for(pipe)[0]
    uncached = latents(pipe, prompt, 0, **changes)
    before = tiny.state_of(pipe)[1:]
    computed: list[int] = []
    with cachekit.apply(pipe, f"calibrated:file={path}{spec}"):
        watch = pipe.unet.conv_in.register_forward_hook(lambda *given: computed.append(1))
        with pytest.raises(CalibrationError, match=said) as caught:
            latents(pipe, prompt, 0, **changes)
        watch.remove()
    assert (computed, str(caught.value).count("\n")) == ([], 0)
    assert str(path) in str(caught.value)
    assert tiny.state_of(pipe)[1:] == before
    assert torch.equal(latents(pipe, prompt, 0, **changes), uncached)


@pytest.mark.parametrize("spec", ["adaptive_guidance:every=2", "adaptive_guidance:m=4"])
def test_a_policy_that_drops_a_branch_is_refused_when_the_run_begins(sd: Any, spec: str) -> None:
    pipe, _, path = sd
    computed: list[int] = []
    watch = pipe.unet.conv_in.register_forward_hook(lambda *given: computed.append(1))
    said = r"step [14] has cond in its call, others have uncond and cond; keep guidance as it is throughout a run$"
    with cachekit.apply(pipe, [f"calibrated:file={path}", spec]), pytest.raises(CalibrationError, match=said):
        latents(pipe, prompts_for(pipe)[0], 0)
    watch.remove()
    assert computed == []


def test_a_branch_that_a_step_has_no_weights_for_is_an_error() -> None:
    output = torch.ones(1, 4, 2, 2)
    shared = {"weights": [{"fresh.cond": 1.0, "sample.cond": 0.5}]}
    made = Calibrated().amend((output,), (), Moment(0, 2, branches=("cond",), shared=shared), (output,))
    assert torch.equal(made[0], output * 1.5)
    with pytest.raises(CalibrationError, match="step 0 has uncond in its call, its weights are for others;"):
        Calibrated().amend((output,), (), Moment(0, 2, branches=("uncond",), shared=shared), (output,))


def test_scales_in_between_are_on_the_line(sd: Any, tmp_path: Any) -> None:
    pipe, _, _ = sd
    calibration = calibrated(pipe, guidance_scale=[6.0, 4.0])
    assert calibration.scales == [4.0, 6.0]
    low, high = (fit.steps[4].weights for fit in calibration.fits)
    between = calibration.weights_at(4.5, "it")[4]
    assert between["sample"] == pytest.approx(0.75 * low["sample"] + 0.25 * high["sample"])
    path = tmp_path / "scales.json"
    calibration.save(path)
    prompt = prompts_for(pipe)[0]
    with cachekit.apply(pipe, f"calibrated:file={path}"):
        latents(pipe, prompt, 0, guidance_scale=5.0)
        with pytest.raises(CalibrationError, match=r"guidance scale 6\.5, not 4 to 6"):
            latents(pipe, prompt, 0, guidance_scale=6.5)


def test_without_a_file_the_error_names_the_command(sd: Any) -> None:
    pipe, _, _ = sd
    with (
        cachekit.apply(pipe, SPEC),
        pytest.raises(CalibrationError, match=r"no calibration ships .* cachekit calibrate"),
    ):
        latents(pipe, prompts_for(pipe)[0], 0)
    with pytest.raises(cachekit.SpecError, match="give file=, made by cachekit calibrate, or interval="):
        cachekit.apply(pipe, "calibrated")


# -- what can't be calibrated -----------------------------------------------------------------------------


def half_noise(pipe: Any) -> dict[str, Any]:
    ancestral(pipe)
    return {}


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (half_noise, "EulerAncestralDiscreteScheduler: its step isn't linear"),
        (lambda pipe: {"spec": "deepcache:interval=2"}, "skips more or other than whole calls"),
        (lambda pipe: {"prompts": []}, "no prompts"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line_and_leaves_no_trace(prepare: Any, said: str) -> None:
    pipe = euler(tiny.small())
    changes = prepare(pipe)
    with tiny.leaves_no_trace(pipe), pytest.raises(CalibrationError, match=said) as caught:
        calibrated(pipe, **changes)
    assert "\n" not in str(caught.value)


def test_prompts_that_equal_the_negative_prompt_are_refused() -> None:
    """Before any trajectory is computed; without guidance there is nothing to divide."""
    pipe = cachekit.demo_pipeline()
    given = {"num_inference_steps": 3, "batch": 2}
    red, blue = "a large red circle", "a small blue star"
    computed: list[int] = []
    watch = pipe.unet.conv_in.register_forward_hook(lambda *given: computed.append(1))
    for negative, prompts, named in [({}, [red, blue, ""], ""), ({"negative_prompt": blue}, [red, blue, ""], blue)]:
        with tiny.leaves_no_trace(pipe), pytest.raises(CalibrationError) as caught:
            cachekit.calibrate(pipe, "calibrated:interval=2", prompts, guidance_scale=3.0, **given, **negative)
        assert str(caught.value) == (
            f"prompt {named!r} is encoded exactly like the negative prompt: with equal branches, nothing shows how"
            " weights divide between them; leave it out, or give another prompt"
        )
    assert len(computed) == 3  # the first step of two batches, and of one
    watch.remove()
    assert cachekit.calibrate(pipe, "calibrated:interval=2", [""], guidance_scale=1.0, **given).fits[0].prompts == 1


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_embeddings_that_equal_the_negative_ones_are_refused(name: str) -> None:
    pipe = PIPES[name]()
    first, *others = prompts_for(pipe)
    negative = {name: first[name] for name in first if name.startswith("negative")}
    same = {**negative, **{name.removeprefix("negative_"): value for name, value in negative.items()}}
    with pytest.raises(CalibrationError, match=r"^prompt 3 is encoded exactly like the negative prompt"):
        calibrated(pipe, prompts=[first, others[0], same], batch=2)


def test_two_denoisers_are_refused() -> None:
    with pytest.raises(CalibrationError, match="transformer and transformer_2; only one can be calibrated"):
        calibrated(tiny.wan(boundary=0.5))


def test_models_that_are_moved_about_need_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = euler(tiny.small())
    pipe._all_hooks = ["offloaded"]
    with pytest.raises(CalibrationError, match="which 3 batches at once can't share; give a batch="):
        calibrated(pipe, batch=1)
    assert calibrated(pipe, batch=COUNT).fits[0].prompts == COUNT


def test_a_negative_prompt_serves_all_prompts() -> None:
    pipe = cachekit.demo_pipeline()
    prompts = ["a large red circle top left on white", "a small blue star top right on black and a large red circle"]
    given = {"num_inference_steps": 3, "guidance_scale": 3.0}
    found = cachekit.calibrate(pipe, "calibrated:interval=2", prompts[:1] * 2, negative_prompt="a red circle", **given)
    assert found.fits[0].prompts == 2


def test_calibrating_leaves_no_trace(sd: Any) -> None:
    pipe, _, _ = sd
    with tiny.leaves_no_trace(pipe):
        seen: list[tuple[int, int]] = []
        calibrated(pipe, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 2 * STEPS) for step in range(1, 2 * STEPS + 1)]
    assert "step" not in vars(pipe.scheduler)
