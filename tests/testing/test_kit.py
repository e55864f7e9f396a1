"""The kit itself: expected failures, refusals, unknown names, the command line."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from support.commands import printed, run
from support.wrong import MISTAKES

from cachekit import CachekitError, SpecError
from cachekit.testing import CHECKS, MODELS, Outcome, check_policy, parametrize_with_checks
from cachekit.testing.models import Call
from cachekit.testing.places import Output, first_module, traced
from cachekit.testing.running import SOMEWHERE
from cachekit.testing.tiny.calls import drawn

SIGN = MISTAKES["WrongSign"].policy


def test_an_expected_failure_is_none():
    given = {"models": ["pixart"], "checks": ["check_linear_ramp", "check_no_writes"]}
    found = check_policy(SIGN, **given, expected={"check_linear_ramp": "a test"})
    assert [(result.outcome, result.note) for result in found] == [(Outcome.EXPECTED, "a test"), (Outcome.PASSED, "")]


def test_an_expected_failure_that_passes_is_a_failure():
    (found,) = check_policy(SIGN, models=["pixart"], checks=["check_no_writes"], expected={"check_no_writes": "a test"})
    assert found.outcome is Outcome.FAILED
    assert "take it off the list" in found.note


@parametrize_with_checks([SIGN], models=["pixart"], checks=["check_linear_ramp"], expected={"check_linear_ramp": "no"})
def test_expected_failures_are_strict(check, request):
    (mark,) = request.node.iter_markers("xfail")
    assert mark.kwargs["strict"]
    assert mark.kwargs["reason"] == "no"
    check()


def test_a_policy_that_every_model_refuses_fails():
    found = check_policy("delta_dit", models=["sd"], checks=["check_undo", SOMEWHERE])
    assert [result.outcome for result in found] == [Outcome.REFUSED, Outcome.FAILED]
    assert "refused everywhere: delta_dit: looked for a chain" in found[1].note


def test_a_policy_that_never_reuses_fails():
    found = check_policy("cache:where=denoiser,when=after(99)", models=["flux"], checks=["check_differs", SOMEWHERE])
    assert [result.outcome for result in found] == [Outcome.SKIPPED, Outcome.FAILED]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"models": ["sdd"]}, "unknown model 'sdd' (did you mean 'sd'?); known: sd, pixart"),
        ({"checks": ["check_undone"]}, "unknown check 'check_undone' (did you mean 'check_undo'?)"),
        ({"expected": {"undo": "why"}}, "unknown check 'undo'"),
    ],
)
def test_unknown_names_are_refused(given, line):
    with pytest.raises(CachekitError) as error:
        check_policy("forecast", **given)
    assert str(error.value).startswith(line)


def test_specs_are_checked_when_tests_are_collected():
    with pytest.raises(SpecError):
        parametrize_with_checks(["forcast"])
    with pytest.raises(CachekitError, match="give a list of specs"):
        parametrize_with_checks("forecast")


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


def test_checks_have_an_invariant_and_a_cause():
    assert all(name.startswith("check_") and check.invariant.endswith(".") for name, check in CHECKS.items())
    assert all(check.cause for check in CHECKS.values())


@pytest.mark.parametrize("name", MODELS)
def test_an_image_of_a_batch_has_noise_and_prompt_of_its_own(name):
    model = MODELS[name]
    pipe = model.make()
    batch, alone = (Call(2, images=images).arguments(model, pipe) for images in ((0, 1), (1,)))
    assert torch.equal(batch["prompt_embeds"][1:], alone["prompt_embeds"])
    assert torch.allclose(drawn(pipe, batch)[1:], drawn(pipe, alone), atol=1e-4)


def test_the_first_module_that_differs_is_named():
    ones, twos = torch.ones(2), torch.full((2,), 2.0)
    run = [Output("norm", 0, (ones,)), Output("attn", 0, (ones, ones)), Output("attn", 1, (ones,))]
    assert first_module(run, run) == ""
    changed = [*run[:2], Output("attn", 1, (twos,))]
    assert first_module(changed, run) == "; the first output that differs is that of 'attn' in step 1"
    assert first_module(run[1:], run) == "; first, 'attn' is called in step 0 in place of 'norm'"
    fewer = [run[0], Output("attn", 0, (ones,)), run[2]]
    assert first_module(fewer, run) == "; the first output that differs is that of 'attn' in step 0"


def test_each_call_of_a_module_is_traced_and_the_pipeline_left_as_it_was():
    model, pipe = MODELS["flux"], MODELS["flux"].make()

    def draw():
        return drawn(pipe, Call(2).arguments(model, pipe))

    plain = draw()
    with traced(pipe) as found:
        assert torch.equal(draw(), plain)
    assert [one.step for one in found if one.site == "denoiser"] == [0, 1]
    count = len(found)
    assert torch.equal(draw(), plain)
    assert len(found) == count


def test_checks_change_no_settings():
    level, threads = logging.getLogger("cachekit").level, torch.get_num_threads()
    check_policy("forecast", models=["flux"], checks=["check_runs"])
    assert (logging.getLogger("cachekit").level, torch.get_num_threads()) == (level, threads)


# -- the command line -----------------------------------------------------------------------------------------

SOME = ["--model", "sd", "--model", "flux", "--check", "check_undo", "--check", "check_differs"]


def test_the_command_prints_a_table():
    text = printed("check", "deepcache:interval=2", *SOME)
    assert "check_undo" in text
    assert "refused: flux: deepcache:interval=2: looked for paired down and up blocks" in text
    assert text.splitlines()[-1] == "passed 2, refused 2"


def test_the_command_writes_json_and_fails_on_failures():
    result = run("check", "delta_dit", "--model", "sd", "--check", SOMEWHERE, "--json", "-")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)
    assert (found["check"], found["outcome"]) == (SOMEWHERE, "failed")


def test_the_command_takes_expected_failures():
    given = ["check", "delta_dit", "--model", "sd", "--check", SOMEWHERE, "--expect"]
    assert "expected failure 1" in printed(*given, f"{SOMEWHERE}=a UNet has no chain")
    assert run(*given, "nothing").exit_code == 2
