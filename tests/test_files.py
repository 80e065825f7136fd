"""A file is the old one or the whole new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpo_arabic.files import whole, write_whole


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    write_whole(path, "جديد")
    assert path.read_text(encoding="utf-8") == "جديد"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_half_way_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), whole(path) as temporary:
        temporary.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
