"""Checkpoints: written whole or not at all, verified before they are read.

``checkpoint-<step>/`` holds the adapter or model in its library's format, the optimizer's state,
projection head, momentum averages and queue where the run has them, ``state.json`` and, written
last, ``manifest.json`` with the SHA-256 of every other file. State is JSON and safetensors: nothing
is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_arabic.errors import CheckpointError, RunDirectoryError

MANIFEST = "manifest.json"
STATE = "state.json"
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
"""Files that libraries would unpickle: none is ours, whatever a manifest says."""
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was verified."""

    folder: Path
    step: int
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run directory, by step."""

    def __init__(self, root: Path, total_limit: int | None) -> None:
        self.root = root
        self.total_limit = total_limit

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Writes ``checkpoint-<step>``, then removes what is over the limit.

        Args:
            step: optimizer steps done.
            state: what ``state.json`` holds; JSON values only.
            write: puts the checkpoint's other files into the folder it is given.

        Raises:
            RunDirectoryError: the disk is full or read-only; earlier checkpoints are untouched and
                nothing is left under the final name.
        """
        final = self.root / f"checkpoint-{step}"

        def write_all(folder: Path) -> None:
            write(folder)
            (folder / STATE).write_text(json.dumps({**state, "step": step}, indent=2) + "\n")
            _write_manifest(folder)

        write_folder(final, write_all)
        self._rotate()
        return final

    def sweep(self) -> None:
        """Removes what a crash left half-written or half-removed."""
        for pattern in (".tmp-*", ".old-*", ".*.tmp"):
            for left in self.root.glob(pattern):
                _remove(left)

    def folders(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint, oldest step first; links are not followed."""
        found = []
        for folder in self.root.glob("checkpoint-*") if self.root.is_dir() else ():
            match = _NAME.fullmatch(folder.name)
            if match and folder.is_dir() and not folder.is_symlink():
                found.append((int(match[1]), folder))
        return sorted(found)

    def newest(self, warn: Callable[[str], None]) -> Checkpoint:
        """The newest checkpoint that verifies; damaged ones are skipped with a warning.

        Raises:
            CheckpointError: there is none.
        """
        for _, folder in reversed(self.folders()):
            try:
                return verified(folder)
            except CheckpointError as error:
                warn(f"skipped: {error}")
        raise CheckpointError(
            f"{self.root} holds no usable checkpoint: start afresh, without --resume and with "
            "--set training.overwrite_output_dir=true"
        )

    def _rotate(self) -> None:
        if self.total_limit is None:
            return
        for _, folder in self.folders()[: -self.total_limit]:
            # Renamed first: a crash half-way leaves no folder that looks like a checkpoint.
            doomed = folder.with_name(f".old-{folder.name}")
            _remove(doomed)
            folder.rename(doomed)
            _remove(doomed)


def verified(folder: Path) -> Checkpoint:
    """Reads a checkpoint's state after comparing every file with the manifest.

    Raises:
        CheckpointError: a file is missing, foreign, truncated or altered.
    """
    manifest = _read_json(folder / MANIFEST)
    listed = manifest.get("sha256")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no files")
    present = {str(p.relative_to(folder)) for p in _files(folder)} - {MANIFEST}
    pickles = {name for name in present if Path(name).suffix in PICKLES}
    for problem, names in (
        ("is missing", set(listed) - present),
        ("does not belong there", (present - set(listed)) | pickles),
    ):
        if names:
            raise CheckpointError(f"{folder}: {sorted(names)[0]} {problem}")
    for name, digest in listed.items():
        if sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    state = _read_json(folder / STATE)
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{folder / STATE} says no step")
    return Checkpoint(folder=folder, step=state["step"], state=state)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder whole or not at all: temporary name, fsync, rename.

    Raises:
        RunDirectoryError: the disk is full or read-only; nothing is left under the final name.
    """
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        _sync_tree(temporary)
        _remove(final)
        temporary.rename(final)
        _sync_folder(final.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not from_disk(error):
            raise
        raise RunDirectoryError(
            f"{final}: cannot be written: {reason_of(error)}. Earlier checkpoints are intact; free "
            "room, then go on with --resume"
        ) from error


def from_disk(error: Exception) -> bool:
    """Whether the system refused; safetensors and tokenizers say so in words alone."""
    return isinstance(error, OSError) or "(os error " in str(error)


def reason_of(error: Exception) -> str:
    """What the system said, without number and file name."""
    return getattr(error, "strerror", None) or str(error)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _write_manifest(folder: Path) -> None:
    digests = {str(p.relative_to(folder)): sha256(p) for p in sorted(_files(folder))}
    (folder / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sync_tree(folder: Path) -> None:
    for path in _files(folder):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Deletes a folder or file of ours; a link is unlinked, never followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
