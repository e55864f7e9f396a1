"""The rooms stay apart: what each may import and mention, read from the source itself."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys

import diffusers
import pytest
from support import tiny
from support.sources import ADAPTERS, CORE, EXAMPLES, PLUGINS, ROOT, SHIPPED, each, short, tree_of

import cachekit
from benchmarks.messages import is_in
from cachekit.registry import hookspecs
from cachekit.registry.catalog import installed
from cachekit.upstream.pipelines import denoiser_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = {path.name for room in ("plugins", "adapters") for path in (ROOT / room).iterdir() if path.is_dir()}


def module_of(path):
    """Find the dotted name of a file, and whether it is a package."""
    top_level = next(parent for parent in path.parents if not (parent / "__init__.py").exists())
    parts = path.relative_to(top_level).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts), parts[-1] == "__init__"


def imports(path):
    """Collect the absolute modules and names that a file imports: at its top, in functions, for type checking."""
    name, is_package = module_of(path)
    return imports_of(tree_of(path), name, is_package)


def imports_of(tree, name, is_package):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")[: None if is_package else -1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *(base.split(".") if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def top(modules):
    return {module.partition(".")[0] for module in modules}


def strings(path):
    """List every string that is not a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, documented)]
    docs = {id(node.body[0].value) for node in nodes if docs_of(node)}
    constants = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant) and id(node) not in docs)
    return [node.value for node in constants if isinstance(node.value, str)]


def names(path):
    """Yield every identifier and every string that is not a docstring."""
    yield from strings(path)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


def docs_of(node):
    return ast.get_docstring(node) if node.body else None


def test_there_is_something_to_check():
    assert {"cachekit_tgate", "cachekit_deepcache", "cachekit_unet", "cachekit_dit"} <= PACKAGES
    assert len(CORE) > 20


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import cachekit.cli", {"cachekit.cli"}),
        ("from cachekit import cli", {"cachekit", "cachekit.cli"}),
        ("from ..cli import app", {"cachekit.cli", "cachekit.cli.app"}),
        ("from .. import cli", {"cachekit", "cachekit.cli"}),
        ("from . import store", {"cachekit.runs", "cachekit.runs.store"}),
        ("from .store import Store", {"cachekit.runs.store", "cachekit.runs.store.Store"}),
        ("def late():\n    from ..cli import app", {"cachekit.cli", "cachekit.cli.app"}),
        ("if TYPE_CHECKING:\n    from ..cli import app", {"cachekit.cli", "cachekit.cli.app"}),
    ],
)
def test_every_sort_of_import_is_read(line, expected):
    assert imports_of(ast.parse(line), "cachekit.runs.run", is_package=False) == expected


#: The packages whose rooms have an order: the core, and its tools.
HOUSES = ("cachekit", "cachekit.tools")


