"""The documents are true: their code runs, their hooks and keys are the real ones, their links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support import commands, pages, tiny
from support.block_replays import measured

import cachekit
import cachekit.errors
import cachekit.testing
from cachekit import Reuse, Sites, WholeDenoiser
from cachekit.interface.moment import Moment
from cachekit.interface.parts import word
from cachekit.interface.policy import PARTS
from cachekit.interface.specs import parse
from cachekit.models.demo.scenes import heldout_captions
from cachekit.registry import hookspecs
from cachekit.registry.catalog import installed
from cachekit.testing import MODELS, Outcome, check_policy
from cachekit.tools.batch.rows import Defaults, read_rows, tasks_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("*/*/README.md"))]
WRITING = ROOT / "docs" / "writing-a-policy.md"


def short(path):
    return path.relative_to(ROOT).as_posix()


def without_comments(text):
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


#: A block of code, with the reason why it isn't run, or with options that make it short: of two, the last one counts.
#: Those in lists are indented.
BLOCK = r"^ *(?:<!-- not run: ([^\n]+) -->\n *|<!-- run with: ([^\n]+) -->\n *)?```%s\n(.*?)^ *```"


def found(path, language):
    """Yield the line, the reason for not being run, the options and the text of each block of a document."""
    text = path.read_text()
    for block in re.finditer(BLOCK % language, text, flags=re.DOTALL | re.MULTILINE):
        yield text[: block.start(3)].count("\n"), block[1], block[2] or "", textwrap.dedent(block[3])


def blocks(path):
    """Yield each ```python block of a document that is run, padded so that errors show the document's own lines."""
    for line, reason, _, text in found(path, "python"):
        if reason is None:
            yield "\n" * line + text


class Prompted(StableDiffusionPipeline):
    """The tiny pipeline, with a text encoder that only tells prompts apart."""

    def encode_prompt(self, prompt, *_, **__):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        text = torch.cat([tiny.text(1, seed=len(one)) for one in prompts])
        return text, tiny.text(1, seed=4).repeat(len(prompts), 1, 1)


def preamble():
    """Make what every document may take for granted: a loaded pipeline."""
    torch.manual_seed(0)
    loaded = tiny.small()
    pipe = Prompted(**loaded.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return {"__name__": "document", "pipe": pipe}


def run(path):
    namespace = preamble()
    for source in blocks(path):
        exec(compile(source, path.name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("path", [path for path in DOCS if any(blocks(path))], ids=short)
def test_code_in_the_documents_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.install(monkeypatch)
    pipe = run(path)["pipe"]
    assert cachekit.attachment(pipe) is None, "the document leaves an attachment behind"
    denoiser = tiny.denoiser_of(pipe)
    assert not any("forward" in vars(module) for module in denoiser.modules())


def commands_in(path):
    """Yield each command in the ```console blocks of a document, on one line, why it isn't run, or with what."""
    for _, reason, options, block in found(path, "console"):
        for line in re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), flags=re.MULTILINE):
            yield line, reason, options


#: What commands name as a reader's own: a model, files of prompts, a policy.
MODELS_OF_READERS = ("./my-pipeline", "path/to/pipeline", "MODEL")
FILES_OF_READERS = ("prompts.txt", "captions.txt", "others.txt")
POLICY_OF_READERS = "NAME"


def with_files(folder):
    """Write the files of a reader, with different captions in each."""
    for seed, name in enumerate(FILES_OF_READERS):
        (folder / name).write_text("".join(f"{caption}\n" for caption in heldout_captions(2, seed)))


def runnable(line, options):
    """Put what ships in place of a reader's own, and options last; a word before them is a model other than demo."""
    words, model = shlex.split(options), "demo"
    if words and not words[0].startswith("-"):
        model = words.pop(0)
    stand_ins = {**dict.fromkeys(MODELS_OF_READERS, model), POLICY_OF_READERS: "deepcache"}
    program, *given = shlex.split(line)
    assert program == "cachekit", f"{line} can't be run: say why not"
    return [*(stand_ins.get(word, word) for word in given), *words]


