"""Plugins are found by entry point and checked; one that fails leaves the others working."""

from __future__ import annotations

import copy
import warnings
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch
from support import tiny

import cachekit
from cachekit import CachekitError
from cachekit.errors import AdapterError, ConflictError, PluginError, PluginWarning, SpecError
from cachekit.interface.specs import parse
from cachekit.registry.catalog import BUILT_IN, DISABLE, build, installed

HEAD = """
from typing import ClassVar
from cachekit import Choice, Every, Policy, Reuse, Schedule, Sites, StandIn, Where, hookimpl
"""
POLICY = """
class {cls}(Policy):
    name: ClassVar[str] = {name!r}
    def choices(self):
        return {{"attention": Choice(Sites(kinds="self_attention"), Every(n=2), Reuse())}}
"""
REGISTER = """
@hookimpl
def cachekit_register_policies(register):
    for policy in ({},):
        register(policy)
"""
#: A part of each kind, its hook and its method.
PARTS = {
    "place": ("places", "Where", "def find(self, sites): return sites.sites"),
    "schedule": ("schedules", "Schedule", "def full(self, at): return True"),
    "stand-in": ("stand_ins", "StandIn", "def weights(self, times, at): return [1.0]"),
}
PART = """
class Part({base}):
    name: ClassVar[str] = {name!r}
    {method}
@hookimpl
def cachekit_register_{field}(register):
    register(Part)
"""
GOOD = HEAD + POLICY.format(cls="Good", name="good") + REGISTER.format("Good")


