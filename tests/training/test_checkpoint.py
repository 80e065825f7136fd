"""Checkpoints: whole or absent, and verified before use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpo_arabic.errors import CheckpointError, RunDirectoryError
from cpo_arabic.training.checkpoint import CheckpointStore, verified
from cpo_arabic.training.metrics import MetricsFile


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"0123456789")


def saved(root: Path, *steps: int, limit: int | None = None) -> CheckpointStore:
    store = CheckpointStore(root, limit)
    for step in steps:
        store.save(step, {"note": "x"}, write)
    return store


def ignore(_: str) -> None: ...


def test_what_was_saved_is_found_by_step(tmp_path: Path) -> None:
    newest = saved(tmp_path, 2, 10).newest(ignore)
    assert newest.step == 10
    assert newest.state["note"] == "x"


def test_rotation_keeps_the_latest_steps_whatever_the_clock(tmp_path: Path) -> None:
    saved(tmp_path, 30, 10, 20, limit=2)
    assert [step for step, _ in CheckpointStore(tmp_path, 2).folders()] == [20, 30]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "foreign", "manifest"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, damage: str) -> None:
    store = saved(tmp_path, 1, 2)
    folder = tmp_path / "checkpoint-2"
    weights = folder / "weights"
    match damage:
        case "flip":
            weights.write_bytes(b"0123456788")
        case "truncate":
            weights.write_bytes(b"01234")
        case "missing":
            weights.unlink()
        case "foreign":
            (folder / "stray").write_text("x")
        case "manifest":
            (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        verified(folder)
    warnings: list[str] = []
    assert store.newest(warnings.append).step == 1
    assert len(warnings) == 1


def test_without_a_manifest_the_flipped_byte_would_pass(tmp_path: Path) -> None:
    """The negative control: state alone reads fine."""
    saved(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "weights").write_bytes(b"0123456788")
    assert json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())["step"] == 1


def test_a_full_disk_leaves_earlier_checkpoints_and_no_half_written_one(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)

    def full(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunDirectoryError, match="No space left"):
        store.save(2, {}, full)
    assert [step for step, _ in store.folders()] == [1]
    assert verified(tmp_path / "checkpoint-1").step == 1
    assert not list(tmp_path.glob(".tmp*"))


def test_a_linked_checkpoint_is_neither_read_nor_rotated_away(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    root = tmp_path / "run"
    root.mkdir()
    (root / "checkpoint-0").symlink_to(outside)
    saved(root, 1, 2, limit=1)
    assert (outside / "precious").exists()


def test_no_usable_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        CheckpointStore(tmp_path, None).newest(ignore)


def test_metrics_rewind_to_the_resumed_step_and_forget_a_torn_line(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.append({"step": step})
    with metrics.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    metrics.rewind(2)
    assert [r["step"] for r in metrics.read()] == [1, 2]
