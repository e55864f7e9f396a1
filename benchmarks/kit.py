"""The tables of docs/proving-a-policy.md: the tiny models of the kit, and its checks."""

from __future__ import annotations

from cachekit.testing.models import MODELS
from cachekit.testing.running import SOMEWHERE
from cachekit.testing.table import CHECKS
from cachekit.tools.bench.tables import markdown


def models() -> str:
    """Table of the models that policies are tried on."""
    return markdown(["model", "structure"], [[f"`{name}`", model.summary] for name, model in MODELS.items()], left=2)


def checks() -> str:
    """Table of the checks, in the order in which they are made."""
    demands = {name: check.invariant for name, check in CHECKS.items()}
    demands[SOMEWHERE] = "One of the models takes the policy, and something is reused there."
    rows = [[f"`{name}`", demand.removesuffix(".")] for name, demand in demands.items()]
    return markdown(["check", "what it demands"], rows, left=2)
