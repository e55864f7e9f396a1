"""`cachekit list`, `show`, `sites` and `plan`: installed policies and parts, a model's sites, and the plan of a run."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.models import ANY_MODEL, AnyModel, any_model, complete_any
from cachekit.cli.output import JsonFile, check_writable, json_results, say, warn, write

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from cachekit.interface.parts import Part
    from cachekit.interface.sites import SiteMap
    from cachekit.registry.catalog import Catalog


def list_installed(json_file: JsonFile = None) -> None:
    """List the installed policies, parts, adapters and presets, with their keys and where they come from."""
    from cachekit.registry.catalog import installed

    catalog = installed()
    with json_results(json_file) as give:
        give(_listed(catalog))
        _print_list(catalog)


def _listed(catalog: Catalog) -> dict[str, Any]:
    """Write what is installed as plain data."""
    from cachekit.interface.presets import Preset, shipped

    shelves = {
        title.partition(" (")[0]: [_described(catalog, noun, part) for _, part in sorted(found.items())]
        for title, noun, found in _shelves(catalog)
    }
    adapters = [
        {"name": name, "summary": one.summary, "from": _origin(catalog, "adapter", name)}
        for name, one in sorted(catalog.adapters.items())
    ]
    presets = {name: Preset.load(path) for name, path in shipped().items()}
    found = [{"name": name, "summary": one.summary, "specs": one.specs} for name, one in presets.items()]
    return {**shelves, "adapters": adapters, "presets": found}


def _described(catalog: Catalog, noun: str, part: type[Part]) -> dict[str, Any]:
    keys = {
        key: {"default": _default(field), "type": f"{_type(field.annotation)}{_bounds(field.metadata)}"}
        for key, field in _own_fields(part).items()
    }
    origin = _origin(catalog, noun, part.name)
    return {"name": part.name, "summary": part.summary, "keys": keys, "paper": part.paper, "from": origin}


def _print_list(catalog: Catalog) -> None:
    from cachekit.interface.presets import Preset, shipped

    for title, noun, found in _shelves(catalog):
        say(title)
        for name, part in sorted(found.items()):
            say(f"  {name}: {part.summary}")
            say(f"      {_keys(part) or 'no keys'}")
            say(f"      from {_origin(catalog, noun, name)}{', ' * bool(part.paper)}{part.paper}")
    say("adapters")
    for name, adapter in sorted(catalog.adapters.items()):
        say(f"  {name}: {adapter.summary}")
        say(f"      from {_origin(catalog, 'adapter', name)}")
    say("presets (preset:NAME)")
    for name, preset in ((name, Preset.load(path)) for name, path in shipped().items()):
        say(f"  {name}: {preset.summary}")
        say(f"      {preset.evidence.source or 'measured by python -m benchmarks.frontier'}")


def show(
    name: Annotated[str, typer.Argument(help="Name of a policy or of a part, as in a spec.")],
    json_file: JsonFile = None,
) -> None:
    """Show one policy, schedule, stand-in or place: its description, its keys with types, defaults and bounds."""
    from cachekit.errors import SpecError, nearest
    from cachekit.registry.catalog import installed

    catalog = installed()
    shelves = [(noun, found) for _, noun, found in _shelves(catalog)]
    if not any(name in found for _, found in shelves):
        known = sorted({word for _, found in shelves for word in found})
        raise SpecError(f"unknown policy or part {name!r}{nearest(name, known)}; known: {', '.join(known) or 'none'}")
    chosen = [(noun, found[name]) for noun, found in shelves if name in found]
    with json_results(json_file) as give:
        give([{"kind": noun, **_described(catalog, noun, part), **_used(noun, part)} for noun, part in chosen])
        for noun, part in chosen:
            _show(catalog, noun, part)


def _show(catalog: Catalog, noun: str, part: type[Part]) -> None:
    say(f"{part.name}: {part.summary}\n")
    # Examples are for readers of the source.
    say(f"{inspect.cleandoc(part.__doc__ or '').partition('>>>')[0].strip()}\n")
    for key, field in _own_fields(part).items():
        say(f"  {key}={_default(field)}  {_type(field.annotation)}{_bounds(field.metadata)}")
    if noun == "policy":
        _show_use(_used(noun, part))
        _show_choices(part)
    else:
        say(f"spec    {_KEYS[noun]}={part.name}, in cache: or in a policy with one choice")
    say(f"paper   {part.paper or 'none'}")
    say(f"from    {_origin(catalog, noun, part.name)}")


def _used(noun: str, part: type[Part]) -> dict[str, Any]:
    """Describe the use of a policy as plain data: what it acts on, needs, decides by and can't be combined with."""
    from cachekit.cli.samples import samples
    from cachekit.tools.coverage.properties import properties

    found = samples() if noun == "policy" else {}
    return properties(found[part.name], found.values()) if part.name in found else {}


def _show_use(used: dict[str, Any]) -> None:
    for structure, kinds in used.get("acts_on", {}).items():
        say(f"on a {structure}: {', '.join(kinds) or 'refused'}")
    if used:
        say(f"needs   {'; '.join(used['needs']) or 'nothing'}")
        say(f"decides {used['decides']}")
        but = f" but {', '.join(used['not_beside'])}" if used["not_beside"] else ""
        say(f"beside  all other policies{but}")


