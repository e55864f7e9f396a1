"""Batches of prompts, and the arguments of a pipeline's call for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

from cachekit.upstream.calling import NEGATIVE_PROMPT, OUTPUT, STEPS, call_parameters
from cachekit.upstream.scales import scale_argument

#: The arguments of a call for one image; a text is its prompt.
Prompt = Union[str, Mapping[str, Any]]
#: The arguments that the prompts of a batch have of their own, and under `SEEDS` the seeds of their noise.
Batch = Mapping[str, Any]
SEEDS = "seeds"


def batched(prompts: Sequence[Prompt], batch: int, seed: int) -> list[Batch]:
    """Split prompts into batches: the arguments of a call for each, and the seeds of its noise."""
    each = [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]
    return [
        {
            **_joined(each[first : first + batch]),
            SEEDS: [seed + place for place in range(len(each))][first : first + batch],
        }
        for first in range(0, len(each), batch)
    ]


def _joined(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the arguments of several prompts: tensors along dimension 0, anything else in a list."""
    import torch

    joined: dict[str, Any] = {}
    for name, value in prompts[0].items():
        values = [prompt[name] for prompt in prompts]
        if isinstance(value, torch.Tensor):
            joined[name] = torch.cat(values)
        else:
            joined[name] = None if value is None else values
    return joined


def _for_each(name: str, value: Any, count: int) -> Any:
    """Repeat a negative prompt for each prompt, since some pipelines want one for each."""
    return [value] * count if name.startswith(NEGATIVE_PROMPT) and isinstance(value, str) else value


def size_of(batch: Batch) -> int:
    """Count the prompts of a batch."""
    return len(batch[SEEDS])


def shared_arguments(pipe: Any, scale: float | None, given: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Complete the arguments of calls: the guidance scale, and latents as output, since images aren't looked at.

    Whether guidance is true guidance is seen from those of a batch too.
    """
    taken = call_parameters(pipe)
    arguments = {**({OUTPUT: "latent"} if OUTPUT in taken else {}), **given}
    if scale is not None:
        arguments[scale_argument({**dict.fromkeys(taken), **arguments, **batch})] = scale
    return arguments


def call_of(batch: Batch, steps: int, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Make the arguments of a call of `steps` steps for a batch."""
    import torch

    given = dict(batch)
    seeds = given.pop(SEEDS)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    each = {name: _for_each(name, value, len(seeds)) for name, value in shared.items()}
    return {**each, **given, STEPS: steps, "generator": generators}
