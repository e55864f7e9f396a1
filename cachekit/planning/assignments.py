"""Bind policies to targets, and refuse policies that collide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cachekit.errors import ConflictError, PolicyError, SiteError, attributed
from cachekit.interface.moment import Moment
from cachekit.interface.parts import Choice, Part, credited
from cachekit.interface.policy import Policy
from cachekit.interface.sites import Kind, Site, Target

if TYPE_CHECKING:
    from cachekit.interface.adapter import Layout


@dataclass(frozen=True)
class Assignment:
    """One choice of a policy on one target of a denoiser; identified elsewhere by its index in a plan's `assignments`.

    `denoiser` is the name of the denoiser within its pipeline. It is empty at the guidance site, which all denoisers
    of a pipeline share, and for a denoiser without a pipeline.
    """

    policy: Policy
    choice: Choice
    target: Target
    denoiser: str = ""

    @property
    def is_guidance(self) -> bool:
        """Whether the target is the guidance site."""
        return self.target.kind is Kind.GUIDANCE

    @property
    def is_whole(self) -> bool:
        """Whether the target is the denoiser as a whole."""
        return self.target.kind is Kind.DENOISER

    @property
    def is_block(self) -> bool:
        """Whether the target is a block, a region or the denoiser, with sites inside."""
        return self.target.kind in (Kind.BLOCK, Kind.DENOISER)

    def covers(self, other: Assignment) -> bool:
        """Whether the other target lies inside this one, and so doesn't run on a step that reuses it."""
        if not self.is_block or other.is_guidance or self.denoiser != other.denoiser:
            return False
        return self.is_whole or (not other.is_whole and self.target.covers(other.target.exit))

    def stays(self, layout: Layout) -> str:
        """Name the branch that runs on where guidance drops one; raises `PolicyError` for one that isn't there."""
        found = self.choice.where.stays(layout)
        if found not in layout.order:
            named = " or ".join(map(repr, layout.order))
            place = credited(self.choice.where, self.policy)
            raise PolicyError(f"{attributed(self.policy)}: stays of {place} returned {found!r}; return {named}")
        return found

    def __deepcopy__(self, memo: dict[int, object]) -> Assignment:
        """Share the assignment between copies of a model: it is immutable."""
        return self


def origin(bound: Assignment, method: str, at: Moment, part: Part | None = None) -> str:
    """Name the policy, the method of a part of it and the distributions of both, the target and the step.

    `part` is needed for methods that schedules and stand-ins share.
    """
    owner = part or (bound.choice.what if method in ("predict", "amend", "watch") else bound.choice.when)
    named = credited(owner, bound.policy)
    return f"{attributed(bound.policy)}: {method} of {named} for {bound.target.name!r} at step {at.step}"


def assign(chosen: Iterable[Assignment]) -> tuple[Assignment, ...]:
    """Combine what policies have chosen in each denoiser; a policy's choice of the guidance site counts once.

    Several policies may share the guidance site. Raises `ConflictError` where two of them would write the same
    target, or blocks or regions of which one lies inside the other, and `SiteError` where a stand-in is made for
    residuals that don't exist.
    """
    found: list[Assignment] = []
    for bound in map(_detached, chosen):
        if bound.is_guidance and any(other.policy is bound.policy and other.target is bound.target for other in found):
            continue
        _refuse_without_residual(bound)
        _refuse_clash(bound, found)
        found.append(bound)
    return tuple(found)


def _detached(bound: Assignment) -> Assignment:
    """Leave out the denoiser at the guidance site, which all denoisers share."""
    return replace(bound, denoiser="") if bound.is_guidance else bound


def _refuse_without_residual(bound: Assignment) -> None:
    if bound.choice.what.of == "residual" and isinstance(bound.target, Site) and bound.target.resizes:
        raise SiteError(
            f"{bound.policy}: {bound.target.name!r} has no residual, its output is not as wide as its input; use"
            " of=output or another place"
        )


def _refuse_clash(bound: Assignment, found: Iterable[Assignment]) -> None:
    for other in found:
        if other.policy is not bound.policy and _clash(bound, other):
            raise ConflictError(
                f"{str(other.policy)!r} and {str(bound.policy)!r} would both write {bound.target.name!r};"
                " apply one of them"
            )


def _clash(one: Assignment, other: Assignment) -> bool:
    if one.is_guidance or other.is_guidance or one.denoiser != other.denoiser:
        return False
    if one.is_whole != other.is_whole:  # what is inside a call is composed with the call as a whole
        return False
    if one.is_block and other.is_block:
        return one.covers(other) or other.covers(one)
    return one.target.name == other.target.name
