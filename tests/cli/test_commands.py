"""The command line: what each command prints, and that every error is one line with exit code 2."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
import torch
from diffusers import LatteTransformer3DModel, UNetMotionModel
from PIL import Image, ImageChops
from support import tiny
from support.commands import printed, run, save_without_weights

import cachekit
from cachekit.models.demo import pipeline as demo_files
from cachekit.parts import places
from cachekit.registry import catalog as catalogs

SUBCOMMANDS = [
    "list",
    "show",
    "sites",
    "plan",
    "estimate",
    "generate",
    "demo",
    "app",
    "bench",
    "tune",
    "check",
    "coverage",
    "doctor",
]
BENCHES = ["grid", "coco", "paper"]


def refused(*arguments):
    """Get the one line of an error; above it diffusers may have shown its loading."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("error: ") == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return save_without_weights(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    tiny.dit().save_pretrained(folder)
    return folder


@pytest.fixture
def with_plugins(monkeypatch):
    """Replace the installed catalog by one of the given modules."""

    def install(**modules):
        points = []
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, f"test_cli_{name}", module)
            points.append(EntryPoint(name, f"test_cli_{name}", catalogs.GROUP))
        monkeypatch.setattr(catalogs, "entry_points", lambda group: points)
        catalogs.installed.cache_clear()

    yield install
    monkeypatch.undo()
    catalogs.installed.cache_clear()


# -- help ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in SUBCOMMANDS), *(["bench", name] for name in BENCHES)])
def test_help_is_given_for_every_command(command):
    assert "Usage" in printed(*command, "--help")


def test_help_names_every_command():
    text = printed("--help")
    assert all(name in text for name in SUBCOMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["bench", "grid", "--help"]])
