"""Make ranks that share an image agree on an action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from cachekit.interface.moment import Action
from cachekit.upstream.parallel import context_parallel_group

#: The last of these that any rank asks for is taken: all compute, and keep, where one of them must.
_ORDER = (Action.REUSE, Action.COMPUTE, Action.STORE)


@dataclass(frozen=True)
class Vote:
    """The agreement of the ranks of `group`; without a group each decides alone."""

    group: Any = None
    device: Any = None

    def __call__(self, action: Action) -> Action:
        """Agree on the action that every rank of the group takes; each must call this, in the same order."""
        if self.group is None:
            return action
        asked = torch.tensor(_ORDER.index(action), device=self.device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX, self.group)
        return _ORDER[int(asked)]


def vote_of(denoiser: nn.Module) -> Vote:
    """Find the ranks that share this denoiser's images by context parallelism.

    Each rank has some of the tokens, and all meet within each attention: one that skipped it would leave the others
    waiting. Ranks with images of their own make different numbers of steps and never vote.
    """
    return Vote(*context_parallel_group(denoiser))
