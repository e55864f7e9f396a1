"""What is true of a policy beyond its settings: what it acts on, needs and decides by, and what it can't stand beside.

All of it is read from the policy's parts and from its targets in two embedded models, a UNet and a transformer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from cachekit.driving.setup import Setup
from cachekit.errors import ConflictError, SiteError
from cachekit.interface.indicators import Indicator
from cachekit.interface.policy import Policy
from cachekit.interface.sites import Kind
from cachekit.models.demo.pipeline import demo_pipeline
from cachekit.planning.assignments import Assignment, assign
from cachekit.registry.catalog import installed
from cachekit.tools.calibrating.measured import Measured
from cachekit.tools.calibrating.standins import Calibrated
from cachekit.upstream.pipelines import denoisers_of

#: The embedded model of each structure.
STRUCTURES = {"UNet": "unet", "transformer": "dit"}


def properties(policy: Policy, others: Iterable[Policy]) -> dict[str, Any]:
    """Collect the properties of a policy as plain data.

    `acts_on` has the kinds of targets for each of `STRUCTURES`, and `not_beside` the names of those of the `others`
    that it can't be combined with.
    """
    return {
        "acts_on": {structure: kinds(policy, structure) for structure in STRUCTURES},
        "needs": list(needs(policy)),
        "decides": decides(policy),
        "not_beside": [other.name for other in others if clashes(policy, other)],
    }


def decides(policy: Policy) -> str:
    """Name what a policy decides by."""
    choices = policy.chosen().values()
    parts = [part for choice in choices for part in (choice.when, choice.what)]
    if policy.observes or any(isinstance(part, Indicator) for part in parts):
        return "by values"
    if any(isinstance(part, Measured) for part in parts):
        return "by measured figures"
    return (
        "by weights measured on the model" if any(isinstance(part, Calibrated) for part in parts) else "before the run"
    )


def needs(policy: Policy) -> Iterator[str]:
    """Name what has to be given or be there: keys, what is measured on the model, its structure, guidance."""
    yield from (f"{key}=" for key, field in type(policy).model_fields.items() if field.is_required())
    if decides(policy) == "by measured figures":
        keys = " or ".join(f"{key}=" for key in sorted(policy.exclusive or ("file",)))
        yield f"figures of the model from cachekit calibrate ({keys})"
    if any(isinstance(choice.what, Calibrated) for choice in policy.chosen().values()):
        yield "weights for the model from cachekit calibrate"
    found = {structure: kinds(policy, structure) for structure in STRUCTURES}
    fitting = [structure for structure, names in found.items() if names]
    if len(fitting) < len(STRUCTURES):
        yield from (f"a {structure}" for structure in fitting)
    if all(set(names) <= {str(Kind.GUIDANCE)} for names in found.values()):
        yield "classifier-free guidance"


def kinds(policy: Policy, structure: str) -> list[str]:
    """List the kinds of targets that a policy has in a model of this structure; none where it is refused."""
    return list(dict.fromkeys(str(bound.target.kind) for bound in _bound(policy, structure)))


def clashes(one: Policy, other: Policy) -> bool:
    """Whether two policies would write the same targets, so that they are refused together."""
    return one.name != other.name and any(_clash(_bound(one, name), _bound(other, name)) for name in STRUCTURES)


def _clash(*bound: tuple[Assignment, ...]) -> bool:
    try:
        assign(itertools.chain(*bound))
    except ConflictError:
        return True
    return False


@functools.lru_cache(maxsize=256)
def _bound(policy: Policy, structure: str) -> tuple[Assignment, ...]:
    """Bind a policy to the embedded model of a structure; nothing where it is refused there."""
    try:
        return _bare(structure).following([policy]).assignments
    except SiteError:
        return ()


@functools.cache
def _bare(structure: str) -> Setup:
    """Load the embedded model of a structure, without policies."""
    return Setup.of(denoisers_of(demo_pipeline(STRUCTURES[structure])), [], installed())
