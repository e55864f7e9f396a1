"""Two processes give what one gives: sharing an image, where they vote, or with images of their own, where not."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from support import two_ranks
from torch import multiprocessing

Found = dict[str, Any]
#: Two processes multiply matrices of half as many rows, which may sum in another order.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """Run two processes and collect what each found; a deadlock is a failure."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = multiprocessing.start_processes(two_ranks.work, (folder,), nprocs=2, join=False, start_method="spawn")
    deadline = time.monotonic() + 120
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def alone() -> Found:
    return {name: scenario() for name, scenario in two_ranks.ALONE.items()}


@pytest.mark.parametrize("name", two_ranks.SHARED)
def test_both_do_the_same_and_have_the_same_image(both: tuple[Found, Found], name: str) -> None:
    first, second = (found[name] for found in both)
    assert torch.equal(first["image"], second["image"])
    assert first.get("done") == second.get("done")


@pytest.mark.parametrize("name", two_ranks.ALONE)
def test_the_image_is_that_of_one_process(both: tuple[Found, Found], alone: Found, name: str) -> None:
    one, shared = alone[name], both[0][name]
    assert torch.allclose(shared["image"], one["image"], rtol=0, atol=ROUNDING)
    assert shared.get("done") == one.get("done")
    plain = alone[name.partition(",")[0]]["image"]
    assert name in ("flux", "wan") or not torch.allclose(one["image"], plain, rtol=0, atol=10 * ROUNDING)


@pytest.mark.parametrize("model", ["flux", "wan"])
def test_what_reuses_nothing_changes_nothing(both: tuple[Found, Found], model: str) -> None:
    assert torch.equal(both[0][f"{model}, nothing"]["image"], both[0][model]["image"])


def test_it_does_not_matter_when_the_model_is_split(both: tuple[Found, Found]) -> None:
    assert torch.equal(both[0]["wan, delta_dit, split late"]["image"], both[0]["wan, delta_dit"]["image"])


def test_without_an_attachment_all_is_as_before(both: tuple[Found, Found]) -> None:
    assert torch.equal(both[0]["wan, delta_dit, undone"]["image"], both[0]["wan"]["image"])


@pytest.mark.parametrize("name", ["flux, delta_dit", "wan, delta_dit", "wan, tgate"])
def test_each_keeps_its_part_of_what_one_would_keep(both: tuple[Found, Found], alone: Found, name: str) -> None:
    assert [2 * found[name]["bytes"] for found in both] == [alone[name]["bytes"]] * 2
    assert both[0][name]["macs"] == alone[name]["macs"], "the cost is that of the whole image"


@pytest.mark.parametrize("name", ["flux, stubborn", "wan, stubborn", "wan, stubborn ahead"])
def test_one_that_must_compute_decides_for_both(both: tuple[Found, Found], name: str) -> None:
    first, second = (found[name] for found in both)
    assert set(first["wishes"][2:]) == {"reuse"}
    assert set(second["wishes"]) == {"store"}
    assert {action for actions in first["done"] + second["done"] for action in actions} == {"store"}
    assert torch.equal(first["image"], both[0][name.partition(",")[0]]["image"])


def test_a_probe_that_sees_other_tokens_wants_something_else(both: tuple[Found, Found]) -> None:
    """The vote is needed without any stubbornness."""
    first, second = (found["wan, probed"]["wishes"] for found in both)
    assert len(first) == len(second) == len(both[0]["wan, probed"]["done"])
    assert first != second


def test_what_one_cannot_keep_none_reuses(both: tuple[Found, Found]) -> None:
    calls = [action for (action,) in both[0]["wan, poisoned"]["done"]]
    assert calls == [action for action in ("store", "reuse", "store", "store", "store", "reuse") for _ in range(2)]


def test_without_a_vote_they_wait_for_each_other(both: tuple[Found, Found]) -> None:
    assert all("error" in found["without a vote"] for found in both)


@pytest.mark.parametrize("name", two_ranks.OWN)
def test_images_of_their_own_are_those_of_one_process(both: tuple[Found, Found], name: str) -> None:
    images = both[0][name] | both[1][name]
    assert sorted(images) == [0, 1, 2, 3]
    if name == "observed":
        for seed, found in images.items():
            expected = two_ranks.run(two_ranks.wan(), two_ranks.OBSERVED, seed=seed)
            assert torch.equal(found["image"], expected["image"])


def test_images_of_their_own_take_numbers_of_calls_of_their_own(both: tuple[Found, Found]) -> None:
    """Here a vote would be a deadlock."""
    ran = [[image["ran"] for image in found["observed"].values()] for found in both]
    assert ran[0] != ran[1]
    wanted = [[image["wishes"] for image in found["stubborn"].values()] for found in both]
    done = [[[action for (action,) in image["done"]] for image in found["stubborn"].values()] for found in both]
    assert wanted == done
    assert done[0] != done[1]