def _show_choices(policy: type[Any]) -> None:
    """Print what a policy chooses with its defaults; a single choice can be replaced in the spec."""
    from cachekit.errors import SpecError

    try:
        choices = policy().chosen()
    except SpecError as error:
        say(f"choices depend on the keys: {str(error).partition(': ')[2]}")
        return
    say("choices with these defaults")
    for name, choice in choices.items():
        say(f"  {name}")
        say(f"      where={choice.where}")
        say(f"      when={_in_full(choice.when)}")
        say(f"      what={_in_full(choice.what)}")
        say(f"      when branches change: {choice.change.value}")


def sites(
    model: AnyModel,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every site, not only their number.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Print the sites, regions and chains of a model; no weights are loaded."""
    from cachekit.models.loading import denoiser_from_config
    from cachekit.registry.catalog import installed

    with json_results(json_file) as give:
        denoiser = denoiser_from_config(model)
        adapter = installed().adapter_for(denoiser)
        found, order = adapter.sites(denoiser), adapter.layout(denoiser).order
        say(f"{found.model}, adapter {adapter.name}, branches {' then '.join(order)}")
        _print_sites(found, verbose)
        give({"model": found.model, "adapter": adapter.name, "branches": list(order), **_sites_data(found)})


def _sites_data(found: SiteMap) -> dict[str, Any]:
    return {
        "sites": [{"name": site.name, "kind": str(site.kind)} for site in found.sites],
        "regions": [{"name": one.name, "exit": one.exit, "skipped": list(one.skipped)} for one in found.regions],
        "chains": [[block.name for block in chain] for chain in found.chains],
    }


def plan(
    specs: Annotated[list[str], typer.Argument(help="Specs such as tgate:m=10.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the pipeline's call (num_inference_steps).")],
    model: Annotated[str, typer.Option(help=ANY_MODEL, parser=any_model, autocompletion=complete_any)] = "demo",
    unguided: Annotated[bool, typer.Option("--unguided", help="Plan a run without classifier-free guidance.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Also write the plan to this SVG file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Print what each policy does in each step of a run; no weights are loaded."""
    from cachekit.applying import apply
    from cachekit.interface.specs import parse_all
    from cachekit.models.architectures import architecture, guided_by_default
    from cachekit.models.loading import pipeline_from_config
    from cachekit.models.names import is_architecture
    from cachekit.registry.catalog import installed

    check_writable(svg)
    with json_results(json_file) as give:
        policies = parse_all(specs, installed())
        named = is_architecture(model)
        pipe = architecture(model).build() if named else pipeline_from_config(model)
        guided = not unguided and guided_by_default(model if named else pipe)
        with apply(pipe, policies) as attachment:
            made = attachment.plan(steps, guided=guided)
        if len(made.rows) != steps:
            say(f"{model}: {steps} steps, {len(made.rows)} iterations")
        say(made.table)
        for warning in made.warnings:
            warn(warning)
        if svg is not None:
            write(svg, made.picture())
        columns = [dict(zip(("spec", "target", "kind", "marks"), column)) for column in made.columns()]
        give({"model": model, "steps": steps, "branches": [list(row.branches) for row in made.rows], "plan": columns})


def _origin(catalog: Catalog, what: str, name: str) -> str:
    plugin = catalog.owners[f"{what} {name!r}"]
    return f"{catalog.plugins[plugin]} (plugin {plugin})"


#: The key by which a spec names a part.
_KEYS = {"place": "where", "schedule": "when", "stand-in": "what"}


def _shelves(catalog: Catalog) -> list[tuple[str, str, Mapping[str, type[Part]]]]:
    """List the title, the noun and the classes of everything that a spec can name."""
    return [
        ("policies", "policy", catalog.policies),
        ("places (where=)", "place", catalog.places),
        ("schedules (when=)", "schedule", catalog.schedules),
        ("stand-ins (what=)", "stand-in", catalog.stand_ins),
    ]


def _own_fields(part: type[Part]) -> dict[str, FieldInfo]:
    """Fields of a class, without the keys that replace parts of any policy."""
    from cachekit.interface.policy import PARTS

    replaced = {key for key in PARTS if key in part.model_fields and part.model_fields[key].default is None}
    return {key: field for key, field in part.model_fields.items() if key not in replaced}


def _keys(part: type[Part]) -> str:
    return ", ".join(f"{key}={_default(field)}" for key, field in _own_fields(part).items())


def _default(field: FieldInfo) -> str:
    from cachekit.interface.parts import word

    return "<needed>" if field.is_required() else word(field.get_default(call_default_factory=True))


def _in_full(part: Part) -> str:
    """Write a part with all of its keys, defaults included."""
    from cachekit.interface.parts import word

    keys = ",".join(f"{key}={word(getattr(part, key))}" for key in type(part).model_fields)
    return f"{part.name}({keys})" if keys else part.name


def _type(annotation: Any) -> str:
    """Describe a field's type for specs: the allowed words, or the kind of number."""
    from typing import Literal, get_args, get_origin

    if get_origin(annotation) is Annotated:
        kind, *notes = get_args(annotation)
        return _type(kind) + _bounds([bound for note in notes for bound in getattr(note, "metadata", [note])])
    if get_origin(annotation) is Literal:
        return " | ".join(str(word) for word in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"{_type(get_args(annotation)[0])}, or several joined by ;"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    if get_args(annotation):
        return " | ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    words = {"int": "whole number", "float": "number", "bool": "true | false", "Where": "a place",
             "Schedule": "a schedule", "StandIn": "a stand-in"}  # fmt: skip
    return words.get(getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation)))


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