@pytest.mark.parametrize("path", [path for path in PAGES if any(commands_in(path))], ids=short)
def test_commands_in_the_documents_work(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_files(tmp_path)
    for line, reason, options in commands_in(path):
        if line.startswith("cachekit "):
            commands.parsed(line)
        if reason is None:
            commands.printed(*runnable(line, options))


def commands_within(path):
    """Yield each command with options that stands within backticks in the text of a document."""
    text = re.sub(r"^ *```.*?^ *```", "", without_comments(path.read_text()), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", text):
        line = " ".join(code.split())
        if re.match(r"cachekit [a-z].* --[a-z]", line):
            yield line


#: Those whose commands are whole; the list of changes leaves out what is not new.
WHOLE = [path for path in PAGES if path.name != "CHANGELOG.md" and any(commands_within(path))]


@pytest.mark.parametrize("path", WHOLE, ids=short)
def test_commands_within_the_text_parse(path):
    for line in commands_within(path):
        commands.parsed(line)


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_blocks_are_of_languages_that_are_run(path):
    fences = re.findall(r"^ *```(.*)$", path.read_text(), re.MULTILINE)
    assert {*fences[::2]} <= {"python", "console", "toml", "json"}
    assert {*fences[1::2]} <= {""}
    for _, reason, _, text in found(path, "python"):
        assert reason is None or compile(text, path.name, "exec")


@pytest.mark.parametrize("path", [path for path in PAGES if any(found(path, "json"))], ids=short)
def test_rows_of_prompts_in_the_documents_can_be_read(path, tmp_path):
    source = tmp_path / "rows.jsonl"
    for _, _, _, text in found(path, "json"):
        source.write_text(text)
        rows = read_rows(str(source))
        tasks, refused = tasks_of(rows, Defaults(), identity=None)
        assert (rows.problem_lines(refused), len(tasks)) == ([], len(text.splitlines()))


@pytest.mark.parametrize("path", [path for path in PAGES if any(found(path, "toml"))], ids=short)
def test_lines_of_projects_in_the_documents_are_those_of_the_example(path):
    example = tomllib.loads((ROOT / "examples" / "cachekit-pyramid-lite" / "pyproject.toml").read_text())["project"]
    for _, _, _, text in found(path, "toml"):
        lines = tomllib.loads(text)
        for key, value in lines.get("project", lines).items():
            assert value == example[key], key


def test_readme_and_guide_have_code():
    assert len(list(blocks(ROOT / "README.md"))) >= 2
    assert len(list(blocks(WRITING))) >= 4


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """What the code of the guide has defined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("guide"))
        return run(WRITING)


#: The guide's policies, parts and calibration as a user of Flux would try them.
ON_FLUX = {
    "Extrapolated": lambda guide, cache: guide["Extrapolated"](interval=2),
    "PyramidLite": lambda guide, cache: guide["PyramidLite"](interval=3),
    "Broadcast": lambda guide, cache: cache(where=Sites(kinds="joint_attention"), when=guide["Broadcast"](n=2)),
    "Damped": lambda guide, cache: cache(where=Sites(kinds="feed_forward"), what=guide["Damped"]()),
    "FirstBlock": lambda guide, cache: guide["FirstBlock"](limit=9),
    "Wandering": lambda guide, cache: cache(
        where=WholeDenoiser(), when=guide["Wandering"](threshold=9), what=Reuse(of="residual")
    ),
    "WhereItChangesPolicy": lambda guide, cache: guide["WhereItChangesPolicy"](limit=9),
    "Deep": lambda guide, cache: cache(where=guide["Deep"](part="single_transformer_blocks")),
}


@pytest.mark.parametrize("name", ON_FLUX)
def test_no_example_of_the_guide_breaks_on_flux(name, guide, tmp_path):
    policy = ON_FLUX[name](guide, cachekit.policies()["cache"])
    if name == "WhereItChangesPolicy":
        path = tmp_path / "figures.json"
        measured(MODELS["flux"].make(), policy, 6).save(path)
        policy = policy.model_copy(update={"file": str(path)})
    found = check_policy(policy, models=["flux"], checks=["check_runs", "check_differs"])
    assert {result.outcome for result in found} == {Outcome.PASSED}, found


def test_the_guide_and_the_example_are_the_same_policy(guide):
    written, shipped = guide["PyramidLite"], EXAMPLE.PyramidLite
    assert written.model_json_schema()["properties"] == shipped.model_json_schema()["properties"]
    for values, steps in itertools.product([{}, {"interval": 3}, {"start": 0, "end": 1, "interval": 4}], [1, 7, 25]):
        moments = [Moment(step, steps) for step in range(steps)]
        (one,), (other,) = (made(**values).choices().values() for made in (written, shipped))
        assert [one.when.action(at) for at in moments] == [other.when.action(at) for at in moments]
        assert (str(one.where), str(one.what), one.change) == (str(other.where), str(other.what), other.change)


def loaded_example():
    source = ROOT / "examples" / "cachekit-pyramid-lite" / "cachekit_pyramid_lite" / "policy.py"
    spec = importlib.util.spec_from_file_location("example_policy", source)
    example = importlib.util.module_from_spec(spec)
    sys.modules["example_policy"] = example
    spec.loader.exec_module(example)
    return example


EXAMPLE = loaded_example()
#: What is installed, and the schedule of the example.
WORDS = dataclasses.replace(installed(), schedules={**installed().schedules, EXAMPLE.Broadcast.name: EXAMPLE.Broadcast})


def declared_hooks():
    tree = ast.parse(inspect.getsource(hookspecs))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name: f"{f.name}({ast.unparse(f.args)}) -> {ast.unparse(f.returns)}" for f in functions}


@pytest.mark.parametrize("hook", declared_hooks())
def test_every_hook_is_documented_with_its_exact_signature(hook):
    assert f"`{declared_hooks()[hook]}`" in " ".join(WRITING.read_text().split())


def test_no_hook_is_documented_that_does_not_exist():
    mentioned = set(re.findall(r"\bcachekit_[a-z_]+\b(?=\()", WRITING.read_text()))
    assert mentioned == set(declared_hooks())


def readme_of(kind, name):
    plugin = installed().owners[f"{kind} {name!r}"]
    room = {"policy": "plugins", "adapter": "adapters"}[kind]
    return ROOT / room / f"cachekit_{plugin}" / "README.md"


SHIPPED = {
    name: policy
    for name, policy in cachekit.policies().items()
    if installed().plugins[installed().owners[f"policy {name!r}"]] == "cachekit-diffusion"
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_policy_has_a_readme_with_its_paper_and_every_key(name):
    policy, text = SHIPPED[name], readme_of("policy", name).read_text()
    assert policy.paper in text
    assert f"`{name}`" in text
    for key, field in policy.model_fields.items():
        if key in PARTS and field.default is None:  # replaces a part of any policy
            continue
        default = "needed" if field.is_required() else word(field.default)
        assert re.search(rf"^\| `{key}` \| {re.escape(default)} \| \S", text, re.MULTILINE), key


def test_every_adapter_has_a_readme():
    for name in ("unet", "dit"):
        assert f"`{name}`" in readme_of("adapter", name).read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/policies.md"])
def test_every_policy_is_listed(document):
    text = (ROOT / document).read_text()
    for name, policy in SHIPPED.items():
        assert f"`{name}`" in text
        assert policy.paper in text


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"^ *```.*?^ *```", "", without_comments(path.read_text()), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)\s]*)?\)", text):
        if target and "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_specs_in_the_documents_parse(path):
    for spec in specs_of(path.read_text()):
        if (
            "intervall" not in spec
            and "file=weights" not in spec
            and not spec.endswith(("=...", "=…"))
            and not re.search(r"=[mn]\b", spec)
        ):
            parse(spec.rstrip(".,;:"), WORDS)


def specs_of(text):
    """Find the specs of shipped policies in a text; brackets may be nested once."""
    value = r"(?:[^\"'`+\s|()]|\((?:[^()\s]|\([^()\s]*\))*\))+"
    return re.findall(rf"[\"'`+ ]((?:{'|'.join(SHIPPED)}):\w+={value})[\"'`+ \n)]", text)


def test_specs_with_brackets_are_found():
    text = "`cache:where=denoiser,when=window(when=every(3),stop=9)`, (`tgate:m=5`) and cache:when=mask(0;1)\n"
    assert specs_of(text) == [
        "cache:where=denoiser,when=window(when=every(3),stop=9)",
        "tgate:m=5",
        "cache:when=mask(0;1)",
    ]


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_specs_with_brackets_are_quoted_for_the_shell(path):
    for _, _, _, block in found(path, "console"):
        unquoted = re.sub(r"\"[^\"]*\"|'[^']*'", "", block)
        assert not re.search(r"\w=\w*\(", unquoted), block


@pytest.mark.parametrize("noun", ["place", "schedule", "stand-in"])
def test_every_part_is_in_a_table_with_its_keys(noun):
    title, found = {
        "place": ("Places", installed().places),
        "schedule": ("Schedules", installed().schedules),
        "stand-in": ("Stand-ins", installed().stand_ins),
    }[noun]
    section = (ROOT / "docs" / "policies.md").read_text().partition(f"### {title}\n")[2].partition("\n#")[0]
    for name, part in found.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", section, re.MULTILINE)
        for key, field in part.model_fields.items():
            default = "" if field.is_required() else f"={word(field.default)}"
            assert key == "of" or f"`{key}{default}`" in row, (name, key)
        assert part.paper in row


@pytest.mark.parametrize("path", DOCS, ids=short)
def test_markers_are_in_pairs(path):
    text = path.read_text()
    begun, ended = (re.findall(rf"<!-- ([\w ]+): {word} -->", text) for word in ("begin", "end"))
    assert begun == ended


def test_the_readme_has_a_place_for_the_demo():
    assert "<!-- demo table: begin -->" in (ROOT / "README.md").read_text()
    assert "docs/demo.png" in (ROOT / "README.md").read_text()


def test_no_figure_in_the_documents_is_stale(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks.readme", "--check"])
    importlib.import_module("benchmarks.readme").main()
    training = importlib.import_module("benchmarks.train.readme")
    assert training.README.read_text() == training.filled()


#: Rooms of the source whose errors users of policies or of the command line may meet.
ROOMS = (
    *("applying.py", "attaching", "cli", "costs", "driving", "models", "runs", "upstream"),
    *("tools/analysis", "tools/app", "tools/batch", "tools/bench", "tools/calibrating", "tools/coverage/results.py"),
    *("tools/tuning", "tools/clusters.py", "tools/teams.py", "tools/workers.py"),
)


def met_by_users():
    """Texts of the warnings, and of the errors but those about the code of a policy."""
    found = importlib.import_module("benchmarks.messages")
    for message in found.messages():
        is_warning = message.kind in ("report", "log") or message.kind.endswith("Warning")
        if is_warning or (found.is_in(message.path, ROOMS) and message.kind != "PolicyError"):
            yield message.text


def test_what_users_meet_is_explained_by_its_words():
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    fixed = {max((" ".join(part.split()) for part in text.split("…")), key=len) for text in met_by_users()}
    assert len(fixed) > 40
    assert {text for text in fixed if text not in page} == set()


def test_every_error_and_warning_class_is_in_the_api_and_in_the_messages():
    classes = {name for name, found in vars(cachekit.errors).items() if inspect.isclass(found) and name[0] != "_"}
    documented = documented_names("errors.md")
    assert {name for name in classes if name.endswith(("Error", "Warning"))} == documented
    raised = set(re.findall(r"\| `(\w+)` \|$", (ROOT / "docs" / "messages.md").read_text(), re.MULTILINE))
    assert documented - {"CachekitError"} <= raised


def documented_names(*pages):
    """Names of `cachekit` that these pages of the API reference have."""
    texts = [(ROOT / "docs" / "api" / page).read_text() for page in pages]
    found = re.findall(r"^::: cachekit\.([\w.]+)$", "\n".join(texts), re.MULTILINE)
    assert len(found) == len(set(found))
    return set(found)


def test_every_public_name_is_in_the_api_reference():
    names = documented_names("using.md", "writing.md", "errors.md", "testing.md")
    assert {name for name in names if "." not in name} == set(cachekit.__all__)
    assert {name for name in names if "." in name} == {f"testing.{name}" for name in cachekit.testing.__all__}


def test_the_navigation_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\nhooks:")[0]
    listed = re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in DOCS[1:]}
    outside = {"index.md", "contributing.md", "changes.md", "example.md", "training.md"}
    assert sorted(listed) == sorted(pages | outside)


def words_after(pattern):
    """Find what follows a pattern in code and commands of the documents, with the document."""
    for path in PAGES:
        for code in re.findall(r"^ {4}.*$|^\$ .*$|`[^`\n]+`", path.read_text(), re.MULTILINE):
            yield from ((short(path), found) for found in re.findall(pattern, code))


def test_targets_extras_and_modules_in_the_documents_exist():
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for path, target in words_after(r"^[`$ ]*make ([\w-]+)"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), (path, target)
    for path, extras in words_after(r"install '?\"?\.\[([\w,]+)\]"):
        assert all(f"\n{extra} = [" in project for extra in extras.split(",")), (path, extras)
    modules = set(words_after(r"python -m (benchmarks[\w.]*)"))
    assert len(modules) > 10
    for path, module in modules:
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), (path, module)
