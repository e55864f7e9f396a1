"""The table of all methods: where each acts, how it decides, what it needs and what it cannot be combined with."""

from __future__ import annotations

from cachekit import Policy
from cachekit.cli.samples import sample
from cachekit.registry.catalog import installed
from cachekit.tools.bench.tables import markdown
from cachekit.tools.coverage.properties import STRUCTURES, clashes, decides, kinds, needs

#: Policies that are no method of their own: another name, and tools.
_LEFT_OUT = {"cair", "cache", "null_text"}


def table() -> str:
    """Make the table."""
    header = ["method", "where", "decides", "needs", *STRUCTURES, "not beside", "paper"]
    return markdown(header, [row(name) for name in methods()], left=len(header))


def methods() -> list[str]:
    """List the names of all methods that ship, in order."""
    return sorted(name for name in installed().policies if name not in _LEFT_OUT)


def row(name: str) -> list[str]:
    """Make the row of a method."""
    made = sample(name)
    where = dict.fromkeys(str(choice.where) for choice in made.chosen().values())
    uses = [", ".join(kinds(made, structure)) or "-" for structure in STRUCTURES]
    beside = ", ".join(f"`{other}`" for other in methods() if clashes(made, sample(other))) or "-"
    link = f"[`{name}`](../plugins/{_folder(made)}/README.md)"
    places = ", ".join(f"`{one}`" for one in where)
    return [link, places, decides(made), ", ".join(needs(made)) or "-", *uses, beside, made.paper or "-"]


def _folder(made: Policy) -> str:
    return type(made).__module__.partition(".")[0]
