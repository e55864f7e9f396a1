"""The picture of a plan: each square shows the action of its cell, and the SVG is well-formed."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from support import commands, tiny

import cachekit
from cachekit.planning.drawing import draw

MARKS = {"compute": ".", "compute and keep": "S", "reuse": "r", "decided during the run": "?"}
SVG = "{http://www.w3.org/2000/svg}"
SPECS = ["tgate:m=4", "deepcache:interval=3", "adaptive_guidance:threshold=0.9"]


def squares(picture):
    """Read {top: marks} from the titles of the squares, and check that they lie where the titles place them."""
    found = {}
    for path in ElementTree.fromstring(picture).iter(f"{SVG}path"):
        left, top, width = map(float, re.findall(r"[\d.]+", path.get("d")))
        where, meaning = path.find(f"{SVG}title").text.split(": ")
        first, last = (int(number) for number in (re.findall(r"\d+", where) * 2)[:2])
        assert (left, width) == (4 + 12 * first, 12 * (last - first + 1))
        found[top] = found.get(top, "") + MARKS[meaning] * (last - first + 1)
    return found


def texts(picture):
    return [element.text for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


@pytest.mark.parametrize("steps", [1, 6, 13])
def test_every_square_is_the_action_of_the_plan(steps):
    with cachekit.apply(tiny.small(), SPECS) as attachment:
        plan = attachment.plan(steps)
    listed = plan.columns()
    assert [name for _, name, _, _ in listed] == [bound.target.name for bound in plan.assignments]
    lines = squares(plan.picture())
    assert [marks for _, marks in sorted(lines.items())][: len(listed)] == [marks for *_, marks in listed]
    assert len(lines) == len(listed) + len({mark for *_, marks in listed for mark in marks})
    assert {name for _, name, _, _ in listed} | {spec for spec, *_ in listed} <= set(texts(plan.picture()))
    assert set(MARKS.values()) >= {mark for *_, marks in listed for mark in marks}


def test_a_plan_is_a_line_and_a_picture_and_names_what_never_acts():
    with cachekit.apply(tiny.small(), ["tgate:m=5", "deepcache:interval=2"]) as attachment:
        short, plan, unguided = attachment.plan(5), attachment.plan(6), attachment.plan(6, guided=False)
    specs, targets = "tgate:m=5 + deepcache:interval=2", len(plan.assignments)
    assert repr(plan) == f"<Plan: 6 steps, {specs}, {targets} targets>"
    assert plan._repr_svg_() == plan.picture()
    assert (short.idle, plan.idle, unguided.idle) == (["tgate:m=5"], [], [])
    line = "warning: tgate:m=5 never acts in 5 steps: give it other settings, or more steps"
    assert str(short).splitlines()[-1] == line
    assert "warning" not in str(plan)


def test_branches_and_steps_are_numbered():
    with cachekit.apply(tiny.small(), ["tgate:m=4"]) as attachment:
        plan = attachment.plan(12)
    found = texts(plan.picture())
    assert [text for text in found if text in ("1", "2")] == ["2"] * 4 + ["1"] * 8
    assert {"0", "5", "10"} <= set(found)


def test_names_are_text_and_lie_inside():
    hostile = "<script>alert(1)</script> & \"'"
    picture = draw([2, 1], [("a:b='x<'", hostile, "block", "Sr"), ("b", "a" * 300, "'<", "?.")])
    assert hostile in texts(picture)
    root = ElementTree.fromstring(picture)
    assert not list(root.iter(f"{SVG}script"))
    assert float(root.get("width")) > 300 * 6.6


def test_the_command_draws_what_it_prints(tmp_path):
    file = tmp_path / "plan.svg"
    printed = commands.printed("plan", "tgate:m=3", "--steps", 6, "--svg", file)
    assert f"wrote {file}" in printed
    assert "..Srrr" in squares(file.read_text()).values()
    assert "..Srrr" in printed


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    result = commands.run("plan", "tgate:m=3", "--steps", 6, "--svg", tmp_path)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: cannot write {str(tmp_path)!r}: Is a directory; give another file\n",
    )
