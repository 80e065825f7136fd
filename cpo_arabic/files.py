"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``; what the block wrote there then takes its place.

    Temporary name, fsync, rename. Each process has a name of its own. A block that fails leaves
    ``path`` as it was and nothing beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file (UTF-8) in one step."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
