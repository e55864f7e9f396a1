"""What the app shows is what the library computes, and nothing that is given becomes markup."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest
from support import tiny

import cachekit
from cachekit.amounts import macs
from cachekit.errors import CachekitError
from cachekit.registry.catalog import installed
from cachekit.tools.app import serving, texts
from cachekit.tools.app.desk import MOST, Desk
from cachekit.tools.app.drafts import Draft
from cachekit.tools.app.drawing import Request, Studio

HOSTILE = "<script>alert(1)</script>\"'&${7*7}{{7*7}}"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def desk():
    return Desk(installed(), Studio(device="cpu"))


@pytest.fixture(scope="module")
def demo():
    return cachekit.demo_pipeline()


REQUEST = Request("demo", "a large red circle top left on white", steps=4, guidance=3.5)


# -- before a run ---------------------------------------------------------------------------------------------


def test_plan_and_estimate_are_those_of_the_library(desk, demo):
    specs = ["tgate:m=3", "deepcache:interval=2"]
    estimate = cachekit.estimate(demo, specs, num_inference_steps=4)
    with cachekit.apply(demo, specs) as attachment:
        plan = attachment.plan(4)
    assert desk.outline("demo").preview(specs, 4, True).estimate == estimate
    plan_shown, costs_shown = desk.preview(" demo ", " + ".join(specs), 4, 3.5, True)
    assert plan.picture() in plan_shown
    assert f"{estimate.mac_reduction:.2f}x MAC reduction" in costs_shown
    assert f"<td>{macs(estimate.baseline_macs)}</td><td>{macs(estimate.macs)}</td>" in costs_shown


@pytest.mark.parametrize(("guidance", "guided"), [(1.0, True), (3.5, False)])
def test_without_guidance_there_is_one_branch(desk, demo, guidance, guided):
    plan, costs = desk.preview("demo", "deepcache:interval=2", 2, guidance, guided)
    with cachekit.apply(demo, "deepcache:interval=2") as attachment:
        assert attachment.plan(2, guided=False).picture() in plan
    assert "MAC reduction" in costs


def test_timesteps_of_the_scheduler_are_in_the_plan(desk):
    spec = "cache:where=denoiser,when=window(low=100,high=800)"
    plan, costs = desk.preview("demo", spec, 8, 3.5, True)
    assert "decided during the run" not in plan
    assert "and more" not in costs
    plan, costs = desk.preview("demo-dit", "fbcache", 8, 3.5, True)
    assert "decided during the run" in plan
    assert "and more" in costs


def test_models_are_described_without_their_weights(desk, tmp_path):
    tiny.small().save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    note, defaults = desk.described(str(tmp_path / "model"))
    assert "UNet2DConditionModel" in note
    assert (defaults.steps, defaults.guidance, defaults.guided) == (50, 7.5, True)
    assert "MAC reduction" in desk.preview(str(tmp_path / "model"), "deepcache", 4, 7.5, True)[1]
    note, defaults = desk.described("pixart-alpha")
    assert (defaults.steps, defaults.guidance, defaults.guided) == (20, None, True)


@pytest.mark.parametrize("model", [f"/no/{HOSTILE}", HOSTILE, f"demo{HOSTILE}"])
def test_a_path_is_never_markup(desk, model):
    note, defaults = desk.described(model)
    assert defaults is None
    _, costs = desk.preview(model, "deepcache", 4, None, True)
    drawn, figures, _ = desk.draw(Request(model, "a", 2), ["deepcache"], print)
    assert drawn == []
    for text in (note, costs, figures):
        assert Tags(text).found == {"p"}
        assert "model" in Tags(text).text


@pytest.mark.parametrize("spec", [HOSTILE, f"deepcache:interval={HOSTILE}", f"magcache:file={HOSTILE}", "deepcache +"])
def test_a_spec_is_never_markup(desk, spec):
    plan, costs = desk.preview("demo", spec, 4, 3.5, True)
    assert plan == ""
    assert Tags(costs).found == {"p"}
    assert "spec" in Tags(costs).text or "magcache" in Tags(costs).text


def test_the_form_follows_what_is_chosen_typed_and_edited(desk):
    drafts = desk.chosen(["deepcache"], ())
    drafts = desk.edited(drafts, ("0", "interval"), "5")
    drafts = desk.chosen(["deepcache", "tgate"], drafts)
    assert desk.text(drafts) == "deepcache:interval=5 + tgate"
    assert desk.typed("tgate:m=", drafts) is drafts
    assert desk.typed("tgate:m=4", drafts) == (Draft("tgate", {"m": "4"}),)
    assert desk.chosen([], drafts) == ()
    assert desk.edited((), ("0", "interval"), "5") == ()
    assert desk.about(drafts[0]).endswith("arXiv 2312.00858")
    assert {name for _, name in desk.policies()} == set(cachekit.policies())


def test_the_menu_of_parts_begins_with_what_the_policy_chooses(desk):
    from cachekit.interface.policy import Policy

    found = {control.key: control for control in desk.controls(Draft("deepcache"), Policy)}
    label, name = desk.parts(found["what"])[0]
    assert (label, name) == ("own: reuse", "")
    found = {control.key: control for control in desk.controls(Draft("cache", {"where": Draft("denoiser")}), Policy)}
    assert ("every", "every") in desk.parts(found["when"])
    assert "" not in {name for _, name in desk.parts(found["when"])}


# -- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(desk):
    seen = []
    found = desk._studio.draw(REQUEST, ["deepcache:interval=2"], lambda *news: seen.append(news))
    return found, seen


def test_pictures_are_those_of_the_pipeline(drawn, demo):
    import torch

    found, seen = drawn
    call = {"num_inference_steps": 4, "guidance_scale": 3.5}
    plain = demo(REQUEST.prompt, generator=torch.Generator().manual_seed(0), **call).images[0]
    with cachekit.apply(demo, "deepcache:interval=2") as attachment:
        cached = demo(REQUEST.prompt, generator=torch.Generator().manual_seed(0), **call).images[0]
        assert found.cached.report.macs == attachment.report().macs
    assert plain.tobytes() == found.uncached.image.tobytes()
    assert cached.tobytes() == found.cached.image.tobytes()
    assert found.similarity_of(found.uncached) == (math.inf, 1.0)
    assert found.similarity_of(found.cached)[0] < 60
    assert found.plain.steps == round(4 / found.cached.mac_reduction) < 4
    assert ("uncached", 4, 4) in seen
    assert ("with policies", 1, 4) in seen


def test_the_pipeline_is_left_without_policies(desk, drawn):
    assert cachekit.attachment(desk._studio._loaded[1]) is None


def test_up_to_four_specs_are_compared(desk):
    pictures, figures, report = desk.draw(REQUEST, ["deepcache:interval=2", "tgate:m=2 + text_kv"], lambda *news: None)
    assert [caption for _, caption in pictures] == ["uncached", "deepcache:interval=2", "tgate:m=2 + text_kv"]
    assert {image.size for image, _ in pictures} == {(512, 512)}
    shown = Tags(figures).text
    assert "of equal cost" in shown
    assert "identical" in shown
    assert report.count("MAC reduction") == 2
    for listed in ([], ["deepcache"] * (MOST + 1), [""]):
        pictures, figures, _ = desk.draw(REQUEST, listed, lambda *news: None)
        assert pictures == []
        assert "choose" in figures


def test_what_has_no_weights_is_not_drawn(desk):
    _, figures, _ = desk.draw(Request("sdxl", "a", 4), ["deepcache"], lambda *news: None)
    assert "sdxl has no weights" in figures


def test_the_lines_draw_the_same_picture(drawn, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = desk.lines(REQUEST, "deepcache:interval=2")
    namespace = {}
    exec(compile(lines, "lines", "exec"), namespace)
    assert namespace["image"].tobytes() == drawn[0].cached.image.tobytes()
    assert (tmp_path / "out.png").exists()


def test_the_lines_load_the_pipeline_as_the_app_does():
    desk = Desk(installed(), Studio("cuda", "bfloat16"))
    lines = desk.lines(Request("owner/name", "a cat", 4), "forecast:interval=2")
    assert "DiffusionPipeline.from_pretrained('owner/name', torch_dtype=torch.bfloat16)\npipe.to('cuda')\n" in lines
    assert "demo_pipeline('unet', torch_dtype=torch.bfloat16)" in texts.python_lines(REQUEST, [], "cpu", "bfloat16")


@pytest.mark.parametrize("model", ["demo", "sdxl", HOSTILE])
def test_the_lines_quote_what_is_given(model):
    request = Request(model, f"{HOSTILE}\n'''", 4, 3.5)
    compile(texts.python_lines(request, [f"magcache:file={HOSTILE}"]), "lines", "exec")


# -- serving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [(b"127.0.0.1:7860", 200), (b"localhost:7860", 200), (b"evil.example:7860", 400), (b"", 400)],
)
def test_only_names_of_this_machine_are_answered(host, status):
    import asyncio

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent = []

    async def send(message):
        sent.append(message)

    guard = serving.Guard(inner, hosts=("127.0.0.1", "localhost"))
    asyncio.run(guard({"type": "http", "headers": [(b"host", host)]}, None, send))
    assert sent[0]["status"] == status
    if status == 200:
        assert b"default-src 'self'" in dict(sent[0]["headers"])[b"content-security-policy"]


def test_errors_are_one_line():
    assert Tags(texts.problem(CachekitError("a\nb"))).text == "a b"
    assert Tags(texts.problem(ValueError())).text == "ValueError"


def test_without_gradio_there_is_a_line_with_the_cure(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(CachekitError, match=r"needs gradio, which is not installed; pip install 'cachekit-diffusion"):
        serving.serve("demo", [])
