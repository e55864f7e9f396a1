"""The presets that ship: they parse, they fit what they are for, their files are current."""

from __future__ import annotations

import functools
import warnings

import diffusers
import pytest
from support import tiny

from cachekit.applying import apply
from cachekit.errors import CachekitError, PresetWarning
from cachekit.interface.presets import Preset, shipped
from cachekit.interface.specs import parse_all
from cachekit.models.architectures import architecture, architectures, recognised
from cachekit.registry.catalog import installed

PRESETS = {name: Preset.load(path) for name, path in shipped().items()}
PUBLISHED = {name: preset for name, preset in PRESETS.items() if preset.evidence.source}
#: One architecture of each class, those that are quickest to build.
PLANNED = ("sd15", "pixart-alpha", "dit-xl", "sd3", "flux", "wan", "qwen-image", "hunyuan-video", "cogvideox")


@functools.cache
def denoiser(name):
    return architecture(name).build()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_parses_and_names_what_it_needs(name):
    policies = parse_all(f"preset:{name}", installed())
    assert set(PRESETS[name].requires) == {policy.name for policy in policies}
    assert PRESETS[name].summary


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_preset_has_a_source_and_classes_that_exist(name):
    evidence = PUBLISHED[name].evidence
    assert name.startswith(f"{evidence.architecture}-")
    assert len(evidence.source) > 20
    assert hasattr(diffusers, evidence.denoiser)
    assert evidence.scheduler is None or hasattr(diffusers, evidence.scheduler)
    assert architecture(evidence.architecture).cls == evidence.denoiser


def test_every_model_that_papers_measure_has_a_preset():
    wanted = {"sd15", "sd21", "sdxl", "pixart-alpha", "lcm-sdxl", "flux", "sd3", "qwen-image", "wan", "hunyuan-video"}
    assert wanted <= {preset.evidence.architecture for preset in PUBLISHED.values()}


@pytest.mark.parametrize(
    "name", [name for name, preset in PUBLISHED.items() if preset.evidence.architecture in PLANNED]
)
def test_a_published_preset_fits_its_architecture(name):
    known = architecture(PUBLISHED[name].evidence.architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PresetWarning)
        attachment = apply(denoiser(known.name), f"preset:{name}")
    with attachment:
        plan = attachment.plan(PUBLISHED[name].evidence.steps or known.steps, guided=known.guided)
    assert any(cell.value != "compute" for row in plan.rows for cell in row.actions)


@pytest.mark.parametrize("name", architectures())
def test_an_architecture_names_classes_that_exist(name):
    known = architecture(name)
    assert hasattr(diffusers, known.pipeline)
    assert hasattr(diffusers, known.scheduler)


@pytest.mark.parametrize("name", [*PLANNED, "pixart-sigma", "lcm-pixart"])
def test_an_architecture_is_recognised_by_its_config_and_its_scheduler(name):
    assert recognised(denoiser(name), architecture(name).scheduler) is architecture(name)


def test_a_guided_architecture_is_meant_where_no_scheduler_is_known():
    assert recognised(denoiser("lcm-pixart")) is architecture("pixart-alpha")
    assert recognised(tiny.sd().unet) is None


def test_presets_of_embedded_models_are_current():
    from benchmarks.presets import made

    current = dict(made())
    assert current == {name: preset for name, preset in PRESETS.items() if preset.evidence.model}


def test_a_preset_that_does_not_fit_says_so():
    with pytest.raises(CachekitError, match="chain of blocks"):
        apply(denoiser("sd15"), "preset:flux-fbcache")
