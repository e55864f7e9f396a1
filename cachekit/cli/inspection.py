"""`cachekit list`, `show`, `sites` and `plan`: installed policies, a model's sites, and the plan of a run."""

from __future__ import annotations

import inspect
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.output import say, write
from cachekit.models.loading import EMBEDDED

if TYPE_CHECKING:
    from cachekit.interface.policy import Policy
    from cachekit.interface.sites import SiteMap
    from cachekit.registry.catalog import Catalog

_MODEL = f"Folder or hub id of a diffusers pipeline, or {EMBEDDED}."
Model = Annotated[str, typer.Argument(help=_MODEL)]


def list_installed() -> None:
    """List the installed policies and adapters, their keys, and the packages they come from."""
    from cachekit.registry.catalog import installed

    catalog = installed()
    say("policies")
    for name, policy in sorted(catalog.policies.items()):
        say(f"  {name}: {policy.summary}")
        say(f"      {_keys(policy) or 'no keys'}")
        say(f"      from {_origin(catalog, 'policy', name)}{', ' * bool(policy.paper)}{policy.paper}")
    say("adapters")
    for name, adapter in sorted(catalog.adapters.items()):
        say(f"  {name}: {adapter.summary}")
        say(f"      from {_origin(catalog, 'adapter', name)}")


def show(policy: Annotated[str, typer.Argument(help="Name of a policy, as in a spec.")]) -> None:
    """Show one policy: its description, its keys with types, defaults and bounds, its kinds and its paper."""
    from cachekit.errors import SpecError, nearest
    from cachekit.registry.catalog import installed

    catalog = installed()
    if policy not in catalog.policies:
        known = ", ".join(sorted(catalog.policies)) or "none"
        raise SpecError(f"unknown policy {policy!r}{nearest(policy, catalog.policies)}; known: {known}")
    found = catalog.policies[policy]
    say(f"{policy}: {found.summary}\n")
    say(f"{inspect.cleandoc(found.__doc__ or '')}\n")
    for name, field in found.model_fields.items():
        say(f"  {name}={_word(field.default)}  {_type(field.annotation)}{_bounds(field.metadata)}")
    say(f"kinds   {', '.join(sorted(str(kind) for kind in found.kinds))}")
    say(f"paper   {found.paper or 'none'}")
    say(f"from    {_origin(catalog, 'policy', policy)}")


def sites(
    model: Model,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every site, not only their number.")] = False,
) -> None:
    """Print the sites, regions and chains of a model; no weights are loaded."""
    from cachekit.models.loading import denoiser_from_config
    from cachekit.registry.catalog import installed

    denoiser = denoiser_from_config(model)
    adapter = installed().adapter_for(denoiser)
    found = adapter.sites(denoiser)
    say(f"{found.model}, adapter {adapter.name}, branches {' then '.join(adapter.layout(denoiser).order)}")
    _print_sites(found, verbose)


def plan(
    specs: Annotated[list[str], typer.Argument(help="Specs such as tgate:m=10.")],
    steps: Annotated[int, typer.Option(min=1, help="Number of steps: iterations of the pipeline's loop.")],
    model: Annotated[str, typer.Option(help=_MODEL)] = "demo",
    unguided: Annotated[bool, typer.Option("--unguided", help="Plan a run without classifier-free guidance.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Also write the plan to this SVG file.")] = None,
) -> None:
    """Print what each policy does in each step of a run; no weights are loaded."""
    from cachekit.applying import apply
    from cachekit.interface.specs import parse_all
    from cachekit.models.loading import denoiser_from_config
    from cachekit.registry.catalog import installed

    policies = parse_all(specs, installed())
    with apply(denoiser_from_config(model), policies) as attachment:
        made = attachment.plan(steps, guided=not unguided)
    say(made)
    if svg is not None:
        write(svg, made.picture())


def _origin(catalog: Catalog, what: str, name: str) -> str:
    plugin = catalog.owners[f"{what} {name!r}"]
    return f"{catalog.plugins[plugin]} (plugin {plugin})"


def _keys(policy: type[Policy]) -> str:
    return ", ".join(f"{name}={_word(field.default)}" for name, field in policy.model_fields.items())


def _word(value: Any) -> str:
    from pydantic_core import PydanticUndefined

    if value is PydanticUndefined:
        return "<needed>"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type(annotation: Any) -> str:
    """Describe a field's type for specs: the allowed words, or the kind of number."""
    from typing import Literal, get_args, get_origin

    if get_origin(annotation) is Literal:
        return " | ".join(str(word) for word in get_args(annotation))
    if get_args(annotation):
        return " | ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    return {"int": "whole number", "float": "number", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(bound, name)}" for bound in metadata for name, sign in signs.items() if hasattr(bound, name)
    ]
    return f", {' and '.join(found)}" if found else ""


def _print_sites(found: SiteMap, verbose: bool) -> None:
    names: dict[str, list[str]] = defaultdict(list)
    for site in found.sites:
        names[str(site.kind)].append(site.name)
    for kind, listed in sorted(names.items()):
        say(f"{kind} x {len(listed)}")
        for name in listed if verbose else []:
            say(f"  {name}")
    for region in found.regions:
        say(f"{region.name}: exit {region.exit}, skips {len(region.skipped)} more")
        for name in region.skipped if verbose else []:
            say(f"  {name}")
    for number, chain in enumerate(found.chains):
        streams = ", ".join(found.streams[number]) if number < len(found.streams) else ""
        say(f"chain {number}: {chain[0].name}..{chain[-1].name}, {len(chain)} blocks, streams {streams or 'unknown'}")
