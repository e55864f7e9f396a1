"""The tables of all methods, and of the policies and parts that ship, made of what their classes say of themselves."""

from __future__ import annotations

from collections.abc import Mapping

from cachekit import Policy
from cachekit.cli.samples import sample
from cachekit.interface.parts import Part, word
from cachekit.registry.catalog import installed
from cachekit.tools.bench.tables import markdown
from cachekit.tools.coverage.properties import STRUCTURES, clashes, decides, kinds, needs

#: Policies that are no method of their own: another name, and tools.
_LEFT_OUT = {"cair", "cache", "null_text"}


def table() -> str:
    """Make the table."""
    header = ["method", "where", "decides", "needs", *STRUCTURES, "not beside", "paper"]
    return markdown(header, [row(name) for name in methods()], left=len(header))


def policies(plugins: str) -> str:
    """Make the table of all policies that ship, with links into the folder `plugins`."""
    rows = []
    for name, made in sorted(installed().policies.items()):
        rows.append([f"[`{name}`]({plugins}/{_folder(made)}/README.md)", made.summary, made.paper or "-"])
    return markdown(["policy", "summary", "paper"], rows, left=3)


def parts(noun: str, found: Mapping[str, type[Part]]) -> str:
    """Make the table of the parts of one sort that ship; what a stand-in predicts, `of`, is left out of the keys."""
    rows = []
    for name, part in sorted(found.items()):
        fields = {key: field for key, field in part.model_fields.items() if key != "of"}
        keys = [
            f"`{key}`" if field.is_required() else f"`{key}={word(field.default)}`" for key, field in fields.items()
        ]
        about = ", ".join(text for text in (part.summary, part.paper) if text)
        rows.append([f"`{name}`", ", ".join(keys) or "-", about])
    return markdown([noun, "keys", "summary"], rows, left=3)


def methods() -> list[str]:
    """List the names of all methods that ship, in order."""
    return sorted(name for name in installed().policies if name not in _LEFT_OUT)


def row(name: str) -> list[str]:
    """Make the row of a method."""
    made = sample(name)
    where = dict.fromkeys(str(choice.where) for choice in made.chosen().values())
    uses = [", ".join(kinds(made, structure)) or "-" for structure in STRUCTURES]
    beside = ", ".join(f"`{other}`" for other in methods() if clashes(made, sample(other))) or "-"
    link = f"[`{name}`](../plugins/{_folder(type(made))}/README.md)"
    places = ", ".join(f"`{one}`" for one in where)
    return [link, places, decides(made), ", ".join(needs(made)) or "-", *uses, beside, made.paper or "-"]


def _folder(made: type[Policy]) -> str:
    return made.__module__.partition(".")[0]
