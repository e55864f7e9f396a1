"""`python -m benchmarks.carry`: calibrations used for something else, resumed row by row, and their tables."""

from __future__ import annotations

from importlib import import_module

import pytest

carry, carry_tables, calibrations = (
    import_module(f"benchmarks.{name}") for name in ("carry", "carry_tables", "calibrations")
)

OUTSIDE, RED = "guidance 5, made at 3.5", "captions, made with single red circles"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of two uses and of a longer run, in runs of few steps."""
    with pytest.MonkeyPatch.context() as patch:
        small = {"STEPS": 4, "INTERVAL": 2, "COUNT": 2, "PROMPTS": 2, "AIM": 8, "LONG_COUNT": 2}
        for name, value in small.items():
            patch.setattr(carry, name, value)
        patch.setattr(carry, "PLAINS", {"25 uncached steps": 3})
        patch.setattr(carry, "RESULTS", tmp_path_factory.mktemp("carry") / "carry.json")
        for part, name in [("uses", OUTSIDE), ("uses", RED), ("longer", "25 uncached steps")]:
            carry.add(part, name, "unet", "euler")
        patch.setattr(carry, "used", None)
        carry.add("uses", RED, "unet", "euler")  # measured, so not again
        yield carry.stored()


def test_a_file_is_refused_outside_of_its_scales_and_measured_all_the_same(measured):
    outside, red, long = measured
    assert (outside["refused"], red["refused"]) == ("guidance scale 5, not 3.5", "")
    assert outside["own"] != outside["carried"]
    assert outside["plain"] > 0
    assert red["spacing"] in ("own", "karras", "of the full steps")  # Euler has no lu_lambdas
    assert (red["calls"], long["calls"]) == (3, 3)


def test_prompts_are_of_their_kinds():
    assert all("red circle" in text and " and " not in text for text in carry.prompts_of("red circles", 4, False))
    captions, shuffled = (carry.prompts_of(kind, 4, heldout=True) for kind in ("captions", "shuffled"))
    assert captions != shuffled
    assert [sorted(text.split()) for text in captions] == [sorted(text.split()) for text in shuffled]
    assert not set(captions) & set(calibrations.captions())


def test_tables_have_what_was_measured_and_judge_it(measured):
    text = carry_tables.uses()
    outside, *_ = measured
    figures = " / ".join(f"{outside[name]:.1f}" for name in ("carried", "own", "forecast", "plain"))
    assert f"| {OUTSIDE} | {figures} | refused |" in text
    assert f"| {RED} | " in text
    assert "| guidance 4, between 3.5 and 5 | - | - |" in text
    judged = text.partition("made for the use: ")[2].partition(".\n")[0]
    assert (OUTSIDE in judged.partition(". ")[0]) == (outside["own"] - outside["carried"] > carry_tables.EQUAL)
    assert f"| 25 uncached steps | 3 | {measured[2]['psnr']:.1f} |" in carry_tables.longer()
