"""Properties of the shipped policies, and which of them combine."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from support import tiny
from support.commands import printed

import cachekit
from cachekit.cli.samples import samples
from cachekit.driving.setup import Setup
from cachekit.errors import ConflictError, SiteError
from cachekit.registry.catalog import installed
from cachekit.tools.coverage.properties import clashes
from cachekit.upstream.pipelines import denoisers_of

SAMPLES = samples()


@pytest.mark.parametrize("make", [tiny.small, tiny.pixart], ids=["UNet", "transformer"])
def test_all_pairs_combine_but_those_that_are_listed(make):
    bare = Setup.of(denoisers_of(make()), [], installed())
    assert {*cachekit.policies()} - {*SAMPLES} == {"cache"}
    # Whether null_text combines depends on the steps of the other policy.
    tried = (policy for name, policy in SAMPLES.items() if name != "null_text")
    fitting = [policy for policy in tried if not refused(bare, policy)]
    assert len(fitting) >= 15
    for one, other in combinations(fitting, 2):
        assert (refused(bare, one, other) is ConflictError) is clashes(one, other), f"{one} + {other}"


def refused(bare, *policies):
    try:
        bare.following(policies)
    except (ConflictError, SiteError) as error:
        return type(error)
    return None


@pytest.mark.parametrize(
    ("name", "acts_on", "needs", "decides"),
    [
        ("deepcache", (["block"], []), ["a UNet"], "before the run"),
        ("fbcache", ([], ["block"]), ["a transformer"], "by values"),
        ("guidance_interval", (["guidance"], ["guidance"]), ["classifier-free guidance"], "before the run"),
        (
            "magcache",
            ([], ["block"]),
            ["figures of the model from cachekit calibrate (file= or ratios=)", "a transformer"],
            "by measured figures",
        ),
        (
            "calibrated",
            (["denoiser"], ["denoiser"]),
            ["weights for the model from cachekit calibrate"],
            "by weights measured on the model",
        ),
    ],
)
def test_show_gives_what_a_policy_acts_on_needs_and_decides_by(name, acts_on, needs, decides):
    shown = shown_of(name)
    assert tuple(shown["acts_on"].values()) == acts_on
    assert (shown["needs"], shown["decides"]) == (needs, decides)
    assert name not in shown["not_beside"]


def test_policies_that_write_the_same_are_listed_at_both():
    assert "easycache" in shown_of("forecast")["not_beside"]
    assert "forecast" in shown_of("easycache")["not_beside"]


def shown_of(name):
    (shown,) = (found for found in json.loads(printed("show", name, "--json", "-")) if found["kind"] == "policy")
    return shown
