"""A part that is wrong fails in one line that names it, or the report has a line of what it did."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from support import tiny

import cachekit
from cachekit import (
    OPEN,
    Action,
    Choice,
    Every,
    Kind,
    Moment,
    Policy,
    PolicyError,
    Reuse,
    Schedule,
    Site,
    SiteMap,
    Sites,
    StandIn,
    Where,
    WholeDenoiser,
)

STEPS = 6
NAN, INF = float("nan"), float("inf")
FEED_FORWARD = Sites(kinds="feed_forward")


class Made(Policy):
    """One choice of the parts that it is given."""

    name: ClassVar[str] = "made"

    def choices(self) -> dict[str, Choice]:
        return {"it": Choice(FEED_FORWARD, Every(n=2), Reuse())}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pixart(layers=2)


def error(pipe: Any, **parts: Any) -> str:
    with pytest.raises(PolicyError) as caught, cachekit.apply(pipe, Made(**parts)):
        tiny.latents(pipe, steps=STEPS)
    assert cachekit.attachment(pipe) is None
    return str(caught.value)


# -- begin -----------------------------------------------------------------------------------------------------


class BadSchedule(Every):
    def begin(self, run: Any, shared: Any) -> None:
        raise KeyError("x")


class BadStandIn(Reuse):
    name: ClassVar[str] = "bad_reuse"

    def begin(self, run: Any, shared: Any) -> None:
        raise KeyError("x")


@pytest.mark.parametrize(
    ("parts", "name"), [({"when": BadSchedule(n=2)}, "every"), ({"what": BadStandIn()}, "bad_reuse")]
)
def test_begin_is_named_by_the_part_that_it_belongs_to(pipe: Any, parts: dict[str, Any], name: str) -> None:
    line = error(pipe, **parts)
    assert f": begin of {name} for 'transformer_blocks.0.ff' at step 0 raised KeyError: 'x'" in line


# -- places ----------------------------------------------------------------------------------------------------


class Misspelt(Where):
    name: ClassVar[str] = "misspelt"

    def find(self, sites: SiteMap) -> Sequence[Any]:
        return sites.of("feedforward")  # type: ignore[arg-type]


class Elsewhere(Where):
    name: ClassVar[str] = "elsewhere"

    def find(self, sites: SiteMap) -> Sequence[Any]:
        return [Site("no.such.module", Kind.FEED_FORWARD)]


def test_kinds_may_be_words_that_exist() -> None:
    site = Site("a", "feed_forward")  # type: ignore[arg-type]
    assert site.kind is Kind.FEED_FORWARD
    assert SiteMap("Toy", (site,)).of("feed_forward") == (site,)  # type: ignore[arg-type]
    reason = r"^unknown kind 'feed_forwards' \(did you mean 'feed_forward'\?\); known: cross_attention, .*denoiser$"
    with pytest.raises(ValueError, match=reason):
        Site("a", "feed_forwards")  # type: ignore[arg-type]


def test_an_unknown_kind_is_refused_where_it_is_looked_for(pipe: Any) -> None:
    line = error(pipe, where=Misspelt())
    assert "find of misspelt" in line
    assert "raised ValueError: unknown kind 'feedforward' (did you mean 'feed_forward'?); known: " in line


def test_a_module_that_does_not_exist_is_of_the_place_that_named_it(pipe: Any) -> None:
    assert error(pipe, where=Elsewhere()) == (
        "made:where=elsewhere: find of elsewhere chose 'no.such.module', a module that PixArtTransformer2DModel"
        " doesn't have; choose among the sites that it is given"
    )


# -- schedules -------------------------------------------------------------------------------------------------


class Forgetful(Schedule):
    name: ClassVar[str] = "forgetful"

    def action(self, at: Moment) -> Any:
        if at.step == 3:
            return None
        return Action.STORE if at.step % 2 == 0 else Action.REUSE


def test_an_action_without_a_return_is_an_error(pipe: Any) -> None:
    assert error(pipe, when=Forgetful()) == (
        "made:when=forgetful: action of forgetful for 'transformer_blocks.0.ff' at step 3 returned None;"
        " return an Action, or OPEN"
    )


def test_open_is_the_same_in_copies() -> None:
    assert copy.deepcopy(OPEN) is OPEN
    assert pickle.loads(pickle.dumps(OPEN)) is OPEN


# -- stand-ins -------------------------------------------------------------------------------------------------


class Weighing(StandIn):
    """A value in place of the weight at step 3."""

    name: ClassVar[str] = "weighing"
    value: float = 1.0
    bad: str = ""

    def weights(self, times: Sequence[Any], at: Moment) -> Sequence[float]:
        return [float(self.bad) if self.bad and at.step == 3 else 1.0]


@pytest.mark.parametrize("bad", ["nan", "inf", ""])
@pytest.mark.parametrize("where", [FEED_FORWARD, WholeDenoiser()])
def test_a_prediction_that_is_not_finite_is_in_the_report(pipe: Any, where: Where, bad: str) -> None:
    policy = Made(where=where, what=Weighing(bad=bad))
    for again in range(2):
        with cachekit.apply(pipe, policy) as attachment:
            found, report = tiny.latents(pipe, steps=STEPS), attachment.report()
        lines = [line for line in report.warnings if "first came" in line]
        expected = "made: NaN or inf first came at step 3, of which parts were predicted; use another stand-in"
        assert lines == ([expected] if bad else [])
        assert torch.isfinite(found).all() == (not bad), again


def test_what_the_model_itself_spoils_is_not_blamed_on_a_stand_in(pipe: Any) -> None:
    broken = copy.deepcopy(pipe)
    calls = []

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * NAN if len(calls) == 3 else output

    broken.transformer.proj_out.register_forward_hook(spoil)
    with cachekit.apply(broken, Made()) as attachment:
        assert not torch.isfinite(tiny.latents(broken, steps=STEPS)).any()
        lines = attachment.report().warnings
    assert not [line for line in lines if "first came" in line]
    assert [line for line in lines if "not kept" in line]


WRONG: dict[str, tuple[type, Any, str]] = {
    "length": (Reuse, "two", "'two'; make it a number of entries, 0 or more, or None"),
    "length below 0": (Reuse, -1, "-1; make it a number of entries, 0 or more, or None"),
    "amends": (Reuse, "yes", "'yes'; make it True or False"),
    "insists": (Every, 1, "1; make it True or False"),
    "summary": (Made, None, "None; make it a text"),
    "exclusive": (Made, "ab", "'ab'; make it a tuple of names of fields"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_class_variable_of_the_wrong_type_is_refused_where_the_class_is_made(case: str) -> None:
    base, value, reason = WRONG[case]
    key = case.partition(" ")[0]
    with pytest.raises(PolicyError) as caught:
        type("Odd", (base,), {"__annotations__": {key: ClassVar[Any]}, key: value})
    assert str(caught.value) == f"Odd.{key} is {reason}"
