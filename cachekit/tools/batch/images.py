"""Images as PNG files that hold what they are of."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachekit.errors import first_line
from cachekit.tools.batch.rows import BatchError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["described", "encoded", "opened"]

#: The text of a PNG file that has the description, as JSON.
_KEY = "cachekit"


def encoded(image: Image, description: Mapping[str, Any]) -> bytes:
    """Write an image as PNG, with its description."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(_KEY, json.dumps(description))
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def described(path: Path) -> dict[str, Any]:
    """Read the description that an image file holds; raises `BatchError` where it has none."""
    try:
        description: dict[str, Any] = json.loads(opened(path).info[_KEY])
    except (KeyError, ValueError) as error:
        raise BatchError(f"image {str(path)!r} does not hold its costs; remove it to generate it again") from error
    return description


def opened(path: Path) -> Image:
    """Open an image and read all of it; raises `BatchError` where it can't be read."""
    from PIL import Image

    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise BatchError(f"cannot read image {str(path)!r}: {first_line(error)}; remove it") from error
    return image