@pytest.fixture
def point(tmp_path, monkeypatch):
    """A function that writes a plugin module and makes its entry point."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, source, module=None):
        module = f"ck_test_{tmp_path.name.replace('-', '_')}_{module or name}"
        (tmp_path / f"{module}.py").write_text(source)
        return EntryPoint(name, module, "cachekit")

    return make


BROKEN = {
    "import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    "syntax": ("def (:", "SyntaxError"),
    "exit": (HEAD + "raise RuntimeError('wrong\\nlines')", "RuntimeError: wrong"),
    "typo": (
        HEAD + "@hookimpl\ndef cachekit_register_policy(register): ...",
        "unknown hook 'cachekit_register_policy'",
    ),
    "argument": (
        HEAD + "@hookimpl\ndef cachekit_register_policies(registry): ...",
        "Argument(s) {'registry'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "raises": (
        HEAD + "@hookimpl\ndef cachekit_register_policies(register): raise OSError('no\\nfile')",
        "OSError: no",
    ),
    "no class": (HEAD + REGISTER.format("'tgate'"), "'tgate' is not a subclass of cachekit.Policy"),
    "bad name": (
        HEAD + POLICY.format(cls="Odd", name="Odd-Name") + REGISTER.format("Odd"),
        "Odd.name is 'Odd-Name'; use lower case, digits and underscores",
    ),
    "no choices": (
        HEAD + "class Bare(Policy):\n    name: ClassVar[str] = 'bare'\n" + REGISTER.format("Bare"),
        "Bare has no choices; write it",
    ),
    "misspelt method": (
        HEAD
        + POLICY.format(cls="Odd", name="odd")
        + "    def observ(self, seen, memory): ...\n"
        + REGISTER.format("Odd"),
        "Odd.observ means nothing to cachekit (did you mean 'observe'?); rename it",
    ),
    **{
        f"{noun} without method": (
            HEAD + PART.format(base=base, field=field, name="bare", method="pass"),
            "Part has no ",
        )
        for noun, (field, base, _) in PARTS.items()
    },
    **{
        f"{noun} with a bad name": (
            HEAD + PART.format(base=base, field=field, name="bad(name", method=method),
            "Part.name is 'bad(name'",
        )
        for noun, (field, base, method) in PARTS.items()
    },
    **{
        f"a policy as {noun}": (
            HEAD
            + POLICY.format(cls="Good", name="good")
            + f"@hookimpl\ndef cachekit_register_{field}(register): register(Good)",
            f"is not a subclass of cachekit.{base}",
        )
        for noun, (field, base, _) in PARTS.items()
    },
    "a field that shadows a method": (
        HEAD + "class Odd(Policy):\n    name: ClassVar[str] = 'odd'\n    observe: int = 3\n" + REGISTER.format("Odd"),
        "PolicyError: Odd.observe is a field with the name of a method; rename it",
    ),
    "schedule with a misspelt method": (
        HEAD
        + PART.format(base="Schedule", field="schedules", name="odd", method="def full(self, at): return True")
        + "Part.insist = True",
        "Part.insist means nothing to cachekit (did you mean 'insists'?); rename it",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_recorded_and_the_others_survive(point, case):
    source, reason = BROKEN[case]
    catalog = build([point("broken", source), point("good", GOOD)])
    (failure,) = catalog.failures
    assert failure.plugin == "broken"
    assert reason in str(failure)
    assert f"{DISABLE}=broken" in str(failure)
    assert "\n" not in str(failure)
    assert list(catalog.policies) == ["good"]
    assert list(catalog.plugins) == [BUILT_IN, "good"]
    assert set(catalog.owners.values()) == {BUILT_IN, "good"}


def test_a_plugin_that_fails_half_way_leaves_nothing_behind(point):
    source = HEAD + POLICY.format(cls="First", name="first") + REGISTER.format("First, 'second'")
    catalog = build([point("half", source)])
    assert len(catalog.failures) == 1
    assert catalog.policies == {}
    assert set(catalog.owners.values()) == {BUILT_IN}


def test_of_two_plugins_under_one_name_the_first_stays(point):
    other = HEAD + POLICY.format(cls="Other", name="other") + REGISTER.format("Other")
    catalog = build([point("same", GOOD), point("same", other, module="other")])
    assert list(catalog.policies) == ["good"]
    assert [failure.plugin for failure in catalog.failures] == ["same"]


def test_a_name_of_two_plugins_stands_for_neither(point):
    other = HEAD + POLICY.format(cls="Other", name="other") + POLICY.format(cls="Good", name="good")
    catalog = build([point("a", GOOD), point("b", other + REGISTER.format("Good, Other")), point("c", GOOD)])
    line = "policy 'good' is registered by plugin 'a' of an unknown distribution and by plugin 'b' of an unknown "
    line += f"distribution; uninstall one or set {DISABLE}=b"
    assert catalog.clashes == {"policy 'good'": line}
    assert (list(catalog.policies), catalog.failures) == (["other"], ())
    assert list(catalog.plugins) == [BUILT_IN, "a", "b", "c"]
    assert "policy 'good'" not in catalog.owners
    with pytest.raises(SpecError) as caught:
        parse("good", catalog)
    assert str(caught.value) == f"spec 'good': {line}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (GOOD.replace("(Good,)", "(Good, Good)"), "policy 'good' is registered twice; rename one"),
        (GOOD.replace("'good'", "'tgate'"), "policy 'tgate' ships with cachekit; choose another name"),
        (
            HEAD + PART.format(base="Schedule", field="schedules", name="every", method=PARTS["schedule"][2]),
            "schedule 'every' ships with cachekit; choose another name",
        ),
    ],
    ids=["twice", "a policy that ships", "a part that ships"],
)
def test_names_that_a_plugin_cannot_have(point, source, reason):
    """Its name would come first in the order of names."""
    shipped = build(entry_points(group="cachekit"))
    catalog = build([point("aaa", source), *entry_points(group="cachekit")])
    (failure,) = catalog.failures
    assert (failure.plugin, failure.reason) == ("aaa", f"ValueError: {reason}")
    assert (catalog.clashes, list(catalog.policies)) == ({}, list(shipped.policies))
    assert catalog.policies["tgate"] is shipped.policies["tgate"]


@pytest.mark.parametrize("noun", PARTS)
def test_parts_of_plugins_are_words_of_specs_and_each_has_one_owner(point, noun):
    field, base, method = PARTS[noun]
    source = HEAD + PART.format(base=base, field=field, name="own", method=method)
    catalog = build([point("a", source)])
    assert catalog.failures == ()
    assert catalog.owners[f"{noun} 'own'"] == "a"
    key = {"place": "where", "schedule": "when", "stand-in": "what"}[noun]
    spec = ",".join({"where": "where=denoiser", key: f"{key}=own"}.values())
    with_cache = build([point("a", source), *entry_points(group="cachekit", name="forecast")])
    assert str(parse(f"cache:{spec}", with_cache)) == f"cache:{spec}"
    both = build([point("a", source), point("b", source), *entry_points(group="cachekit", name="forecast")])
    line = both.clashes[f"{noun} 'own'"]
    assert line.startswith(f"{noun} 'own' is registered by plugin 'a' of an unknown distribution and by plugin 'b' of")
    with pytest.raises(SpecError) as caught:
        parse(f"cache:{spec}", both)
    assert str(caught.value) == f"spec 'cache:{spec}': {key}: {line}"


def test_order_of_installation_does_not_matter(point):
    points = [point(name, HEAD + POLICY.format(cls="P", name=name) + REGISTER.format("P")) for name in "cab"]
    assert list(build(points).policies) == list(build(points[::-1]).policies) == ["a", "b", "c"]


def test_a_disabled_plugin_is_not_even_imported(point):
    catalog = build([point("broken", "import no_such_module_anywhere"), point("good", GOOD)], disabled=["broken"])
    assert catalog.failures == ()
    assert list(catalog.policies) == ["good"]


@pytest.fixture
def fresh():
    installed.cache_clear()
    yield
    installed.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_the_environment_disables_installed_plugins(monkeypatch):
    monkeypatch.setenv(DISABLE, " tgate ,null_text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        catalog = installed()
    assert {"deepcache", "adaptive_guidance"} <= set(catalog.policies)
    assert not {"tgate", "cair", "null_text"} & set(catalog.policies)


@pytest.mark.usefixtures("fresh")
def test_an_unknown_name_in_the_environment_is_a_warning(monkeypatch):
    monkeypatch.setenv(DISABLE, "tgat,")
    expected = r"^CACHEKIT_DISABLE names 'tgat', which is no plugin \(did you mean 'tgate'\?\); plugins: .*, unet$"
    with pytest.warns(PluginWarning, match=expected) as seen:
        assert "tgate" in installed().policies
    assert len(seen) == 1


@pytest.mark.usefixtures("fresh")
def test_a_failure_is_a_warning_once(point, monkeypatch):
    points = [point("broken", "import no_such_module_anywhere"), point("good", GOOD)]
    monkeypatch.setattr("cachekit.registry.catalog.entry_points", lambda group: points)
    with pytest.warns(PluginWarning, match="plugin 'broken' of an unknown distribution failed to load"):
        catalog = installed()
    assert list(catalog.policies) == ["good"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert installed() is catalog


def test_everything_shipped_loads_and_has_a_summary():
    catalog = installed()
    assert catalog.failures == ()
    assert {"adaptive_guidance", "cair", "deepcache", "null_text", "tgate"} <= set(catalog.policies)
    assert {"dit", "unet"} <= set(catalog.adapters)
    parts = (*catalog.places.values(), *catalog.schedules.values(), *catalog.stand_ins.values())
    for thing in (*catalog.policies.values(), *catalog.adapters.values(), *parts):
        assert thing.summary
    assert set(catalog.owners.values()) == set(catalog.plugins)
    assert {catalog.plugins[name] for name in ("tgate", "deepcache", "unet")} == {"cachekit-diffusion"}


ADAPTER = """
class Toy:
    name, summary = {name!r}, 'toys'
    def matches(self, denoiser):
        return denoiser == 'toy'
    def sites(self, denoiser):
        raise NotImplementedError
    def layout(self, denoiser):
        raise NotImplementedError
