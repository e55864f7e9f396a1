"""Writing files in one piece, and digests of data."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def unwritable_reason(path: Path) -> str:
    """Describe why no file can be written to a path, with the remedy; "" where it is in a folder that exists."""
    if not path.absolute().parent.is_dir():
        return f"there is no folder {str(path.parent)!r}; make it, or name another"
    return "it is a folder; name a file in it" if path.is_dir() else ""


def write_whole(path: str | os.PathLike[str], content: str | bytes, error: type[Exception]) -> None:
    """Write a file that everybody may read; an interrupted call leaves the file as it was.

    Raises `error`, with one line, where it can't be written.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        with tempfile.NamedTemporaryFile("wb", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
    except OSError as failure:
        raise error(f"cannot write {str(target)!r}: {failure.strerror}; give another path") from failure


def digest(data: Any) -> str:
    """Compute a short digest of plain data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
