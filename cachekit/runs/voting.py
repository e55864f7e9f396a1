"""Let the processes that compute one image together decide together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from cachekit.interface.policy import Action

#: A vote takes the last of these that any process asks for: it computes, and keeps, where one of them must.
_ORDER = (Action.REUSE, Action.COMPUTE, Action.STORE)


@dataclass(frozen=True)
class Vote:
    """Make one action of those that the processes of `group` ask for; without a group each decides alone."""

    group: Any = None
    device: Any = None

    def __call__(self, action: Action) -> Action:
        """Return the action that every process of the group takes; all of them have to ask, in the same order."""
        if self.group is None:
            return action
        asked = torch.tensor(_ORDER.index(action), device=self.device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX, self.group)
        return _ORDER[int(asked)]


def vote_of(denoiser: nn.Module) -> Vote:
    """Return the vote of those that share this denoiser's images: diffusers' context parallelism, if it is on.

    There each process sees other tokens, and all of them meet within each attention: those that skip it would
    leave the rest waiting. Processes that draw images of their own make other numbers of steps and never vote.
    """
    config: Any = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    return Vote() if mesh is None else Vote(mesh.get_group(), config._device)