def rooms(house):
    """Read the rank of each room, from low to high, as pyproject.toml gives them to import-linter."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (one["layers"] for one in contracts if one["type"] == "layers" and one["containers"] == [house])
    return {room.strip(): rank for rank, layer in enumerate(reversed(layers)) for room in layer.split("|")}


def folder_of(house):
    return ROOT.joinpath(*house.split("."))


def rooms_that_are_folders(house):
    return {room for room in rooms(house) if (folder_of(house) / room).is_dir()}


@pytest.mark.parametrize("house", HOUSES)
def test_the_rooms_are_those_of_the_linter(house):
    there = {path.name.removesuffix(".py") for path in folder_of(house).iterdir() if path.suffix in ("", ".py")}
    # The folder of the presets that ship holds no code.
    assert there - {"__init__", "__pycache__", "py.typed", "presets"} == set(rooms(house))
    assert len(rooms_that_are_folders(house)) <= 14


@pytest.mark.parametrize("house", HOUSES)
def test_each_room_has_tests_of_its_own(house):
    tests = ROOT.joinpath("tests", *house.split(".")[1:])
    assert {room for room in rooms_that_are_folders(house) if not [*(tests / room).rglob("test_*.py")]} == set()


@pytest.mark.parametrize("house", HOUSES)
def test_the_page_about_the_architecture_lists_every_room(house):
    text = (ROOT / "docs" / "architecture.md").read_text()
    above = "/".join(house.split(".")[1:])
    listed = re.findall(rf"^\| `{above and above + '/'}(\w+)(?:/|\.py)` \|", text, flags=re.MULTILINE)
    ranks = [rooms(house)[room] for room in listed if room in rooms(house)]
    assert sorted(rooms(house)) == sorted(set(listed) & set(rooms(house)))
    assert ranks == sorted(ranks)


@each([path for path in CORE if path != ROOT / "cachekit" / "__init__.py"])
def test_imports_between_rooms_go_down(path):
    for house in HOUSES:
        depth = house.count(".") + 1
        rank, own = rooms(house), module_of(path)[0].split(".")
        if ".".join(own[:depth]) == house and len(own) > depth:
            modules = [module.split(".") for module in imports(path) if module.startswith(f"{house}.")]
            others = {parts[depth] for parts in modules} - {own[depth], "__version__"}
            assert [room for room in others if rank[room] >= rank[own[depth]]] == []


def graph():
    """Collect the files that each file of the core imports; packages themselves hold nothing to import."""
    modules = {module_of(path)[0]: path for path in CORE if path.name != "__init__.py"}
    return {name: imports(path) & (modules.keys() - {name}) for name, path in modules.items()}


def test_no_files_import_each_other_in_a_circle():
    left = graph()
    while left:
        free = {name for name, wanted in left.items() if not wanted & left.keys()}
        assert free, sorted(left)
        left = {name: wanted for name, wanted in left.items() if name not in free}


@each([path for path in CORE if path != ROOT / "cachekit" / "__init__.py"])
def test_no_file_imports_the_package_that_imports_it(path):
    from_package = [node for node in ast.walk(tree_of(path)) if getattr(node, "module", None) == "cachekit"]
    assert {alias.name for node in from_package for alias in node.names} <= {"__version__"}
    whole = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Import)]
    assert "cachekit" not in {alias.name for node in whole for alias in node.names}


@each([path for path in CORE if path.name == "__init__.py" and path.parent.parent in map(folder_of, HOUSES)])
def test_a_room_re_exports_nothing(path):
    if path.parent.name not in ("cli", "testing"):  # the command line's entry point, and what tests import
        assert imports(path) <= {"__future__", "__future__.annotations"}


@each(CORE)
def test_the_core_imports_no_plugin_and_no_adapter(path):
    assert not top(imports(path)) & PACKAGES
    assert not any(package in name for name in names(path) for package in PACKAGES)


@functools.cache
def policies_of_plugins():
    """Collect the names by which plugins register policies: a package may have several."""
    found = {name for name, part in installed().policies.items() if top({part.__module__}) & PACKAGES}
    assert {"tgate", "cair", "forecast", "cache", "calibrated"} <= found
    return found - {"cache", "calibrated"}  # ordinary words, of which the second is also a stand-in of the core


#: Rooms that measure policies, or give examples of them.
MEASURING = ("cli", "testing", "tools/analysis", "tools/bench")


@each([path for path in CORE if not is_in(path, MEASURING)])
def test_texts_of_the_core_name_no_policy_of_a_plugin(path):
    assert not policies_of_plugins() & {word for text in strings(path) for word in re.findall(r"\w+", text)}


@each([*PLUGINS, *EXAMPLES])
def test_a_policy_knows_no_model_and_no_adapter(path):
    assert not top(imports(path)) & {"diffusers", "transformers", "accelerate"}
    own = path.relative_to(ROOT).parts
    assert not top(imports(path)) & (PACKAGES - set(own))
    classes = {name for name in dir(diffusers) if re.search(r"(Model|Pipeline|Model2D|Conditional?)$", name)}
    assert not {word for name in names(path) for word in re.findall(r"\w+", name)} & classes
    assert "named_modules" not in names(path)


@each([path for path in (*PLUGINS, *EXAMPLES) if path.parent.name != "serving"])
def test_a_policy_imports_torch_only_where_it_needs_it(path):
    at_top = [node for node in tree_of(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or node.names[0].name for node in at_top}
    assert "torch" not in top(modules)


@each([*PLUGINS, *ADAPTERS, *EXAMPLES])
def test_plugins_import_from_cachekit_alone(path):
    assert {module for module in imports(path) if module.startswith("cachekit.")} <= {
        f"cachekit.{name}" for name in cachekit.__all__
    }


@each(ADAPTERS)
def test_an_adapter_knows_no_policy(path):
    assert not imports(path) & {"cachekit.Policy", "cachekit.Plan"}
    own = path.relative_to(ROOT).parts
    assert not top(imports(path)) & (PACKAGES - set(own))
    assert not {name for name in names(path) if name.lower() in policies_of_plugins()}


#: Rooms that build models and pipelines of diffusers, whose configurations and arguments they write down, and a file.
BUILDING = ("models", "testing", "tools/coverage", "tools/bench/untrained.py")
#: Rooms that load or build models of diffusers by the names of its classes.
MODELS = ("upstream", "models", "testing", "tools/coverage", "tools/bench")
#: Python's words, and our own that diffusers uses too; "v_prediction" is a value of `Time.kind`.
OURS = {"_F", "__self__", "feed_forward", "step_index", "v_prediction"}


@functools.cache
def upstream_names():
    """Collect the names of torch and diffusers that `upstream/` spells."""
    spelled = {name for path in CORE if path.parent.name == "upstream" for name in strings(path)}
    telling = re.compile(r"\w*[a-z]_[a-z]\w*|_\w+|\w*[a-z][A-Z]\w*")
    return {name for name in spelled if telling.fullmatch(name)} - OURS


@functools.cache
def diffusers_names():
    """Collect what pipelines and denoisers of diffusers call arguments, components and modules, of several words."""
    found = set()
    for pipe in (tiny.small(), tiny.pixart(), tiny.sd3(), tiny.flux(), tiny.wan()):
        denoiser = denoiser_of(pipe)
        for function in (type(pipe).__call__, type(pipe).__init__, type(denoiser).forward, type(denoiser).__init__):
            found |= set(inspect.signature(function).parameters)
        found |= {*vars(pipe), *(word for name, _ in denoiser.named_modules() for word in name.split("."))}
    return {name for name in found if re.fullmatch(r"\w*[a-z]_[a-z]\w*", name)}


def test_there_are_names_of_upstream():
    assert {"_call_impl", "encoder_hidden_states", "do_classifier_free_guidance"} <= upstream_names()
    assert {"num_inference_steps", "encoder_attention_mask", "up_blocks", "vae_scale_factor"} <= diffusers_names()


@each([path for path in CORE if not is_in(path, ("upstream", *BUILDING))])
def test_only_one_room_spells_names_of_torch_and_diffusers(path):
    attributes = {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
    assert (upstream_names() | diffusers_names()) & {*attributes, *strings(path)} == set()


@each([path for path in CORE if not is_in(path, MODELS)])
def test_only_some_rooms_import_diffusers(path):
    assert "diffusers" not in top(imports(path))


def public_functions(path):
    """Yield the functions, methods and classes whose names have no underscore, with their qualified names."""
    stack = [(node, "") for node in tree_of(path).body]
    while stack:
        node, owner = stack.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node, f"{owner}{node.name}"
            if isinstance(node, ast.ClassDef):
                stack += [(child, f"{owner}{node.name}.") for child in node.body]


@each(SHIPPED)
def test_everything_public_has_a_docstring(path):
    assert docs_of(tree_of(path))
    assert [name for node, name in public_functions(path) if not docs_of(node)] == []


@each(SHIPPED)
def test_every_function_is_annotated(path):
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.returns is None and f.name != "__init__"] == []
    for function in functions:
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [argument.arg for argument in given if argument.annotation is None]
        assert set(bare) <= {"self", "cls"}, function.name


def test_every_hook_has_the_prefix_and_is_used_by_something_shipped():
    declared = {name for name, thing in vars(hookspecs).items() if hasattr(thing, "cachekit_spec")}
    assert declared
    assert all(name.startswith("cachekit_") for name in declared)
    implemented = set()
    for path in SHIPPED:
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(mark, ast.Name) and mark.id == "hookimpl" for mark in node.decorator_list
            ):
                implemented.add(node.name)
    assert implemented == declared


def test_every_package_is_typed():
    packages = {path.parent for path in (*CORE, *PLUGINS, *ADAPTERS, *EXAMPLES) if path.name == "__init__.py"}
    tops = {package for package in packages if package.parent not in packages}
    assert len(tops) > len(PACKAGES)
    assert all((package / "py.typed").exists() for package in tops)


def test_no_class_of_somebody_else_is_patched():
    """Assignments such as `SomeClass.method = ...` do not occur: only instances are changed."""
    for path in SHIPPED:
        for node in ast.walk(tree_of(path)):
            for target in getattr(node, "targets", []):
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert not target.value.id[0].isupper(), f"{short(path)}:{node.lineno}"
