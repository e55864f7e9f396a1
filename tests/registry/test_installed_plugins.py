"""A plugin with a mistake costs a line that names it: no image, no other plugin, nothing of the pipeline."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import tiny

import cachekit
from cachekit import CachekitError, PluginWarning, PolicyError, SpecError
from cachekit.registry.catalog import DISABLE, Catalog, installed

STEPS = 9
#: A plugin with a policy of one choice, whose lines the mistakes replace.
SOURCE = """
from typing import ClassVar
from cachekit import Choice, Every, Policy, Reuse, Schedule, Sites, hookimpl


class Late(Every):
    def full(self, at):
        return super().full(at)


class Latest(Reuse):
    def predict(self, history, at, given=()):
        return super().predict(history, at, given)


class {Name}(Policy):
    name: ClassVar[str] = "{name}"

    def choices(self):
        return {{"layers": Choice(Sites(kinds="feed_forward"), Late(n=2), Latest())}}


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
LATE = "wrong of dist-wrong: {} for 'transformer_blocks.0.ff' at step 7 "
FULL, PREDICT = "return super().full(at)", "return super().predict(history, at, given)"
#: Those that show in use.
IN_USE = {
    "kind": (
        '"feed_forward"',
        '"feed_forwards"',
        "wrong of dist-wrong: choices: Sites: kinds=feed_forwards: unknown kind",
    ),
    "raises": (FULL, "return 7 % (7 - at.step) == 0", LATE.format("action of every") + "raised ZeroDivisionError: "),
    "full": (
        FULL,
        "return 'x' if at.step == 7 else at.step == 0",
        LATE.format("action of every") + "raised TypeError: full",
    ),
    "bare": (
        PREDICT,
        "return history[0].tensors[0] if at.step == 7 else history[0].tensors",
        LATE.format("predict of reuse") + "returned a Tensor; return a tuple of 1 tensors",
    ),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Catalog]]:
    """A function that installs a plugin as a distribution `dist-NAME`, and then lists what is installed."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, old: str = "", new: str = "") -> Catalog:
        module = f"installed_{name}_{tmp_path.name}".replace("-", "_")
        source = SOURCE.format(name=name, Name=name.capitalize())
        assert old in source
        (tmp_path / f"{module}.py").write_text(source.replace(old, new) if old else source)
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
        catalog = install("wrong", old, new)
    (line,) = (str(one.message) for one in caught)
    assert line.startswith("plugin 'wrong' of dist-wrong failed to load: ")
    assert line.endswith(f"(fix or uninstall it, or set {DISABLE}=wrong)")
    assert reason in line
    assert "\n" not in line
    assert ("wrong" in catalog.policies, "right" in catalog.policies) == (False, True)
    assert others_work()


@pytest.mark.parametrize("mistake", IN_USE)
def test_nonsense_in_use_is_an_error(install: Callable[..., Catalog], mistake: str) -> None:
    old, new, reason = IN_USE[mistake]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install("right")
        install("wrong", old, new)
    pipe = shared("pixart")
    with tiny.leaves_no_trace(pipe), pytest.raises(SpecError if mistake == "kind" else PolicyError) as caught:  # noqa: SIM117
        with cachekit.apply(pipe, "wrong"):
            tiny.latents(pipe, steps=STEPS)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    assert others_work()


def test_a_name_that_two_distributions_take(install: Callable[..., Catalog]) -> None:
    install("right")
    install("wrong")
    with pytest.warns(PluginWarning) as caught:
        install("other", '"other"', '"wrong"')
    line = "policy 'wrong' is registered by plugin 'other' of dist-other and by plugin 'wrong' of dist-wrong; uninstall"
    assert [str(one.message) for one in caught] == [f"{line} one or set {DISABLE}=wrong"]
    with pytest.raises(CachekitError, match=f"^spec 'wrong': {line}"):
        cachekit.apply(shared("pixart"), "wrong")
    assert others_work()
