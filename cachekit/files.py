"""Writing files in one piece."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: str | os.PathLike[str], text: str, error: type[Exception]) -> None:
    """Write a text file that everybody may read; an interrupted call leaves the file as it was.

    Raises `error`, with one line, where it can't be written.
    """
    target = Path(path)
    try:
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
    except OSError as failure:
        raise error(f"cannot write {str(target)!r}: {failure.strerror}") from failure
