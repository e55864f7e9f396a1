"""How much the outputs of sites change from step to step (arXiv 2404.02747, figure 2), recorded in uncached runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from cachekit.interface.moment import History, Moment, Streams
from cachekit.interface.observation import Observation
from cachekit.interface.parts import Choice, StandIn
from cachekit.interface.policy import Policy
from cachekit.interface.sites import LAYERS, Kind, SiteMap
from cachekit.parts.places import Sites, WholeDenoiser
from cachekit.parts.schedules import Every

if TYPE_CHECKING:
    from torch import Tensor

#: The kinds of sites that are recorded, besides the denoiser's output and the difference of guidance branches.
KINDS = (*LAYERS, Kind.BLOCK)
#: The branches whose difference is guidance.
_BRANCHES = ("cond", "uncond")
_LAST = "last_difference"

#: L2 norms `(2, branches * batch)` of changes, and of what changed, by kind, site and step.
_Norms = dict[tuple[str, str, int], list["Tensor"]]
#: Pairs of such norms by step.
_Values = dict[int, list[tuple[float, float]]]


class Notes:
    """The changes recorded so far: of a kind and a site, the values of each step over images and branches."""

    def __init__(self) -> None:
        """Start empty."""
        self._norms: _Norms = defaultdict(list)
        self.values: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = defaultdict(
            lambda: defaultdict(list)
        )

    def add(self, kind: str, site: str, step: int, new: Streams, old: Streams) -> None:
        """Take the norms of a change; they stay on their device until they are read together."""
        import torch

        pairs = [(one.float().flatten(1), other.float().flatten(1)) for one, other in zip(new, old)]
        apart = sum((one - other).square().sum(1) for one, other in pairs)
        size = sum(other.square().sum(1) for _, other in pairs)
        self._norms[kind, site, step].append(torch.stack([torch.as_tensor(apart), torch.as_tensor(size)]).sqrt())

    def read(self) -> None:
        """Turn the norms of a run that has ended into values."""
        for (kind, site, step), found in self._norms.items():
            for norms in found:
                apart, size = norms.tolist()
                self.values[kind, site][step] += zip(apart, size)
        self._norms.clear()


class Recorder(StandIn):
    """Records how far each output is from the one of the step before."""

    name: ClassVar[str] = "change_recorder"
    watches: ClassVar[bool] = True

    _kind: str = PrivateAttr()
    _notes: Notes = PrivateAttr()

    @classmethod
    def of_kind(cls, kind: str, notes: Notes) -> Recorder:
        """Record sites of one kind."""
        made = cls()
        made._kind, made._notes = kind, notes
        return made

    def watch(self, kept: Streams, history: History, at: Moment) -> None:
        """Record a change, unless the shapes changed with it."""
        if history and at.target is not None and _shapes(kept) == _shapes(history[0].tensors):
            self._notes.add(self._kind, at.target.name, at.step, kept, history[0].tensors)

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Take the newest entry; every step is full, so this isn't asked for."""
        return history[0].tensors


class Changes(Policy):
    """Computes everything, and records the changes of all sites of some kinds, the denoiser's output and guidance."""

    name: ClassVar[str] = "changes"
    summary: ClassVar[str] = "records how outputs change from step to step"

    kinds: tuple[Kind, ...] = ()
    _notes: Notes = PrivateAttr()

    @classmethod
    def noting(cls, sites: Iterable[SiteMap], notes: Notes) -> Changes:
        """Record the kinds of sites that a pipeline's denoisers have."""
        maps = list(sites)
        made = cls(kinds=tuple(kind for kind in KINDS if all(one.of(kind) for one in maps)))
        made._notes = notes
        return made

    def choices(self) -> Mapping[str, Choice]:
        """Choose the sites of each kind, and the denoiser as a whole."""
        places = {str(kind): Sites(kinds=(kind,)) for kind in self.kinds}
        return {
            name: Choice(where, Every(n=1), Recorder.of_kind(name, self._notes))
            for name, where in {**places, "denoiser": WholeDenoiser()}.items()
        }

    def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
        """Record the change of what guidance adds, the difference of both branches."""
        if not {*_BRANCHES} <= seen.outputs.keys():
            return
        cond, uncond = (seen.outputs[branch] for branch in _BRANCHES)
        difference, last = cond - uncond, memory.get(_LAST)
        if last is not None and last.shape == difference.shape:
            self._notes.add("guidance", "guidance", seen.step, (difference,), (last,))
        memory[_LAST] = difference


def curves(notes: Notes) -> dict[str, Any]:
    """Summarize changes as plain data: for each kind, overall and by site, mean and spread of each step.

    `l2` is the distance to the output of the step before, `relative` that distance over the norm of the latter; the
    spread is the standard deviation over sites, images and branches.
    """
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(kind for kind, _ in notes.values):
        sites = {site: steps for (of, site), steps in notes.values.items() if of == kind}
        steps = sorted({step for values in sites.values() for step in values})
        overall = {step: [pair for values in sites.values() for pair in values.get(step, ())] for step in steps}
        found[kind] = {
            "sites": len(sites),
            **_curve(overall),
            "by_site": {site: _curve(values) for site, values in sites.items()},
        }
    return found


def _curve(values: _Values) -> dict[str, Any]:
    """Compute the mean and the spread of each step's pairs of distance and norm."""
    steps = sorted(values)
    l2 = [[apart for apart, _ in values[step]] for step in steps]
    relative = [[apart / size for apart, size in values[step] if size] for step in steps]
    return {
        "steps": steps,
        **{
            name: {
                "mean": [fmean(each) if each else None for each in listed],
                "spread": [pstdev(each) if each else None for each in listed],
            }
            for name, listed in (("l2", l2), ("relative", relative))
        },
    }


def _shapes(streams: Streams) -> list[Any]:
    return [tensor.shape for tensor in streams]
