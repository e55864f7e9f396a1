"""Every shipped policy and the example pass all checks, each on two models or more; the command has all models."""

from __future__ import annotations

import contextlib
import functools
import sys

import pytest
from support import block_replays as replays
from support.sources import ROOT

import cachekit
from cachekit.testing import CHECKS, MODELS, Outcome, check_policy, parametrize_with_checks
from cachekit.testing.models import pipeline
from cachekit.testing.running import SOMEWHERE

sys.path.append(str(ROOT / "examples" / "cachekit-pyramid-lite"))
from cachekit_pyramid_lite.policy import PyramidLite

#: For each policy a spec that acts within a few steps, and the models for it.
SHIPPED = {
    "deepcache:interval=3": ["sd"],
    "tgate:m=3": ["pixart", "wan"],
    "tgate:m=3,sp_interval=2,keep=cond": ["sd", "pixart"],
    "cache:where=feed_forward,when=every(3),what=linear": ["pixart", "sd3"],
    "delta_dit": ["pixart", "sd3"],
    "null_text:after=3": ["pixart", "sd3"],
    "adaptive_guidance:m=3,linear=true": ["sd3", "wan"],
    "adaptive_guidance:threshold=0.5": ["sd3", "wan"],
    "forecast:interval=3": ["flux", "wan"],
    "pab": ["sd3", "wan"],
    "fora:interval=2": ["flux", "wan"],
    "text_kv": ["pixart", "wan"],
    "guidance_interval:first=1,stop=4": ["sd3", "wan"],
    "fastercache": ["sd3", "wan"],
    "taylorseer:interval=2,warm_up=1": ["pixart", "sd3"],
    "hicache:interval=2,warm_up=1": ["flux", "pixart"],
    "spectrum:warm_up=2": ["pixart", "sd3"],
    "easycache:threshold=99,first=1": ["pixart", "sd3"],
    "seacache:threshold=99": ["pixart", "sd3"],
    "fbcache:threshold=9": ["flux", "wan"],
    "teacache:threshold=9": ["pixart", "sd3"],
    "dicache:threshold=9": ["sd3", "wan"],
    "magcache:ratios=1,threshold=9": ["pixart", "flux"],
}
#: Those with figures or weights that are measured on a model.
MEASURED = {
    "smoothcache:threshold=9": ["pixart", "sd3"],
    "block_cache:threshold=9": ["sd"],
    "calibrated:interval=2": ["flux", "wan"],
}
EXAMPLE = PyramidLite(interval=3)
CASES = [(spec, model) for spec, models in (SHIPPED | MEASURED).items() for model in models]
#: Policies of UNets' blocks, which one model has.
OF_UNETS = {"deepcache", "block_cache"}
JOINT = {"sd3", "flux"}
#: Compilations take longest.
OTHERS = [name for name in CHECKS if name != "check_compiled"]
#: Why a check doesn't hold for a method, which the others pass.
PECULIAR = {
    "text_kv": {"check_differs": "it is exact"},
    "guidance_interval": {"check_standing_still": "it drops guidance"},
    "fastercache": {
        "check_standing_still": "it changes guidance with the timestep",
        "check_linear_ramp": "it extrapolates by a share of the difference",
    },
}


def name_of(spec):
    return spec.partition(":")[0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A function that adds a file of what is measured on a model to a spec that needs one."""
    folder = tmp_path_factory.mktemp("measured")

    @functools.cache
    def with_file(spec, model):
        if spec not in MEASURED:
            return spec
        path = folder / f"{name_of(spec)}-{model}.json"
        replays.measured(MODELS[model].make(), spec, 6).save(path)
        return f"{spec},file={path}"

    return with_file


@pytest.mark.parametrize(("spec", "model"), CASES)
def test_every_check_passes(spec, model, measured):
    expected = PECULIAR.get(name_of(spec), {})
    given = {"models": [model], "checks": [*OTHERS, SOMEWHERE], "expected": expected}
    results = check_policy(measured(spec, model), **given)
    assert [str(result) for result in results if result.outcome is Outcome.FAILED] == []
    assert {one.check for one in results if one.outcome is Outcome.EXPECTED} == set(expected)
    assert Outcome.REFUSED not in {result.outcome for result in results}


@parametrize_with_checks([EXAMPLE], models=["pixart", "flux"], checks=[*OTHERS, SOMEWHERE])
def test_the_example(check):
    check()


#: A spec of each policy. Weights can't be measured with the schedulers of the models that are compiled: for those see
#: tests/switches.
COMPILED = {name_of(spec): spec for spec in reversed([*SHIPPED, *MEASURED]) if name_of(spec) != "calibrated"}


@pytest.mark.parametrize("spec", [*COMPILED.values(), EXAMPLE], ids=str)
def test_compiled(spec, measured):
    model = "sd" if name_of(str(spec)) in OF_UNETS else "pixart"
    (result,) = check_policy(measured(spec, model), models=[model], checks=["check_compiled"])
    assert result.outcome is Outcome.PASSED, str(result)


def test_every_shipped_policy_is_checked():
    named = {name_of(spec) for spec in SHIPPED | MEASURED}
    # CAIR makes the choices of TGATE, so that what is checked of one holds for the other.
    cair, tgate = (cachekit.policies()[name] for name in ("cair", "tgate"))
    assert cair(n=3, keep="cond").choices() == tgate(m=3, keep="cond").choices()
    shipped = {name for name, made in cachekit.policies().items() if made.__module__.startswith("cachekit_")}
    assert shipped - {"cair"} <= named


def takes_joint_attention(spec):
    with contextlib.suppress(cachekit.SiteError):
        cachekit.apply(pipeline("sd3"), spec).remove()
        return True
    return False


def test_each_is_checked_on_joint_attention_where_it_can_and_on_every_way_that_branches_come():
    assert {model for _, model in CASES} == set(MODELS)
    for spec, models in (SHIPPED | MEASURED).items():
        assert len(models) >= 2 or name_of(spec) in OF_UNETS
        assert bool(JOINT.intersection(models)) == takes_joint_attention(spec), spec
