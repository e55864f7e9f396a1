"""A plugin with a mistake costs a line that names it: no image, no other plugin, nothing of the pipeline."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from support import tiny

import cachekit
from cachekit import CachekitError, PluginWarning, PolicyError, SpecError
from cachekit.registry.catalog import DISABLE, Catalog, installed

STEPS = 9
#: A plugin with a policy of one choice, whose lines the mistakes replace.
SOURCE = """
from dataclasses import replace
from typing import ClassVar
from cachekit import Accumulating, Choice, Every, Guidance, Policy, Reuse, Schedule, Sites, hookimpl


class Here(Sites):
    def find(self, sites):
        return super().find(sites)


class Late(Every):
    def full(self, at):
        return super().full(at)


class Latest(Reuse):
    def predict(self, history, at, given=()):
        return super().predict(history, at, given)


class {Name}(Policy):
    name: ClassVar[str] = "{name}"

    def choices(self):
        return {{"layers": Choice(Here(kinds="feed_forward"), Late(n=2), Latest())}}


@hookimpl
def cachekit_register_policies(register):
    register({Name})
"""
#: What is replaced, by what, and the reason that is given.
LEFT_OUT = {
    "import": ("from typing", "import no_such_module\nfrom typing", "No module named 'no_such_module'"),
    "hook": ("_register_policies", "_register_polices", "unknown hook 'cachekit_register_polices'"),
    "method": ("def choices", "observ = lambda self: 0\n    def choices", "Wrong.observ means nothing to cachekit"),
    "no choices": ("def choices", "def chioces", "Wrong has no choices; write it"),
    "twice": ("register(Wrong)", "[register(Wrong) for _ in '12']", "policy 'wrong' is registered twice; rename one"),
    "taken": ('"wrong"', '"tgate"', "policy 'tgate' ships with cachekit; choose another name"),
}
WRONG = "wrong of dist-wrong: "
AT_7 = " for 'transformer_blocks.0.ff' at step 7 "
FULL, PREDICT = "return super().full(at)", "return super().predict(history, at, given)"
FIND, HOOK = "return super().find(sites)", "@hookimpl"
LATE = "class Late(Every):"
#: What makes `late` a word of specs, and wrong in step 7.
WORD = {
    FULL: "return {}[at.step] if at.step == 7 else super().full(at)",
    LATE: f'{LATE}\n    name = "late"\n',
    HOOK: f"{HOOK}\ndef cachekit_register_schedules(register):\n    register(Late)\n\n\n{HOOK}",
}
#: Those that show in use: what is replaced, and the error, which begins with the spec.
IN_USE = {
    "kind": ({'"feed_forward"': '"feed_forwards"'}, WRONG + "choices: Here: kinds=feed_forwards: unknown kind"),
    "choices": ({"return {": "return None and {"}, WRONG + "choices returned None; return at least one Choice"),
    "choice": ({"Choice(Here": "(Here"}, WRONG + "the choice 'layers' is (Here("),
    "find": ({FIND: "return sites[0]"}, WRONG + "find of feed_forward raised TypeError: 'SiteMap' object"),
    "found": ({FIND: "return None"}, WRONG + "find of feed_forward returned None; return a list of sites"),
    "chosen": (
        {FIND: "return [replace(super().find(sites)[0], name='no.module')]"},
        WRONG + "find of feed_forward chose 'no.module', a module that PixArtTransformer2DModel doesn't have",
    ),
    "stays": (
        {FIND: "return Guidance().find(sites)\n\n    def stays(self, layout):\n        return 'both'"},
        WRONG + "stays of feed_forward returned 'both'; return 'uncond' or 'cond'",
    ),
    "probe": (
        {
            FIND: "return [replace(sites.span(0, 1), probe='transformer_blocks.0.ff')]",
            "Late(n=2)": "Accumulating(threshold=0.1)",
        },
        WRONG + "probe 'transformer_blocks.0.ff' of feed_forward does not run before 'transformer_blocks.0",
    ),
    "observe": (
        {"def choices": "def observe(self, seen, memory):\n        memory['no']\n\n    def choices"},
        WRONG + "observe at step 0 raised KeyError: 'no'",
    ),
    "raises": (
        {FULL: "return 7 % (7 - at.step) == 0"},
        WRONG + f"action of every{AT_7}raised ZeroDivisionError: ",
    ),
    "full": (
        {FULL: "return 'x' if at.step == 7 else at.step == 0"},
        WRONG + f"action of every{AT_7}raised TypeError: full",
    ),
    "bare": (
        {PREDICT: "return history[0].tensors[0] if at.step == 7 else history[0].tensors"},
        WRONG + f"predict of reuse{AT_7}returned a Tensor; return a tuple of 1 tensors",
    ),
    "word": (
        WORD,
        "cache:where=feed_forward,when=late of cachekit-diffusion:"
        f" action of late of dist-wrong{AT_7}raised KeyError: 7",
    ),
    "inner word": (
        WORD,
        "cache:where=feed_forward,when=window(high=2000.0,when=late) of cachekit-diffusion:"
        f" action of window(high=2000.0,when=late) of dist-wrong{AT_7}raised KeyError: 7",
    ),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Catalog]]:
    """A function that installs a plugin as a distribution `dist-NAME`, and then lists what is installed."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, changes: Mapping[str, str] = MappingProxyType({})) -> Catalog:
        module = f"installed_{name}_{tmp_path.name}".replace("-", "_")
        source = SOURCE.format(name=name, Name=name.capitalize())
        for old, new in changes.items():
            assert old in source
            source = source.replace(old, new)
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"dist_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[cachekit]\n{name} = {module}\n")
        installed.cache_clear()
        return installed()

    yield make
    installed.cache_clear()


