"""Presets: specs in a file, with the evidence for them, that `preset:FILE` or `preset:NAME` stands for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cachekit.errors import PresetError, nearest, reason_of
from cachekit.files import write_whole

#: The version of the file.
VERSION = 1
#: The word before the colon.
WORD = "preset"
#: Where the presets that ship are, by name.
FOLDER = Path(__file__).parents[1] / "presets"
#: What stands for the folder of a preset's file within its specs, as in `file={folder}/weights.json`.
HERE = "{folder}"
#: What can't stand in a value of a spec. Paired brackets can.
_SEPARATORS = re.compile(r"[,|()]")
_PAIR = re.compile(r"\([^()]*\)")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figures(_Part):
    """What was measured over `images` images, of which `checked` were judged; None where it wasn't.

    Ratios are uncached over cached; `psnr` (dB) is the median similarity to uncached images, None where most are
    identical, and `caption_match` the share of images that show their captions.
    """

    images: int = Field(ge=1)
    psnr: float | None = None
    ssim: float | None = None
    caption_match: float | None = None
    uncached_caption_match: float | None = None
    checked: int = 0
    macs: float | None = None
    mac_reduction: float | None = None
    seconds: float | None = None
    speedup: float | None = None


class PlainSteps(_Part):
    """The best plain steps at the cost of a preset, with the spacing of the steps, "" for the scheduler's own."""

    steps: int = Field(ge=1)
    spacing: str = ""
    figures: Figures


class Evidence(_Part):
    """What a preset was measured on, and the figures; None where it holds for any.

    `architecture` is the name of the published model that a denoiser without weights is recognised as, such as sdxl;
    `model` is the digest of the denoiser's weights. `steps` are those of the cached run, `reference_steps` those of the
    uncached one beside it. `source` is where published settings come from, `target` what was asked for.
    """

    pipeline: str | None = None
    denoiser: str | None = None
    architecture: str | None = None
    model: str | None = None
    scheduler: str | None = None
    steps: int | None = Field(default=None, ge=1)
    reference_steps: int | None = Field(default=None, ge=1)
    guidance: float | None = None
    source: str | None = None
    target: list[str] = Field(default_factory=list)
    figures: Figures | None = None
    plain: PlainSteps | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class Preset(_Part):
    """Specs and the evidence for them, in one file.

        cachekit.apply(pipe, "preset:fast.json")

    `requires` maps each policy of the specs to the distribution that it comes with. `{folder}` in a spec stands for
    the folder of the preset's file.

    >>> preset = Preset(specs=["tgate:m=10", "deepcache:interval=2"])
    >>> preset.missing(["deepcache", "forecast"])
    ['tgate']
    """

    version: int = VERSION
    summary: str = ""
    specs: list[str] = Field(min_length=1)
    requires: dict[str, str] = Field(default_factory=dict)
    evidence: Evidence = Field(default_factory=Evidence)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield what a line shows of it: the specs, and what their evidence is for."""
        yield "specs", self.specs
        names = ("pipeline", "architecture", "scheduler", "steps", "guidance")
        given = ((name, getattr(self.evidence, name)) for name in names)
        yield from ((name, value) for name, value in given if value is not None)

    @field_validator("specs")
    @classmethod
    def _no_presets(cls, specs: list[str]) -> list[str]:
        """Refuse presets within presets, which could go round in circles."""
        nested = [spec for spec in specs if is_preset(spec)]
        if nested:
            raise ValueError(f"holds the preset {nested[0]!r}, but presets can't be nested; write its specs")
        return specs

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the preset as JSON, in one piece; raises `PresetError` where it can't be written."""
        write_whole(path, self.model_dump_json(indent=1, exclude_none=True) + "\n", PresetError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preset:
        """Read and check a preset; raises `PresetError` where anything about it is wrong."""
        name = os.fspath(path)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PresetError(f"cannot read preset {name!r}: {error.strerror}{_known()}") from None
        except (ValueError, RecursionError) as error:
            raise PresetError(f"{name!r} is not a complete preset file: {error}; make it again") from None
        found = data.get("version") if isinstance(data, dict) else None
        if found != VERSION:
            raise PresetError(
                f"{name!r} has version {found!r}, this cachekit reads presets of {VERSION}; make it again"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or WORD
            raise PresetError(f"{name!r}: {where}: {reason_of(first)}; correct it, or make it again") from None

    def missing(self, policies: Iterable[str]) -> list[str]:
        """List the policies of the specs that are not among those installed."""
        known = set(policies)
        names = (spec.partition(":")[0].strip() for spec in self.specs)
        return [name for name in dict.fromkeys(names) if name not in known]


def is_preset(spec: Any) -> bool:
    """Whether a spec names a preset."""
    return isinstance(spec, str) and spec.partition(":")[0].strip() == WORD


def shipped() -> dict[str, Path]:
    """Find the presets that ship, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def read(spec: str, policies: Mapping[str, Any]) -> tuple[Preset, list[str]]:
    """Load the preset of a spec, and write out its specs.

    Raises `PresetError` for a file that can't be used, where one of its policies is not among `policies`, and where its
    specs name a folder whose path they can't hold.
    """
    text = spec.partition(":")[2].strip()
    if not text:
        raise PresetError(f"spec {spec!r}: no preset after the colon; write {WORD}:FILE or {WORD}:NAME{_known()}")
    path = _path_of(text)
    preset = Preset.load(path)
    missing = preset.missing(policies)
    if missing:
        raise PresetError(f"preset {text!r}: {_how_to_get(missing, preset.requires)}")
    folder = str(path.parent)
    misfit = misfit_of(folder) if any(HERE in one for one in preset.specs) else ""
    if misfit:
        raise PresetError(f"preset {text!r}: {folder!r} {misfit}; rename it, or name the preset from within it")
    return preset, [one.replace(HERE, folder) for one in preset.specs]


def misfit_of(folder: str) -> str:
    """Why a path can't stand in a spec; "" where it can."""
    while _PAIR.search(folder) and not set(",|") & set(folder):
        folder = _PAIR.sub("", folder)
    return "has a comma, a bar or an unpaired bracket, which specs can't hold" if _SEPARATORS.search(folder) else ""


def expanded(specs: Sequence[Any], policies: Mapping[str, Any]) -> tuple[list[Any], list[Preset]]:
    """Replace each preset among specs by its own; collect the presets. Raises `PresetError` as `read` does."""
    found: list[Any] = []
    presets = []
    for spec in specs:
        if not is_preset(spec):
            found.append(spec)
            continue
        preset, own = read(spec, policies)
        presets.append(preset)
        found += own
    return found, presets


def _path_of(text: str) -> Path:
    path = Path(text).expanduser()
    known = shipped()
    if path.exists() or text not in known:
        if not path.exists() and not path.suffix and path.name == text:
            raise PresetError(f"unknown preset {text!r}{nearest(text, known)}: no such file{_known()}")
        return path
    return known[text]


def _known() -> str:
    names = ", ".join(shipped())
    return f"; presets that ship: {names}" if names else "; make one with cachekit tune"


def _how_to_get(missing: Sequence[str], requires: Mapping[str, str]) -> str:
    """Write which policies are missing, and what installs them."""
    needed = " and ".join(map(repr, missing))
    sources = dict.fromkeys(requires[name] for name in missing if name in requires)
    one, several = ("policy", "plugin that registers it"), ("policies", "plugins that register them")
    noun, plugins = one if len(missing) == 1 else several
    remedy = f"pip install {' '.join(sources)}" if sources else f"install the {plugins}"
    return f"needs the {noun} {needed}, not installed here; {remedy}"
