"""Names of arguments that an adapter adds to those of diffusers' own denoisers."""

from __future__ import annotations

import torch

from cachekit import Layout
from cachekit.driving.slicing import pick
from cachekit.upstream.arguments import LAYERED, UNBATCHED

#: Two images with two branches each.
ROWS = torch.arange(16.0).reshape(4, 4)


def test_a_layout_names_no_argument_by_itself() -> None:
    assert Layout().unbatched == Layout().layered == frozenset()


def test_names_of_an_adapter_are_added_to_those_of_diffusers() -> None:
    layout = Layout(unbatched=frozenset({"grid"}), layered=frozenset({"per_layer"}))
    named = dict.fromkeys((*UNBATCHED, *LAYERED, "grid", "per_layer", "sample"), ROWS)
    picked = pick(named, layout, "cond", 4)
    assert all(picked[name] is ROWS for name in (*UNBATCHED, "grid"))
    assert all(torch.equal(picked[name], ROWS[:, 2:]) for name in (*LAYERED, "per_layer"))
    assert torch.equal(picked["sample"], ROWS[2:])


def test_a_name_that_no_layout_has_is_cut() -> None:
    picked = pick({"grid": ROWS, "per_layer": ROWS}, Layout(), "uncond", 4)
    assert all(torch.equal(value, ROWS[:2]) for value in picked.values())
