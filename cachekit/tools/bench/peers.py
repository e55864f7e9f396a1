"""Run the published packages of policies, where they are installed and support the options of a spec."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import nn

from cachekit.costs.counting import macs_of_layer
from cachekit.interface.policy import Policy
from cachekit.tools.bench.measuring import Arguments, RunResult, timed_call
from cachekit.upstream.calling import STEPS
from cachekit.upstream.pipelines import denoiser_of

__all__ = ["Peer", "counting", "peer_exists", "published", "twin"]

#: The options that a policy and its published package share.
_SHARED = {
    "tgate": {"m", "sp_interval", "fi_interval", "warm_up"},
    "deepcache": {"interval", "branch"},
}
_PACKAGES = {"tgate": "tgate", "deepcache": "DeepCache"}
_LOADERS = {
    ("StableDiffusionPipeline", "tgate"): "TgateSDLoader",
    ("StableDiffusionXLPipeline", "tgate"): "TgateSDXLLoader",
    ("PixArtAlphaPipeline", "tgate"): "TgatePixArtAlphaLoader",
    ("StableDiffusionPipeline", "deepcache+tgate"): "TgateSDDeepCacheLoader",
    ("StableDiffusionXLPipeline", "deepcache+tgate"): "TgateSDXLDeepCacheLoader",
    ("StableDiffusionPipeline", "deepcache"): "DeepCacheSDHelper",
    ("StableDiffusionXLPipeline", "deepcache"): "DeepCacheSDHelper",
}
#: Pipelines whose published version takes samples of the sizes of a few models alone, so that grids leave it out.
_SIZED = ("PixArtAlphaPipeline",)


def peer_exists(policies: Sequence[Policy], pipeline: str) -> bool:
    """Whether installed published packages support these policies on a pipeline of that class."""
    if pipeline in _SIZED or (pipeline, _names(policies)) not in _LOADERS:
        return False
    packages = {_PACKAGES[policy.name] for policy in policies}
    known = all(set(policy.model_dump(exclude_defaults=True)) <= _SHARED[policy.name] for policy in policies)
    return known and all(find_spec(package) for package in packages)


class Peer:
    """Runs a pipeline with the published packages, on a copy; the pipeline itself is not changed."""

    def __init__(self, pipe: Any, policies: Sequence[Policy], arguments: Arguments) -> None:
        """Copy `pipe`, with shared weights, and load the package of `policies` into the copy."""
        self._twin = twin(pipe)
        self._arguments = arguments
        self._call, self._extra = published(self._twin, policies)
        self._macs: int | None = None

    def run(self, steps: int, prompt: str, seed: int) -> RunResult:
        """Generate the image of `prompt`; the first run counts the MACs, which are the same for every later one."""
        arguments = {STEPS: steps, **self._arguments(prompt), **self._extra}
        if self._macs is None:
            with counting(denoiser_of(self._twin)) as count:
                image, watch = timed_call(self._call, arguments, seed)
            self._macs = count.macs
        else:
            image, watch = timed_call(self._call, arguments, seed)
        return RunResult(image, watch.seconds, self._macs, cache_bytes=None, peak_memory=watch.peak_memory)


def _names(policies: Sequence[Policy]) -> str:
    return "+".join(sorted(policy.name for policy in policies))


def published(twin: Any, policies: Sequence[Policy]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Load the package of `policies` into a pipeline: what replaces its call, and the extra arguments that it takes."""
    fields = {policy.name: policy.model_dump() for policy in policies}
    gate, cache = fields.get("tgate", {}), fields.get("deepcache", {})
    extra = {name: gate[name] for name in ("sp_interval", "fi_interval", "warm_up") if gate}
    name = _LOADERS[type(twin).__name__, _names(policies)]
    if not gate:
        import DeepCache

        helper = getattr(DeepCache, name)(pipe=twin)
        helper.set_params(cache_interval=cache["interval"], cache_branch_id=cache["branch"])
        helper.enable()
        return twin.__call__, {}
    import tgate

    intervals = {"cache_interval": cache["interval"], "cache_branch_id": cache["branch"]} if cache else {}
    loaded = getattr(tgate, name)(twin, **intervals)
    return loaded.tgate, {"gate_step": gate["m"], **extra}


def twin(pipe: Any) -> Any:
    """Copy a pipeline and its modules; every weight is shared with the original."""
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    weights = (weight for module in modules for weight in (*module.parameters(), *module.buffers()))
    return copy.deepcopy(pipe, {id(weight): weight for weight in weights})


@dataclass
class _Count:
    macs: int = 0


@contextmanager
def counting(model: nn.Module) -> Iterator[_Count]:
    """Count the MACs of all Linear and convolution layers that run."""
    count = _Count()

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        count.macs += macs_of_layer(module, inputs[0], output)

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