shared = tiny.sharing({"pixart": functools.partial(tiny.pixart, layers=1)})
plain = tiny.uncached(shared, steps=4)


def others_work() -> bool:
    """Whether another plugin caches an image beside one that ships, and the pipeline is as it was."""
    pipe = shared("pixart")
    with cachekit.apply(pipe, ["right", "tgate:m=3"]) as attachment:
        found = tiny.latents(pipe, steps=4)
        counts = {count.policy: count.reused for count in attachment.report().counts}
    undone = tiny.latents(pipe, steps=4)
    return counts["right"] > 0 and not torch.equal(found, plain("pixart")) and torch.equal(undone, plain("pixart"))


@pytest.mark.parametrize("mistake", LEFT_OUT)
def test_a_plugin_that_cannot_be_loaded_is_a_warning(install: Callable[..., Catalog], mistake: str) -> None:
    install("right")
    old, new, reason = LEFT_OUT[mistake]
    with pytest.warns(PluginWarning) as caught:
        catalog = install("wrong", {old: new})
    (line,) = (str(one.message) for one in caught)
    assert line.startswith("plugin 'wrong' of dist-wrong failed to load: ")
    assert line.endswith(f"(fix or uninstall it, or set {DISABLE}=wrong)")
    assert reason in line
    assert "\n" not in line
    assert ("wrong" in catalog.policies, "right" in catalog.policies) == (False, True)
    assert others_work()


@pytest.mark.parametrize("mistake", IN_USE)
def test_nonsense_in_use_is_an_error(install: Callable[..., Catalog], mistake: str) -> None:
    changes, line = IN_USE[mistake]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install("right")
        install("wrong", changes)
    pipe = shared("pixart")
    with tiny.leaves_no_trace(pipe), pytest.raises(SpecError if mistake == "kind" else PolicyError) as caught:  # noqa: SIM117
        with cachekit.apply(pipe, line.split(" of ")[0]):
            tiny.latents(pipe, steps=STEPS)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert others_work()


def test_a_name_that_two_distributions_take(install: Callable[..., Catalog]) -> None:
    install("right")
    install("wrong")
    with pytest.warns(PluginWarning) as caught:
        install("other", {'"other"': '"wrong"'})
    line = "policy 'wrong' is registered by plugin 'other' of dist-other and by plugin 'wrong' of dist-wrong; uninstall"
    assert [str(one.message) for one in caught] == [f"{line} one or set {DISABLE}=wrong"]
    with pytest.raises(CachekitError, match=f"^spec 'wrong': {line}"):
        cachekit.apply(shared("pixart"), "wrong")
    assert others_work()