def test_help_loads_neither_torch_nor_diffusers(arguments):
    code = (
        "import sys; from cachekit.cli import app\n"
        f"try: app({arguments})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_script_ends_with_two_and_one_line():
    script = Path(sys.executable).parent / "cachekit"
    done = subprocess.run([script, "show", "tgat"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown policy or part 'tgat' (did you mean 'tgate'?); known: ")
    assert done.stderr.count("\n") == 1


# -- list and show ---------------------------------------------------------------------------------------------


def own_keys(part):
    """List the keys of a policy or part, without those that replace parts of any policy."""
    return [key for key in part.model_fields if part not in CHOOSING or key not in ("where", "when", "what")]


CATALOG = catalogs.installed()
#: Policies that make choices of their own: all but `cache`, whose keys are the parts.
CHOOSING = [policy for name, policy in CATALOG.policies.items() if name != "cache"]
PARTS = {
    "places (where=)": CATALOG.places,
    "schedules (when=)": CATALOG.schedules,
    "stand-ins (what=)": CATALOG.stand_ins,
}


def origin_of(title, name):
    """Find the distribution and the plugin that registered a part of the list with this title."""
    owner = CATALOG.owners[f"{title.split()[0].removesuffix('s')} {name!r}"]
    return f"{CATALOG.plugins[owner]} (plugin {owner})"


def test_list_names_all_policies_with_summary_keys_paper_and_origin():
    text = printed("list")
    for name, policy in cachekit.policies().items():
        assert f"  {name}: {policy.summary}\n" in text
        assert policy.paper in text
        for key in own_keys(policy):
            assert f"{key}=" in text
    assert "from cachekit-diffusion (plugin tgate), arXiv 2404.02747" in text
    assert "m=none, threshold=none, space=eps, every=1, linear=false" in text


def source_of(part):
    """Write the distribution and the plugin that a part comes from, as listings print it."""
    plugin = {"calibrated": "forecast", "frequencies": "fastercache"}.get(part)
    return f"cachekit-diffusion (plugin {plugin})" if plugin else "cachekit (plugin parts)"


@pytest.mark.parametrize("title", PARTS)
def test_list_names_all_parts_with_summary_keys_paper_and_origin(title):
    text = printed("list").partition(f"{title}\n")[2]
    for name, part in PARTS[title].items():
        entry = text.partition(f"  {name}: {part.summary}\n")[2]
        keys, origin = entry.splitlines()[:2]
        assert [key.partition("=")[0].strip() for key in keys.split(", ")] == (list(part.model_fields) or ["no keys"])
        assert origin.strip() == f"from {origin_of(title, name)}{', ' * bool(part.paper)}{part.paper}"


def test_list_names_all_adapters():
    text = printed("list").partition("adapters\n")[2]
    assert all(f"  {name}: {adapter.summary}\n" in text for name, adapter in cachekit.adapters().items())


@pytest.mark.parametrize("name", sorted(cachekit.policies()))
def test_show_gives_docstring_keys_and_paper(name):
    text, policy = printed("show", name), cachekit.policies()[name]
    assert policy.__doc__.split("\n")[0] in text
    assert [line for line in text.splitlines() if line.startswith("  ") and "=<" in line] == (
        ["  where=<needed>  a place"] if name == "cache" else []
    )
    assert all(f"\n  {key}=" in text for key in own_keys(policy))
    assert policy.paper in text


def test_show_gives_the_choices_that_the_defaults_make():
    assert printed("show", "forecast").partition("choices with these defaults\n")[2].partition("paper")[0] == (
        "  denoiser\n"
        "      where=denoiser\n"
        "      when=every(n=2,first=1,last=true,start=0)\n"
        "      what=linear(of=output,axis=step)\n"
        "      when branches change: remaining\n"
    )
    text = printed("show", "tgate")
    assert "  cross_attention\n      where=cross_attention\n      when=after(m=10)\n" in text
    assert "  guidance\n      where=guidance(keep=auto)\n" in text
    assert "choices depend on the keys: give after=m, before=m or both\n" in printed("show", "null_text")


@pytest.mark.parametrize("title", PARTS)
def test_show_describes_every_part(title):
    for name, part in PARTS[title].items():
        if name in cachekit.policies():  # of which `show` tells first
            continue
        text = printed("show", name)
        assert text.startswith(f"{name}: {part.summary}\n\n{part.__doc__.splitlines()[0]}\n")
        assert all(f"\n  {key}=" in text for key in part.model_fields)
        assert ">>>" not in text
        assert f"spec    {title[title.index('(') + 1 : -1]}{name}, in cache: " in text
        assert f"paper   {part.paper or 'none'}\nfrom    {origin_of(title, name)}\n" in text


def test_show_gives_types_of_parts():
    assert "  n=2  whole number, >= 1\n" in printed("show", "every")
    assert "  when=every  a schedule\n" in printed("show", "window")
    assert "  steps=<needed>  whole number, or several joined by ;\n" in printed("show", "mask")
    assert "  axis=step  step | sigma | log_snr\n" in printed("show", "linear")


def test_show_gives_types_defaults_and_bounds():
    text = printed("show", "deepcache")
    assert "  interval=3  whole number, >= 1\n" in text
    assert "  schedule=uniform  uniform | quadratic\n" in text
    assert "  power=1.4  number, >= 0.1 and <= 10\n" in text
    text = printed("show", "adaptive_guidance")
    assert "  threshold=none  number, >= -1 and <= 1\n" in text
    assert "  linear=false  true | false\n" in text


# -- sites and plan --------------------------------------------------------------------------------------------


def test_sites_counts_kinds_regions_and_chains(sd, dit):
    text = printed("sites", sd)
    assert text.startswith("UNet2DConditionModel, adapter unet, branches uncond then cond\n")
    assert "cross_attention x 16\n" in text
    assert "region 11: exit mid_block" in text
    text = printed("sites", dit)
    assert "self_attention x 3\n" in text
    assert "chain 0: transformer_blocks.0..transformer_blocks.2, 3 blocks, streams hidden_states\n" in text


def test_sites_of_videos_and_of_the_text_are_kinds_of_their_own(tmp_path):
    for name, model in {"animate": animate(), "latte": latte(), "wan": tiny.wan_transformer()}.items():
        model.save_config(tmp_path / name)
    # AnimateDiff: two blocks with two layers of attention over frames each, and the middle one.
    text = printed("sites", tmp_path / "animate", "-v")
    found = re.search(r"^temporal_attention x (\d+)\n((?:  .*\n)+)", text, re.MULTILINE)
    names = found[2].split()
    modules = [name for name, _ in animate().named_modules() if re.search(r"motion_modules\..*\.attn[12]$", name)]
    assert (int(found[1]), names) == (len(modules), modules)
    assert modules
    assert re.search(r"^self_attention x \d+\n((?:  .*\n)+)", text, re.MULTILINE)[1].count("motion") == 0
    text = printed("sites", tmp_path / "latte", "-v")
    assert (
        "temporal_attention x 2\n  temporal_transformer_blocks.0.attn1\n  temporal_transformer_blocks.1.attn1\n" in text
    )
    assert "text_key_value x 4\n  transformer_blocks.0.attn2.to_k\n  transformer_blocks.0.attn2.to_v\n" in text
    text = printed("sites", tmp_path / "wan", "-v")
    assert "text_key_value x 8\n  blocks.0.attn2.to_k\n  blocks.0.attn2.to_v\n" in text
    assert "temporal_attention" not in text


def animate():
    """The denoiser of AnimateDiff."""
    return UNetMotionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )


def latte():
    """The denoiser of Latte, with blocks over space and over frames in turns."""
    return LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=1,
    )


def test_show_lists_the_kinds_that_sites_takes():
    line = "  kinds=<needed>  " + " | ".join(places.Sites.spellings()) + ", or several joined by ;"
    assert line in printed("show", "sites")


def test_verbose_sites_are_the_modules_of_the_model(sd):
    text = printed("sites", sd, "-v")
    names = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    modules = dict(tiny.sd().unet.named_modules())
    assert len(names) > 50
    assert set(names) <= set(modules)


def test_sites_of_a_denoiser_that_stands_alone(sd):
    assert printed("sites", sd / "unet") == printed("sites", sd)


def test_plan_is_the_one_of_the_attachment(sd):
    specs = ["tgate:m=3", "deepcache:interval=2"]
    with cachekit.apply(tiny.sd(), specs) as attachment:
        assert printed("plan", *specs, "--steps", 9, "--model", sd) == f"{attachment.plan(9)}\n"
        assert (
            printed("plan", *specs, "--steps", 9, "--model", sd, "--unguided")
            == f"{attachment.plan(9, guided=False)}\n"
        )


# -- generate --------------------------------------------------------------------------------------------------


def test_generate_gives_what_python_gives(dit, tmp_path):
    out = tmp_path / "deep" / "out.png"
    text = printed(
        *("generate", dit, "--set", "class_labels=[1, 2]", "--steps", 4, "--guidance", 3, "--seed", 7),
        *("--spec", "adaptive_guidance:m=2", "--device", "cpu", "--dtype", "float32", "--output", out),
    )
    assert "adaptive_guidance:m=2 guidance x 1:" in text
    pipe = tiny.dit()
    generator = torch.Generator().manual_seed(7)
    with cachekit.apply(pipe, "adaptive_guidance:m=2"):
        images = pipe([1, 2], num_inference_steps=4, guidance_scale=3.0, generator=generator).images
    for index, image in enumerate(images):
        path = tmp_path / "deep" / f"out-{index}.png"
        assert f"wrote {path}\n" in text
        assert ImageChops.difference(Image.open(path), image).getbbox() is None


def test_generate_without_specs_says_so_and_takes_another_scheduler(dit, tmp_path):
    out = tmp_path / "one.png"
    call = ["generate", dit, "--set", "class_labels=[1]", "--steps", 4, "--output", out]
    assert printed(*call) == f"no specs: uncached\nwrote {out}\n"
    before = Image.open(out).copy()
    printed(*call, "--scheduler", "DPMSolverMultistep")
    assert ImageChops.difference(Image.open(out), before).getbbox()


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "tgat"], "unknown policy or part 'tgat' (did you mean 'tgate'?); known: "),
        (["show", "evry"], "unknown policy or part 'evry' (did you mean 'every'?); known: "),
        (["plan", "tgate:what=linear", "--steps", "3", "--model", "SD"], "tgate has 2 choices"),
        (["plan", "cache:where=denoiser,when=evry(3)", "--steps", "3"], "when: unknown word 'evry'"),
        (["plan", "tgat", "--steps", "3", "--model", "SD"], "unknown policy 'tgat' (did you mean 'tgate'?)"),
        (["plan", "tgate:n=3", "--steps", "3", "--model", "SD"], "unknown key 'n'"),
        (["plan", "tgate:m=x", "--steps", "3", "--model", "SD"], "m=x: "),
        (["plan", "tgate", "tgate:m=3", "--steps", "3", "--model", "SD"], "policy 'tgate' is given twice"),
        (["plan", "tgate", "--steps", "3", "--model", "DIT"], "looked for cross_attention"),
        (["plan", "deepcache:branch=99", "--steps", "3", "--model", "SD"], "has branches 0..11"),
        (["sites", "/no/such/folder"], "cannot read model '/no/such/folder': there is no such folder"),
        (["sites", "no/such-model"], "cannot read model 'no/such-model'"),
        (["sites", "SD/vae"], "no adapter matches AutoencoderKL"),
        (["generate", "DIT", "--spec", "tgat"], "did you mean 'tgate'?"),
        (["generate", "DIT", "--spec", "tgate", "--set", "class_labels=[1]"], "looked for cross_attention"),
        (["generate", "DIT", "a cat"], "DiTPipeline takes no argument 'prompt'"),
        (["generate", "DIT"], "DiTPipeline refuses its arguments: missing a required argument: 'class_labels'"),
        (["generate", "DIT", "--set", "class_label=[1]"], "(did you mean 'class_labels'?)"),
        (["generate", "DIT", "--set", "nothing"], "'nothing' is not KEY=VALUE"),
        (["generate", "DIT", "--dtype", "half"], "unknown dtype 'half'; allowed: float32, float16, bfloat16"),
        (["generate", "DIT", "--device", "abacus", "--set", "class_labels=[1]"], "cannot use device 'abacus'"),
        (["generate", "DIT", "--scheduler", "DIM", "--set", "class_labels=[1]"], "DDIMScheduler"),
        (["generate", "DIT", "--output", "a.doc"], "no image format is called '.doc'"),
        (["generate", "/no/such/folder", "a cat"], "there is no such folder"),
        (["demo", "--spec", "tgat"], "did you mean 'tgate'?"),
        (["demo", "--spec", "tgate+"], "nothing on one side of '+'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_two(arguments, words, sd, dit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*(word.replace("SD", str(sd)).replace("DIT", str(dit)) for word in arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_result_without_images_is_refused(dit, tmp_path):
    arguments = ["generate", dit, "--set", "class_labels=[1]", "--set", "output_type=np", "--steps", 2]
    result = run(*arguments, "--output", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "DiTPipeline gave no images that can be written" in result.stderr


# -- doctor ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Put a model of one file in the place of the embedded one."""
    folder = tmp_path / "weights" / "unet"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    demo_files.write_manifest(folder)
    monkeypatch.setattr(demo_files, "WEIGHTS", folder.parent)
    return folder


def test_doctor_names_versions_plugins_and_the_demo_model(weights):
    text = printed("doctor")
    assert f"ok      torch {version('torch')}\n" in text
    assert f"ok      cachekit {cachekit.__version__}\n" in text
    assert "ok      plugin tgate of cachekit-diffusion: policy 'cair', policy 'tgate'\n" in text
    assert "ok      demo model unet: every file has its SHA-256\n" in text
    assert "FAILED" not in text


def test_the_shipped_installation_is_sound():
    assert run("doctor").exit_code == 0


def test_doctor_fails_for_damaged_and_for_missing_weights(weights):
    (weights / "unet" / "config.json").write_text("{ }")
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAILED  the demo model 'unet' is damaged: unet/config.json has the wrong SHA-256" in result.stdout
    (weights / "unet" / "config.json").unlink()
    assert run("doctor").exit_code == 1


class Broken:
    """Stand in for a plugin's module with a hook that does not exist."""

    @staticmethod
    @cachekit.hookimpl
    def cachekit_register_polices(register):
        """Register nothing."""


def test_doctor_fails_for_a_broken_plugin_and_says_why(weights, with_plugins):
    with_plugins(broken=Broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAILED  plugin 'broken' of an unknown distribution failed to load: " in result.stdout
    assert "cachekit_register_polices" in result.stdout
    assert "CACHEKIT_DISABLE=broken" in result.stdout


def test_a_broken_plugin_is_one_line_of_warning_elsewhere(with_plugins):
    with_plugins(broken=Broken)
    result = run("list")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: plugin 'broken'")
    assert result.stderr.count("\n") == 1


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "cachekit", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage: cachekit" in done.stdout
