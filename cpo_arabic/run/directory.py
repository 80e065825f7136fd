"""The run directory: who may write there, and what lies where."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpo_arabic.errors import RunDirectoryError

LOCK = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run.

    ::

        config.yaml       what was run, every value resolved
        metrics.jsonl     one record a logging step or evaluation
        checkpoint-N/     to resume from
        samples/          completions of held-out prompts (data.generate_during_eval)
        tensorboard/      event files
        mined-*.jsonl     mined hard negatives, where data.cache_dir is not set
        final/            adapter or model, tokenizer, model card
        summary.json      what was learnt
        curves.png        its picture
    """

    root: Path

    @property
    def config(self) -> Path:
        """Resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Metric records."""
        return self.root / "metrics.jsonl"

    @property
    def final(self) -> Path:
        """The trained artefact."""
        return self.root / "final"

    @property
    def summary(self) -> Path:
        """Held-out metrics before and after."""
        return self.root / "summary.json"

    @property
    def curves(self) -> Path:
        """Picture of the metrics."""
        return self.root / "curves.png"


def check_usable(root: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses a directory that is used, read-only or a link, before anything is loaded.

    Raises:
        RunDirectoryError: with the remedy.
    """
    if root.is_symlink():
        raise RunDirectoryError(
            f"training.output_dir {str(root)!r} is a symbolic link; name the folder it points to"
        )
    if root.exists() and not root.is_dir():
        raise RunDirectoryError(f"training.output_dir {str(root)!r} is a file; choose a folder")
    used = root.is_dir() and any(entry.name != LOCK for entry in root.iterdir())
    if resume and not used:
        raise RunDirectoryError(
            f"training.output_dir {str(root)!r} holds no run to resume; leave --resume out"
        )
    if used and not (resume or overwrite):
        raise RunDirectoryError(
            f"training.output_dir {str(root)!r} is already used. Go on with that run by --resume, "
            "choose another folder with --set training.output_dir=…, or replace it by word with "
            "--set training.overwrite_output_dir=true"
        )
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise RunDirectoryError(
            f"training.output_dir {str(root)!r} cannot be made: {str(existing)!r} is a file"
        )
    if not os.access(existing, os.W_OK):
        raise RunDirectoryError(
            f"training.output_dir {str(root)!r} cannot be written: {str(existing)!r} is read-only"
        )


@contextmanager
def claimed(root: Path) -> Iterator[None]:
    """Within the block the directory is this run's own; a block that writes nothing leaves nothing.

    Raises:
        RunDirectoryError: another run is in it, or the disk refuses.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / LOCK).open("w")
    except OSError as error:
        raise RunDirectoryError(
            f"training.output_dir {str(root)!r} cannot be written: {error.strerror}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunDirectoryError(
                f"training.output_dir {str(root)!r} is in use by another run; choose another folder"
            ) from error
        try:
            yield
        finally:
            (root / LOCK).unlink(missing_ok=True)
            if not any(root.iterdir()):
                root.rmdir()


def empty(root: Path) -> None:
    """Removes what an earlier run left; links are unlinked, never followed."""
    for entry in root.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
