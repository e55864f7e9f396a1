"""What scripts rely on: JSON, choices, names of models, widths of tables, checks before any work."""

from __future__ import annotations

import json
import time

import huggingface_hub
import pytest
import typer
from support import commands
from support.commands import printed, run
from support.sources import ROOT

import cachekit
from cachekit.cli import app, output
from cachekit.cli.examples import LINES
from cachekit.cli.models import warn_of_shapes
from cachekit.errors import CachekitError
from cachekit.models import hub, names
from cachekit.models.names import DEMOS
from cachekit.tools.bench.cells import Setting

STORED = ROOT / "benchmarks" / "results" / "demo-dit.jsonl"


def refused(*arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert (result.stderr.count("\n"), result.stderr[:7]) == (1, "error: ")
    return result.stderr


def all_commands():
    """Find every command by its words."""
    found, left = {}, [("", typer.main.get_command(app))]
    while left:
        name, command = left.pop()
        for word, inner in getattr(command, "commands", {}).items():
            left.append((f"{name} {word}".strip(), inner))
        if not hasattr(command, "commands"):
            found[name] = command
    return found


COMMANDS = all_commands()
#: Commands that write a project, and print no table.
WITHOUT_TABLE = {"app", "new-policy", "new-adapter"}


# -- help ---------------------------------------------------------------------------------------------------


def test_version_short_help_and_completion():
    assert printed("--version") == f"cachekit {cachekit.__version__}\n"
    assert printed("-h") == printed("--help")
    assert printed("bench", "grid", "-h") == printed("bench", "grid", "--help")
    assert "--install-completion" in printed("--help")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_has_examples_that_can_be_parsed(name):
    text = " ".join(printed(*name.split(), "--help").split())
    for line in LINES[name]:
        assert f"cachekit {line}" in text
        assert commands.parsed(f"cachekit {line}")[0] == name


def test_closed_choices_are_listed_and_suggested():
    for name, words in (
        ("generate", ("serial|process|ray", "float32|float16|bfloat16")),
        ("bench grid", ("serial|process|ray",)),
        ("calibrate", ("serial|ray",)),
        ("analyze", ("changes|noise|text|lengths|schedulers",)),
        ("check", ("sd|pixart|sd3|wan|flux",)),
    ):
        text = "".join(printed(*name.split(), "--help").split())
        assert all(word in text for word in words), name
    assert "unknown dtype 'Float16' (did you mean 'float16'?); allowed: float32," in refused(
        "generate", "demo", "--dtype", "Float16"
    )


def test_the_tiny_models_and_parts_are_those_of_the_rooms():
    from cachekit.cli import analyze, check
    from cachekit.testing.models import MODELS
    from cachekit.tools.analysis.parts import PARTS

    assert list(check._TINY) == list(MODELS)
    assert list(analyze._PARTS) == list(PARTS)


# -- JSON ---------------------------------------------------------------------------------------------------


def test_every_command_that_prints_a_table_writes_json():
    found = {name for name, command in COMMANDS.items() if any("--json" in one.opts for one in command.params)}
    assert found == set(COMMANDS) - WITHOUT_TABLE


FAST = {
    "list": lambda data: {one["name"] for one in data["policies"]} == set(cachekit.policies()),
    "show tgate": lambda data: data[0]["keys"]["m"]["type"].startswith("whole number"),
    "sites demo": lambda data: data["adapter"] == "unet" and len(data["sites"]) > 20,
    "plan tgate:m=2 --steps 4": lambda data: {"spec", "target", "kind", "marks"} == set(data["plan"][0]),
    "estimate demo tgate:m=2 --steps 4": lambda data: data["mac_reduction"] > 1,
    "doctor": lambda data: all(line["ok"] for line in data),
}


@pytest.mark.parametrize("line", FAST)
def test_json_on_stdout_is_alone_and_as_in_a_file(line, tmp_path):
    alone, beside = printed(*line.split(), "--json", "-"), printed(*line.split(), "--json", tmp_path / "x.json")
    assert FAST[line](json.loads(alone))
    assert (tmp_path / "x.json").read_text() == alone
    assert f"wrote {tmp_path / 'x.json'}\n" in beside
    assert len(beside) > 60


def test_infinite_numbers_are_null():
    assert output.finite({"a": [1.5, float("inf")], "b": (float("nan"), "x")}) == {"a": [1.5, None], "b": [None, "x"]}


# -- tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 140])
def test_rows_stay_apart_where_a_table_is_too_wide(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    labels = [f"deepcache:interval={n} + calibrated:interval=3,file=weights-of-a-model.json" for n in (2, 3)]
    header = ["configuration", *(f"figure {n}" for n in range(9))]
    output.print_table(header, [[label, *["12345.6"] * 9] for label in labels], "what the figures are")
    text = capsys.readouterr().out
    listed = [f"  {number}  {label}" for number, label in enumerate(labels, 1)]
    tables = [line for line in text.splitlines() if line not in listed]
    assert max(map(len, tables)) <= width
    assert all(line in text for line in listed)
    assert text.count("12345.6") == 18
    assert text.count("figure") - text.count("the figures") == 9
    assert "what the figures are" in text


def test_a_table_that_fits_is_printed_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    output.print_table(["a [b]", "c"], [["d[/e]", "f"]])
    assert "a [b] ┃ c" in capsys.readouterr().out


# -- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEMOS)
def test_names_of_embedded_models_are_the_same_everywhere(name):
    assert printed("sites", name) == printed("sites", DEMOS[name])
    assert names.canonical(DEMOS[name]) == Setting(model=DEMOS[name], captions=()).model == name


def test_python_takes_the_names_of_the_command_line():
    pipe = cachekit.demo_pipeline("demo-dit")
    assert cachekit.estimate("dit", num_inference_steps=1) == cachekit.estimate(pipe, num_inference_steps=1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sites sdxxl", "unknown model 'sdxxl' (did you mean 'sdxl'?); give a folder, a hub id such as owner/name"),
        ("app sdxxl", "unknown model 'sdxxl' (did you mean 'sdxl'?)"),
        ("app demo --dtype half", "unknown dtype 'half'; allowed: float32, float16, bfloat16"),
        ("plan tgate --steps 3 --model SDXL", "(did you mean 'sdxl'?)"),
        ("estimate Demo-DiT", "(did you mean 'demo-dit'?)"),
        ("recommend demo-dti", "(did you mean 'demo-dit'?)"),
        ("bench grid demoo", "(did you mean 'demo'?)"),
        ("generate sdxl cat", "sdxl is an architecture, which has no weights; give a folder, a hub id, or 'demo'"),
        ("tune sdxl --speedup 2", "sdxl is an architecture, which has no weights"),
        ("calibrate ./none", "cannot read model './none': there is no such folder"),
        ("plan TGATE --steps 3", "unknown policy 'TGATE' (did you mean 'tgate'?)"),
        ("plan tgate:m=5|10 --steps 3", "'|' separates alternatives, for cachekit bench grid"),
        ("plan tgate:m=5+ --steps 3", "nothing on one side of '+'"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest(line, said):
    assert said in refused(*line.split())


def test_specs_joined_by_a_plus_are_the_same_as_several():
    joined = printed("plan", "tgate:m=3 + deepcache:interval=2", "--steps", 6)
    assert joined == printed("plan", "tgate:m=3", "deepcache:interval=2", "--steps", 6)
    with cachekit.apply(cachekit.demo_pipeline(), "tgate:m=3+deepcache:interval=2") as attachment:
        assert list(map(str, attachment.policies)) == ["tgate:m=3", "deepcache:interval=2"]


@pytest.mark.parametrize(
    ("captions", "model", "warned"), [("8", "{folder}", True), ("file.txt", "{folder}", False), ("8", "demo", False)]
)
def test_captions_of_shapes_are_warned_of_where_the_model_is_not_embedded(captions, model, warned, tmp_path, capsys):
    folder = commands.save_without_weights(tmp_path / "model")
    warn_of_shapes(captions, model.format(folder=folder))
    assert ("the 8 captions were of coloured shapes" in capsys.readouterr().err) is warned


@pytest.fixture
def no_network(monkeypatch):
    hub._no_answer.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    yield
    hub._no_answer.cache_clear()


def test_a_hub_id_without_network_is_refused_in_seconds(no_network):
    begun = time.monotonic()
    for line in ("sites owner/name", "generate owner/name cat", "bench grid owner/name"):
        assert "cannot read model 'owner/name': no network, or none to http://127.0.0.1:9: " in refused(*line.split())
    with pytest.raises(CachekitError, match="not among the models downloaded before"):
        cachekit.estimate("owner/name")
    assert time.monotonic() - begun < 5


def test_a_model_that_was_downloaded_is_loaded_without_network(no_network, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *given, **more: "/a/model_index.json")
    assert hub.hub_arguments("owner/name") == {"local_files_only": True}
    assert hub.hub_arguments("demo") == hub.hub_arguments("sdxl") == {}


def test_the_names_of_architectures_are_those_of_the_table():
    from cachekit.models.architectures import architectures

    assert list(names.architecture_names()) == list(architectures())


# -- checks before work, and lines about what does nothing ---------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "demo --output FILE/x",
        "demo --json FILE/x",
        "analyze demo --output FILE/x",
        "generate demo cat --output FILE/x.png",
        "generate demo cat --json FILE/x",
        "calibrate demo --output FILE/x",
        "tune demo --speedup 2 --output FILE/x",
        "bench grid demo --json FILE/x",
        "plan tgate --steps 3 --svg FILE/x",
        "coverage Flux --markdown FILE/x",
        "check tgate --json FILE/x",
    ],
)
def test_outputs_are_checked_before_any_work(line, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(*line.replace("FILE", str(tmp_path / "file")).split())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the scheduler, which the command doesn't show
def test_a_policy_that_never_acts_is_a_line():
    result = run("plan", "tgate", "deepcache:interval=2", "--steps", 5)
    assert result.stderr == "warning: tgate never acts in 5 steps: give it other settings, or more steps\n"
    assert run("plan", "tgate", "--steps", 15).stderr == ""


def test_an_argument_that_the_call_does_not_read_is_a_line_and_so_is_a_policy_that_never_fired(tmp_path, caplog):
    words = ("generate", "demo", "a cat", "--spec", "tgate", "--steps", 1, "--output", tmp_path / "x.png")
    result = run(*words, "--set", "foo=3", "--set", "eta=0.5")
    assert (result.exit_code, result.stderr.count("warning: ")) == (0, 1)
    assert "warning: --set foo: StableDiffusionPipeline has no argument of that name" in result.stderr
    assert result.stdout.count("tgate never fired") == 1
    assert caplog.records == []


# -- bench --best -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    file = tmp_path_factory.mktemp("stored") / "results.jsonl"
    printed("bench", "grid", "--merge", STORED, "--output", file)
    return file


def rows_of(group):
    return [row for row in group["rows"] if row["method"] == "cachekit"]


def test_the_cheapest_spec_that_fulfils_is_named(stored):
    words = ("bench", "grid", "--output", stored, "--best", "psnr >= 30dB, MAC reduction > 1.5")
    data = json.loads(printed(*words, "--json", "-"))
    text = printed(*words)
    fulfilled = 0
    for group, best in zip(data["groups"], data["best"]):
        good = [row for row in rows_of(group) if (row["psnr"] or 99) >= 30 and row["mac_reduction"] > 1.5]
        assert best["fulfils"] == bool(good)
        if good:
            fulfilled += 1
            assert best["specs"] == min(good, key=lambda row: (row["macs"], row["seconds"]))["specs"]
            assert f"  {best['code']}\n" in text
    assert fulfilled


def test_where_nothing_fulfils_the_nearest_is_named_and_the_exit_code_is_one(stored):
    result = run("bench", "grid", "--output", stored, "--best", "speedup>=99")
    assert result.exit_code == 1
    assert "no spec fulfils speedup>=99 on demo-dit" in result.stdout
    assert "nearest: " in result.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("PSRN>=35", "unknown column 'PSRN' (did you mean 'PSNR'?); known: s/image, spread,"),
        ("PSNR", "not a condition; write the heading of a column and a bound, 'PSNR>=35'"),
        ("PSNR>=high", "not a condition"),
        ("PSNR>=3 apples", "not a condition"),
        ("caption match>=90", "a share above 1; write 'caption match>=90%'"),
    ],
)
def test_a_wrong_condition_is_refused(text, said, stored):
    assert said in refused("bench", "grid", "--output", stored, "--best", text)
