"""The rooms stay apart: what each may import and mention, read from the source itself."""

from __future__ import annotations

import ast
import re

import diffusers
from support.sources import ADAPTERS, CORE, EXAMPLES, PLUGINS, ROOT, SHIPPED, each, short, tree_of

from cachekit.registry import hookspecs

PACKAGES = {path.name for room in ("plugins", "adapters") for path in (ROOT / room).iterdir() if path.is_dir()}


def imports(path):
    """Return the absolute modules that a file imports, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def top(modules):
    return {module.partition(".")[0] for module in modules}


def names(path):
    """Return every identifier and every string that is not a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, documented)]
    docs = {id(node.body[0].value) for node in nodes if docs_of(node)}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def docs_of(node):
    return ast.get_docstring(node) if node.body else None


def test_there_is_something_to_check():
    assert {"cachekit_tgate", "cachekit_deepcache", "cachekit_unet", "cachekit_dit"} <= PACKAGES
    assert len(CORE) > 20


@each(CORE)
def test_the_core_imports_no_plugin_and_no_adapter(path):
    assert not top(imports(path)) & PACKAGES
    assert not any(package in name for name in names(path) for package in PACKAGES)


@each([*PLUGINS, *EXAMPLES])
def test_a_policy_knows_no_model_and_no_adapter(path):
    assert not top(imports(path)) & {"diffusers", "transformers", "accelerate"}
    own = path.relative_to(ROOT).parts
    assert not top(imports(path)) & (PACKAGES - set(own))
    classes = {name for name in dir(diffusers) if re.search(r"(Model|Pipeline|Model2D|Conditional?)$", name)}
    assert not {word for name in names(path) for word in re.findall(r"\w+", name)} & classes
    assert "named_modules" not in names(path)


@each([*PLUGINS, *EXAMPLES])
def test_a_policy_imports_torch_only_where_it_needs_it(path):
    at_top = [node for node in tree_of(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or node.names[0].name for node in at_top}
    assert "torch" not in top(modules)


@each(ADAPTERS)
def test_an_adapter_knows_no_policy(path):
    assert not imports(path) & {"cachekit.Policy", "cachekit.Plan", "cachekit.interface.policy", "cachekit.planning"}
    own = path.relative_to(ROOT).parts
    assert not top(imports(path)) & (PACKAGES - set(own))
    policies = {name.removeprefix("cachekit_") for name in PACKAGES if (ROOT / "plugins" / name).exists()}
    assert not {name for name in names(path) if name.lower() in policies}


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
