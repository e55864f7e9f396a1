"""The calibrations that ship serve the embedded models, and beat plain steps of equal cost."""

from __future__ import annotations

import pytest
import torch

import cachekit
from cachekit import Calibration, CalibrationError
from cachekit.models.demo import heldout_captions
from cachekit.models.loading import scheduler_for
from cachekit.tools.calibrating.calibration import FOLDER, path_of, ships
from cachekit.tools.calibrating.verifying import psnr
from cachekit.upstream.fingerprints import fingerprint
from cachekit.upstream.pipelines import denoiser_of

FILES = sorted(FOLDER.glob("*.json"))


@pytest.fixture(scope="module", params=["unet", "dit", "flow"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(kind):
    pipe = cachekit.demo_pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, steps):
    prompts = heldout_captions(3, seed=8)
    noise = [torch.Generator().manual_seed(place) for place in range(len(prompts))]
    given = {"num_inference_steps": steps, "guidance_scale": 4.2, "generator": noise, "output_type": "np"}
    return pipe(prompts, **given).images


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_each_is_whole_and_named_for_what_it_serves(path):
    found = Calibration.load(path)
    assert path_of(found.key) == path
    assert found.scales == [3.5, 5.0, 7.5]
    assert repr(found).startswith(f"Calibration(model='{found.key.model}', scheduler='{found.key.scheduler}', steps=")
    assert len(repr(found)) < 200


def test_the_pipeline_runs_with_its_own_guidance(pipe):
    with cachekit.apply(pipe, "calibrated:interval=4") as attachment:
        pipe(heldout_captions(1, seed=8)[0], num_inference_steps=25, output_type="latent")
        assert attachment.report().mac_reduction > 3


def test_a_file_serves_its_own_full_steps_and_no_others_of_the_same_number():
    key = Calibration.load(FILES[0]).key
    assert ships(key.model, key.scheduler, key.steps, key.full, 3.5)
    assert not ships(key.model, key.scheduler, key.steps, [0, *(step - 1 for step in key.full[1:])], 3.5)
    assert not ships("", key.scheduler, key.steps, key.full, 3.5)


def test_a_file_serves_the_guidance_that_it_was_made_for():
    made = Calibration.load(FILES[0])
    run = (made.key.model, made.key.scheduler, made.key.steps, made.key.full)
    assert all(ships(*run, scale) for scale in made.scales)
    assert not any(ships(*run, scale) for scale in (None, 1.0, made.scales[-1] + 1))


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ("calibrated:interval=7", r"^no calibration ships for every\(n=7,last=true\), model "),
        (
            ["calibrated:interval=4", "tgate:m=10"],
            r"^no calibration ships for full steps 0;4;8;[\d;]+24: another policy adds steps to those of every\(n=4,la",
        ),
        (
            [f"calibrated:file={FOLDER / '45206fa249054a50-eulerdiscrete-25-7.json'}", "tgate:m=10"],
            r"-7.json': the run has full steps mask\(steps=0;4.*: another policy adds steps; leave it out",
        ),
    ],
)
def test_steps_that_nothing_ships_for_are_named(specs, said):
    pipe = cachekit.demo_pipeline()
    pipe.scheduler = scheduler_for(pipe, "euler")
    with cachekit.apply(pipe, specs), pytest.raises(CalibrationError, match=said) as caught:
        images(pipe, 25)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_of_the_weights_that_ship(kind, dtype):
    found = {Calibration.load(path).key.model for path in FILES}
    assert len(found) == 3
    assert fingerprint(denoiser_of(cachekit.demo_pipeline(kind, dtype))) in found


@pytest.mark.parametrize("scheduler", ["euler", "dpm++"])
def test_an_interval_is_enough_for_the_embedded_models(pipe, scheduler):
    if scheduler == "dpm++" and len(pipe.scheduler.compatibles) < 2:
        pytest.skip("the flow model has one scheduler")
    pipe.scheduler = scheduler_for(pipe, scheduler)
    uncached = images(pipe, 25)
    with cachekit.apply(pipe, "calibrated:interval=4") as attachment:
        cached = images(pipe, 25)
        assert (attachment.report().calls, attachment.report().left_out) == (7, 18)
    assert psnr(cached, uncached) > psnr(images(pipe, 7), uncached) + 3
