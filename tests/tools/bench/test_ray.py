"""The Ray executor of `cachekit bench grid`, on a cluster of this machine with two actors."""

from __future__ import annotations

import sys

import pytest
import ray
from support import commands, tiny
from support.actors import kill_an_actor

from cachekit.registry.catalog import installed
from cachekit.tools.bench import executors
from cachekit.tools.bench.cells import Method, Setting, expand
from cachekit.tools.bench.suite import Suite
from cachekit.tools.workers import Crew, WorkersError


@pytest.fixture(autouse=True)
def no_cluster_is_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny.small().save_pretrained(folder)
    return Setting(model=str(folder), captions=("a",), device="cpu", threads=1)


@pytest.fixture(scope="module")
def cells(setting):
    suite = Suite(setting, expand(["tgate:m=1|2|3"], installed()), steps=(4,), peers=False)
    cells = suite.cells()
    return [*cells, cells[0].model_copy(update={"method": Method.PUBLISHED, "specs": ("adaptive_guidance:m=2",)})]


def test_actors_measure_what_one_process_does_and_outlive_failures(setting, cells):
    outcomes = {}
    with Crew("ray", 2) as crew:
        for cell, outcome in executors.outcomes(crew, setting, cells):
            outcomes[cell] = outcome
            if len(outcomes) == 1:
                kill_an_actor()
    assert not ray.is_initialized()
    assert set(outcomes) == set(cells)
    told = {cell: outcome for cell, outcome in outcomes.items() if isinstance(outcome, str)}
    assert all("\n" not in line for line in told.values())
    assert sorted("worker process has died" in line for line in told.values()) == [False, True]
    assert told[cells[-1]].startswith("adaptive_guidance:m=2 (published): ")
    measured = [cell for cell in cells if cell not in told]
    for cell, alone in executors.outcomes(Crew("serial", 1), setting, measured):
        result = outcomes[cell]
        assert result.model_dump().keys() == alone.model_dump().keys()
        assert [sample.psnr for sample in result.samples] == [sample.psnr for sample in alone.samples]
        assert (result.samples[0].macs, result.environment) == (alone.samples[0].macs, alone.environment)


def test_a_cluster_that_is_there_is_used_left_alone_and_never_waited_for(setting, cells):
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        with (
            Crew("ray", 2) as crew,
            pytest.raises(WorkersError, match="has 1 processors, too few for 2 workers of 1 threads"),
        ):
            next(executors.outcomes(crew, setting, cells))
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("address", "package", "said"),
    [
        ("nowhere", ray, "cannot use the cluster at RAY_ADDRESS=nowhere: "),
        (None, None, "needs Ray: pip install 'cachekit-diffusion[ray]'"),
    ],
)
def test_no_cluster_and_no_ray_are_one_line_each(setting, tmp_path, monkeypatch, address, package, said):
    monkeypatch.setitem(sys.modules, "ray", package)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    result = commands.run("bench", "grid", setting.model, "--executor", "ray", "--output", tmp_path / "r.jsonl")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert said in result.stderr
