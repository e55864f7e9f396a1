"""Bind policies to targets, and refuse policies that collide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cachekit.errors import ConflictError
from cachekit.interface.policy import Policy
from cachekit.interface.sites import Kind, Region, Target


@dataclass(frozen=True)
class Assignment:
    """Bind one policy to one target of a denoiser; the position in a plan's `assignments` is its index.

    The guidance is one for all denoisers of a pipeline: there `denoiser` is empty.
    """

    policy: Policy
    target: Target
    denoiser: str = ""


def assign(chosen: Iterable[tuple[Policy, str, Sequence[Target]]]) -> tuple[Assignment, ...]:
    """Return the assignments of (policy, denoiser, targets); raise `ConflictError` where two policies collide.

    The guidance site is shared: there the policy that narrows first decides.
    """
    found: list[Assignment] = []
    for policy, denoiser, targets in chosen:
        for target in targets:
            is_guidance = target.kind is Kind.GUIDANCE
            if is_guidance and any(other.policy is policy and other.target is target for other in found):
                continue
            bound = Assignment(policy, target, "" if is_guidance else denoiser)
            _refuse_clash(bound, found)
            found.append(bound)
    return tuple(found)


def _refuse_clash(bound: Assignment, found: Iterable[Assignment]) -> None:
    for other in found:
        guidance = Kind.GUIDANCE in (bound.target.kind, other.target.kind)
        if other.policy is bound.policy or other.denoiser != bound.denoiser or guidance:
            continue
        if _clash(bound.target, other.target):
            raise ConflictError(
                f"{str(other.policy)!r} and {str(bound.policy)!r} would both write {bound.target.name!r};"
                " apply one of them"
            )


def _clash(one: Target, other: Target) -> bool:
    if one.kind is Kind.BLOCK and other.kind is Kind.BLOCK:
        return one.covers(last_module(other)) or other.covers(last_module(one))
    return one.name == other.name


def last_module(target: Target) -> str:
    """Name the module that gives the target's output."""
    return target.exit if isinstance(target, Region) else target.name
