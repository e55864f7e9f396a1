"""Read captions, and find the reference images that belong to them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachekit.tools.bench.cells import BenchError
from cachekit.upstream.pipelines import most_tokens

__all__ = ["Captions", "check_scenes", "cut_off", "images_in", "not_a_scene", "read_captions"]

#: Attributes of pipelines that hold tokenizers. Those without a limit have a huge number as theirs.
_TOKENIZERS, _NO_LIMIT = ("tokenizer", "tokenizer_2", "tokenizer_3"), 10**6


@dataclass(frozen=True)
class Captions:
    """Captions, and the file names of their images where the captions file gives them."""

    source: str
    texts: tuple[str, ...]
    names: tuple[str, ...] = ()

    def references(self, folder: Path) -> list[Path]:
        """Find the reference image of each caption in `folder`.

        Without file names in the captions file, images are matched in the order of their names. Raises `BenchError`
        where the folder or an image is missing, or the numbers of captions and images differ.
        """
        if self.names and folder.is_dir():
            return [self._named(folder / name) for name in self.names]
        found = images_in(folder)
        if len(found) != len(self.texts):
            raise BenchError(
                f"{len(self.texts)} captions in {self.source!r}, but {len(found)} images in {str(folder)!r}: "
                "each caption needs its image, in the order of their names"
            )
        return found

    def _named(self, path: Path) -> Path:
        if not path.is_file():
            raise BenchError(
                f"references {str(path.parent)!r} lack {path.name!r}, which {self.source!r} names; "
                "put it there, or leave --references out"
            )
        return path


def read_captions(source: str, limit: int | None = None) -> Captions:
    """Read the first `limit` captions of a source, or all of them.

    `source` is a number of held-out captions of the embedded model, a file with a caption per line, or MS-COCO
    annotations (`.json`), of which the first caption of each image is taken, images in the order of their ids.
    """
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", source):
        from cachekit.models.demo import heldout_captions

        return Captions(source, tuple(heldout_captions(min(int(source), limit or int(source)), 0)))
    text = _text(source)
    pairs = _annotated(source, text) if source.lower().endswith(".json") else [*_lines(text)]
    if not pairs:
        raise BenchError(f"captions {source!r}: the file has no captions; write one on each line")
    names, texts = zip(*pairs[:limit])
    return Captions(source, texts, names if names[0] else ())


def _text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot read captions {source!r}: give a file or a number above 0") from error


def _lines(text: str) -> list[tuple[str, str]]:
    # str.splitlines would also split at other Unicode line boundaries, which may stand inside a caption.
    return [("", line.strip()) for line in text.split("\n") if line.strip()]


def _annotated(source: str, text: str) -> list[tuple[str, str]]:
    """(file name, caption) of each image in MS-COCO annotations."""
    try:
        data: Any = json.loads(text)
        names = {int(image["id"]): str(image["file_name"]) for image in data["images"]}
        first: dict[int, str] = {}
        for row in sorted(data["annotations"], key=lambda row: (row["image_id"], row["id"])):
            first.setdefault(int(row["image_id"]), " ".join(row["caption"].split()))
        return [(names[image], caption) for image, caption in first.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BenchError(
            f"captions {source!r}: not annotations of MS-COCO; give its captions_*.json, or a text file with a caption"
            " on each line"
        ) from error


def cut_off(text: str, pipe: Any) -> str:
    """Describe why no text encoder of `pipe` reads a caption to its end; "" where one does."""
    tokenizers = [found for name in _TOKENIZERS if (found := getattr(pipe, name, None)) is not None]
    most = most_tokens(pipe) or _NO_LIMIT
    limits = {one: min(most, getattr(one, "model_max_length", _NO_LIMIT)) for one in tokenizers}
    if not limits or max(limits.values()) >= _NO_LIMIT:
        return ""
    tokens = {tokenizer: len(tokenizer(text).input_ids) for tokenizer in tokenizers}
    if any(tokens[tokenizer] <= most for tokenizer, most in limits.items()):
        return ""
    longest = max(tokenizers, key=lambda tokenizer: limits[tokenizer])
    return (
        f"has {tokens[longest]} tokens; {type(pipe).__name__} takes at most {limits[longest]}, begin and end included"
    )


def not_a_scene(text: str) -> str:
    """Describe why images of embedded models can't be checked against a caption; "" where they can."""
    from cachekit.models.demo import scenes

    try:
        scenes.parse(text)
    except ValueError as error:
        return str(error)
    return ""


def check_scenes(captions: Sequence[str]) -> None:
    """Raise `BenchError` for the first caption that images of embedded models can't be checked against."""
    for number, text in enumerate(captions, 1):
        if reason := not_a_scene(text):
            raise BenchError(f"caption {number}: {reason}; or give a number of held-out captions")


def images_in(folder: Path) -> list[Path]:
    """List the reference images of a folder by name; raises `BenchError` where there is no such folder."""
    if not folder.is_dir():
        raise BenchError(f"cannot read references {str(folder)!r}: there is no such folder; name that of the images")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _suffixes())


def _suffixes() -> set[str]:
    from PIL import Image

    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
