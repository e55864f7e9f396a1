"""Every shipped policy and the example pass all checks, each on models with its targets; the command has all models."""

from __future__ import annotations

import sys

import pytest
from support import block_replays as replays
from support.sources import ROOT

import cachekit
from cachekit.testing import CHECKS, MODELS, Outcome, check_policy, parametrize_with_checks
from cachekit.testing.running import SOMEWHERE

sys.path.append(str(ROOT / "examples" / "cachekit-pyramid-lite"))
from cachekit_pyramid_lite.policy import PyramidLite

#: A spec of each policy that acts within a few steps, and the model for it.
SHIPPED = {
    "sd": ["deepcache:interval=3", "tgate:m=3,sp_interval=2,keep=cond"],
    "pixart": ["tgate:m=3", "cache:where=feed_forward,when=every(3),what=linear", PyramidLite(interval=3)],
    "sd3": ["delta_dit", "null_text:after=3"],
    "wan": ["adaptive_guidance:m=3,linear=true", "adaptive_guidance:threshold=0.5"],
    "flux": ["forecast:interval=3"],
}
#: Compilations take longest.
OTHERS = [name for name in CHECKS if name != "check_compiled"]


def on(model):
    return parametrize_with_checks(SHIPPED[model], models=[model], checks=[*OTHERS, SOMEWHERE])


@on("sd")
def test_on_sd(check):
    check()


@on("pixart")
def test_on_pixart(check):
    check()


@on("sd3")
def test_on_sd3(check):
    check()


@on("wan")
def test_on_wan(check):
    check()


@on("flux")
def test_on_flux(check):
    check()


@parametrize_with_checks(["deepcache:interval=3"], models=["sd"], checks=["check_compiled"])
def test_compiled_on_sd(check):
    check()


@parametrize_with_checks(["forecast:interval=3"], models=["pixart"], checks=["check_compiled"])
def test_compiled_on_pixart(check):
    check()


#: Settings with which published methods act within a few steps of a tiny model.
PUBLISHED = [
    "pab",
    "fora:interval=2",
    "text_kv",
    "guidance_interval:first=1,stop=4",
    "fastercache",
    "taylorseer:interval=2,warm_up=1",
    "hicache:interval=2,warm_up=1",
    "spectrum:warm_up=2",
    "easycache:threshold=99,first=1",
    "seacache:threshold=99",
    "fbcache:threshold=9",
    "teacache:threshold=9",
    "dicache:threshold=9",
    "magcache:ratios=1,threshold=9",
]
#: Why a check doesn't hold for a method, which the others pass.
PECULIAR = {
    "text_kv": {"check_differs": "it is exact"},
    "guidance_interval:first=1,stop=4": {"check_standing_still": "it drops guidance"},
    "fastercache": {
        "check_standing_still": "it changes guidance with the timestep",
        "check_linear_ramp": "it extrapolates by a share of the difference",
    },
}


@parametrize_with_checks(
    [spec for spec in PUBLISHED if spec not in PECULIAR], models=["pixart"], checks=[*OTHERS, SOMEWHERE]
)
def test_published_methods(check):
    check()


@pytest.mark.parametrize("spec", PECULIAR)
def test_peculiar_methods(spec):
    results = check_policy(spec, models=["pixart"], checks=[*OTHERS, SOMEWHERE], expected=PECULIAR[spec])
    assert [str(result) for result in results if result.outcome is Outcome.FAILED] == []
    assert {one.check for one in results if one.outcome is Outcome.EXPECTED} == set(PECULIAR[spec])


#: Policies with figures or weights that are measured on a model, and the model.
MEASURED = {"smoothcache:threshold=9": "pixart", "block_cache:threshold=9": "sd", "calibrated:interval=2": "flux"}


@pytest.mark.parametrize("spec", MEASURED)
def test_measured_methods(spec, tmp_path):
    model = MODELS[MEASURED[spec]]
    path = tmp_path / "measured.json"
    replays.measured(model.make(), spec, 6).save(path)
    results = check_policy(f"{spec},file={path}", models=[model.name], checks=[*OTHERS, SOMEWHERE])
    assert [str(result) for result in results if result.outcome is Outcome.FAILED] == []
    assert {result.outcome for result in results} == {Outcome.PASSED, Outcome.SKIPPED}


def test_every_shipped_policy_is_checked():
    named = {str(spec).partition(":")[0] for specs in (*SHIPPED.values(), PUBLISHED, MEASURED) for spec in specs}
    # CAIR makes the choices of TGATE, so that what is checked of one holds for the other.
    cair, tgate = (cachekit.policies()[name] for name in ("cair", "tgate"))
    assert cair(n=3, keep="cond").choices() == tgate(m=3, keep="cond").choices()
    shipped = {name for name, made in cachekit.policies().items() if made.__module__.startswith("cachekit_")}
    assert shipped - {"cair"} <= named
    assert set(SHIPPED) == set(MODELS)


@pytest.mark.parametrize("spec", ["delta_dit", "forecast"])
def test_what_a_model_refuses_is_skipped(spec):
    (mark,) = [parametrize_with_checks([spec], models=["sd"], checks=["check_undo"])]
    (param,) = mark.args[1]
    assert param.id == f"check_undo-sd-{spec}"
    (case,) = param.values
    if spec == "delta_dit":
        with pytest.raises(pytest.skip.Exception, match="refused: delta_dit: looked for a chain of blocks"):
            case()
    else:
        case()