@hookimpl
def cachekit_register_adapters(register):
    register(Toy())
"""


def test_none_or_several_adapters_is_an_error_that_names_them(point):
    catalog = build([point(name, HEAD + ADAPTER.format(name=name)) for name in ("x", "y")])
    with pytest.raises(AdapterError, match="adapters 'x' and 'y' both match str; disable one with CACHEKIT_DISABLE"):
        catalog.adapter_for("toy")
    with pytest.raises(AdapterError, match="no adapter matches int; adapters: x, y"):
        catalog.adapter_for(3)


HOOKS = """
@hookimpl
def cachekit_check_plan(plan):
    return [plan] if plan else []
seen = []
@hookimpl
def cachekit_run_finished(report):
    seen.append(report)
"""


def test_plans_are_checked_and_reports_handed_out(point):
    entry = point("hooks", HEAD + HOOKS)
    catalog = build([entry])
    catalog.check_plan("")
    with pytest.raises(ConflictError, match="these two do not go together"):
        catalog.check_plan("these two do not go together")
    report = type("Report", (), {"warnings": []})()
    catalog.run_finished(report)
    assert entry.load().seen == [report]
    assert issubclass(ConflictError, CachekitError)


def test_a_catalog_is_shared_by_copies():
    catalog = installed()
    assert copy.deepcopy({"catalog": catalog})["catalog"] is catalog


# -- plugins that fail while a pipeline is at work -------------------------------------------------------------

SPEC = "adaptive_guidance:m=2"
RAISING = """
@hookimpl
def {}({}):
    raise OSError("no\\nfile")
