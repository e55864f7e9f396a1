"""Forms: what is chosen comes back as the same spec, for every policy and part that is installed."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from cachekit.errors import SpecError
from cachekit.interface.parts import Schedule, StandIn, Where
from cachekit.interface.policy import Policy
from cachekit.interface.specs import parse
from cachekit.registry.catalog import installed
from cachekit.tools.app.drafts import Draft, canonical, drafts_of, parts_of
from cachekit.tools.app.form import Control, Kind, controls, edited, number, started

WORDS = installed()
POLICIES = sorted(WORDS.policies)
PARTS = [(base, name) for base in (Where, Schedule, StandIn) for name in parts_of(base, WORDS)]
SPECS = [
    "cache:where=span(first=-2,chain=all),when=window(first=2,stop=9,when=every(n=3)),what=taylor(order=2)",
    "cache:where=cross_attention,when=mask(steps=0;1;4),what=linear(of=residual,axis=log_snr)",
    "cache:where=sites(self_attention;feed_forward),when=quadratic(n=4,power=1.7)",
    "tgate:m=auto,keep=cond,mean=false",
    "deepcache:interval=5,end=20,what=linear",
    "magcache:ratios=1;0.5;0.25",
]


def control_of(spec, key):
    draft = Draft.of(parse(spec, WORDS))
    return next(control for control in controls(draft, Policy, WORDS) if control.key == key)


def retold(draft, base):
    """Set every key of a draft to the value that its control shows, as a user does who touches everything."""
    told = draft
    for control in controls(draft, base, WORDS):
        if control.kind is Kind.PART:
            if control.part is not None:
                told = told.with_value(control.key, retold(control.part, control.base))
        elif control.kind is Kind.NUMBER and not control.is_word:
            told = told.with_value(control.key, number(control.number))
        else:
            told = told.with_value(control.key, control.text)
    return told


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_begins_with_its_defaults_and_comes_back(name):
    draft = started(name, Policy, WORDS)
    try:
        made = parse(draft.spec, WORDS)
    except SpecError:
        # Some policies need one of two keys, which no schema says.
        with pytest.raises(SpecError):
            parse(name, WORDS)
        return
    assert parse(retold(draft, Policy).spec, WORDS) == made
    (again,) = drafts_of(str(made), WORDS)
    assert parse(again.spec, WORDS) == made


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_comes_back(spec):
    made = parse(spec, WORDS)
    draft = Draft.of(made)
    assert parse(draft.spec, WORDS) == made
    assert parse(retold(draft, Policy).spec, WORDS) == made
    assert canonical([draft, Draft("text_kv")], WORDS) == f"{made} + text_kv"


@pytest.mark.parametrize(("base", "name"), PARTS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_every_part_can_be_chosen(base, name):
    key = {Where: "where", Schedule: "when", StandIn: "what"}[base]
    chosen = edited(started("cache", Policy, WORDS), Policy, [key], name, WORDS)
    made = parse(chosen.spec, WORDS)
    assert getattr(made, key).name == name
    assert parse(retold(chosen, Policy).spec, WORDS) == made


@pytest.mark.parametrize(
    ("spec", "key", "expected"),
    [
        ("deepcache", "interval", Control("interval", Kind.NUMBER, "3", low=1, high=10, step=1)),
        ("deepcache:interval=40", "interval", Control("interval", Kind.NUMBER, "40", low=1, high=40, step=1)),
        ("deepcache", "schedule", Control("schedule", Kind.MENU, "uniform", ("uniform", "quadratic"))),
        ("deepcache", "end", Control("end", Kind.NUMBER, "none", ("none",), low=0, high=10, step=1)),
        ("deepcache", "center", Control("center", Kind.NUMBER, "15", low=0, high=45, step=1)),
        ("tgate", "m", Control("m", Kind.NUMBER, "10", ("auto",), low=1, high=30, step=1)),
        ("tgate", "mean", Control("mean", Kind.FLAG, "true")),
        ("hicache", "sigma", Control("sigma", Kind.NUMBER, "0.5", low=0.01, high=1, step=0.01)),
        ("fbcache", "threshold", Control("threshold", Kind.NUMBER, "0.05", low=0, high=0.5, step=0.001)),
        ("fastercache", "boundary", Control("boundary", Kind.NUMBER, "300")),
        ("magcache", "ratios", Control("ratios", Kind.TEXT, "none", ("none",))),
        ("magcache", "file", Control("file", Kind.TEXT, "none", ("none",))),
    ],
)
def test_a_control_has_the_bounds_of_its_schema(spec, key, expected):
    found = control_of(spec, key)
    assert found == replace(expected, low=pytest.approx(expected.low), high=pytest.approx(expected.high))


def test_parts_are_menus_with_controls_of_their_own():
    found = control_of("deepcache", "when")
    assert (found.kind, found.text, found.part) == (Kind.PART, "", None)
    assert found.own == "window"
    assert "growing" in found.words  # of a plugin
    found = control_of("cache:where=denoiser,when=window(stop=9)", "when")
    inner = controls(found.part, found.base, WORDS)
    assert [control.key for control in inner] == ["first", "stop", "low", "high", "when", "fresh"]
    assert inner[4].part == Draft("every")


def test_a_policy_with_several_choices_has_no_menus_of_parts():
    assert "when" not in {control.key for control in controls(Draft("tgate"), Policy, WORDS)}


def test_a_default_part_can_be_edited_in_place():
    draft = edited(Draft("cache", {"where": Draft("denoiser")}), Policy, ["when", "n"], "7", WORDS)
    assert draft.spec == "cache:where=denoiser,when=every(n=7)"


def test_a_part_can_be_left_to_its_policy_again():
    draft = edited(Draft("deepcache", {"when": Draft("every")}), Policy, ["when"], "", WORDS)
    assert draft.spec == "deepcache"


def test_what_cannot_be_parsed_stays_as_it_was_given():
    draft = edited(Draft("magcache"), Policy, ["ratios"], "one;two", WORDS)
    assert canonical([draft], WORDS) == "magcache:ratios=one;two"


class Foreign(Policy):
    """A policy of a third party, with kinds of keys that none here has."""

    name: ClassVar[str] = "foreign"
    level: Annotated[int, Field(gt=2, lt=9)] = 4
    mixed: Literal[1, 2] | None = None
    maybe: bool | None = None
    words: tuple[Literal["a", "b"], ...] = ("a",)
    named: Literal["only"] = "only"

    def choices(self):
        return parse("cache:where=denoiser", WORDS).choices()


def test_policies_of_third_parties_get_forms_too():
    words = replace(WORDS, policies={**WORDS.policies, "foreign": Foreign})
    found = {control.key: control for control in controls(Draft("foreign"), Policy, words)}
    assert (found["level"].low, found["level"].high) == (3, 8)
    assert (found["mixed"].kind, found["mixed"].words) == (Kind.MENU, ("1", "2", "none"))
    assert (found["maybe"].kind, found["maybe"].words) == (Kind.MENU, ("true", "false", "none"))
    assert (found["words"].kind, found["words"].text) == (Kind.TEXT, "a")
    assert (found["named"].kind, found["named"].words) == (Kind.MENU, ("only",))
    assert found["when"].own == "every"
    assert list(found)[-3:] == ["where", "when", "what"]
    draft = edited(Draft("foreign"), Policy, ["level"], "8", words)
    assert str(parse(draft.spec, words)) == "foreign:level=8"