"""


@pytest.fixture
def failing(point):
    """A function that builds the installed catalog with one more plugin, which fails in the given hook."""

    def make(hook, argument):
        extra = point("failing", HEAD + RAISING.format(hook, argument))
        return build([*entry_points(group="cachekit"), extra])

    return make


@pytest.fixture
def pipe():
    return tiny.pixart()


@pytest.mark.parametrize("what", ["policies", "adapters"])
def test_a_plugin_that_fails_to_register_costs_no_image(pipe, failing, what):
    with cachekit.apply(pipe, SPEC):
        expected = tiny.latents(pipe, steps=4)
    catalog = failing(f"cachekit_register_{what}", "register")
    assert [failure.plugin for failure in catalog.failures] == ["failing"]
    with cachekit.apply(pipe, SPEC, catalog=catalog):
        assert torch.equal(tiny.latents(pipe, steps=4), expected)


def test_a_plugin_that_fails_to_check_a_plan_changes_nothing(pipe, failing):
    plain, catalog = tiny.latents(pipe, steps=4), failing("cachekit_check_plan", "plan")
    with tiny.leaves_no_trace(pipe), pytest.raises(PluginError) as caught:
        cachekit.apply(pipe, SPEC, catalog=catalog)
    assert str(caught.value) == (
        "plugin 'failing' of an unknown distribution failed in cachekit_check_plan: OSError: no file"
        f" (fix or uninstall it, or set {DISABLE}=failing)"
    )
    assert torch.equal(tiny.latents(pipe, steps=4), plain)


def test_a_plugin_that_fails_at_the_end_of_a_run_costs_no_image(pipe, failing, caplog):
    never_fires = "adaptive_guidance:m=9"
    with cachekit.apply(pipe, SPEC):
        expected = tiny.latents(pipe, steps=4)
    catalog = failing("cachekit_run_finished", "report")
    with cachekit.apply(pipe, SPEC, catalog=catalog), pytest.warns(PluginWarning) as caught:
        assert torch.equal(tiny.latents(pipe, steps=4), expected)
    (warning,) = caught
    assert str(warning.message) == (
        "plugin 'failing' of an unknown distribution failed in cachekit_run_finished: OSError: no file"
        f" (fix or uninstall it, or set {DISABLE}=failing)"
    )
    # The other plugins get the report all the same.
    with cachekit.apply(pipe, never_fires, catalog=catalog), pytest.warns(PluginWarning):
        tiny.latents(pipe, steps=4)
    assert f"{never_fires} never fired" in caplog.text


class EveryOther(cachekit.Policy):
    name = "every_other"

    def choices(self):
        return {"it": cachekit.Choice(cachekit.WholeDenoiser(), cachekit.Every(n=2), cachekit.Reuse())}


#: An adapter of its own class of transformers, of which one method is broken in some way.
BROKEN_ADAPTER = """
from cachekit import Layout, SiteMap, module_sites
class Broken:
    name, summary = "odd_ones", "broken"
    def matches(self, denoiser):
        {matches}
        return type(denoiser).__name__ == "PixArtTransformer2DModel"
    def sites(self, denoiser):
        {sites}
        return SiteMap("PixArt", module_sites(denoiser))
    def layout(self, denoiser):
        {layout}
        return Layout()
@hookimpl
def cachekit_register_adapters(register):
    register(Broken())
"""
RAISED = ("raise ValueError('no\\nlist of blocks')", "ValueError: no list of blocks")
ADAPTER_FAULTS = [
    *((method, *RAISED) for method in ("matches", "sites", "layout")),
    ("sites", "return ['blocks.0']", "it returned ['blocks.0'], which is no SiteMap"),
    ("layout", "return ('uncond', 'cond')", "it returned ('uncond', 'cond'), which is no Layout"),
]


@pytest.mark.parametrize(("method", "code", "reason"), ADAPTER_FAULTS)
def test_an_adapter_that_fails_is_named_and_the_pipeline_unharmed(pipe, monkeypatch, point, method, code, reason):
    source = HEAD + BROKEN_ADAPTER.format(**{"matches": "", "sites": "", "layout": "", method: code})
    monkeypatch.setattr("cachekit.registry.catalog._distribution", lambda _: "cachekit-odd")
    catalog = build([point("odd", source)])
    plain = tiny.latents(pipe, steps=2)
    with tiny.leaves_no_trace(pipe), pytest.raises(PluginError) as caught:
        cachekit.apply(pipe, EveryOther(), catalog=catalog)
    assert str(caught.value) == (
        f"plugin 'odd' of cachekit-odd failed in {method} of its adapter 'odd_ones' for PixArtTransformer2DModel:"
        f" {reason} (fix or uninstall it, or set {DISABLE}=odd)"
    )
    assert torch.equal(tiny.latents(pipe, steps=2), plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("register(Broken())", "register(Broken)"), "is a class; register an instance, as in Broken()"),
        (("name, summary =", "name, summery ="), "has no summary; an adapter has them all"),
        (("def sites(", "def site("), "has no sites; an adapter has them all"),
        (("def matches(", "def match("), "has no matches; an adapter has them all"),
    ],
)
def test_half_an_adapter_is_left_out_and_the_others_serve(pipe, monkeypatch, point, change, reason):
    monkeypatch.setattr("cachekit.registry.catalog._distribution", lambda _: "cachekit-odd")
    source = HEAD + BROKEN_ADAPTER.format(matches="", sites="", layout="").replace(*change)
    catalog = build([point("odd", source), *entry_points(group="cachekit")])
    (failure,) = catalog.failures
    assert str(failure).startswith("plugin 'odd' of cachekit-odd failed to load: TypeError: ")
    assert reason in str(failure)
    assert catalog.adapter_for(pipe.transformer).name == "dit"


@pytest.mark.parametrize("answer", [True, "no", [5]])
def test_an_answer_about_a_plan_that_is_no_list_of_texts_is_named(pipe, point, answer):
    catalog = build([point("odd", HEAD + f"@hookimpl\ndef cachekit_check_plan(plan):\n    return {answer!r}\n")])
    with pytest.raises(PluginError, match=r"^plugin 'odd' of .* cachekit_check_plan: TypeError: it returned .* texts"):
        catalog.check_plan("")


def test_an_error_of_cachekit_in_an_adapter_stays_what_it_is(pipe, point):
    code = "from cachekit import AdapterError; raise AdapterError('write an adapter for two of them')"
    catalog = build([point("odd", HEAD + BROKEN_ADAPTER.format(matches="", sites=code, layout=""))])
    with pytest.raises(AdapterError, match=r"^write an adapter for two of them$"):
        cachekit.sites(pipe, catalog=catalog)
