"""Streaming by configuration: never stale, both sides of the split, nothing skipped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpo_arabic.run.model import tokenizer_of
from cpo_arabic.run.stream import stream
from tests.data.conftest import pair

Make = Callable[..., Any]


def test_a_changed_file_is_tokenised_anew_and_what_was_skipped_is_said(
    toy_config: Make, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(pair(number), ensure_ascii=False) for number in range(200)]
    path.write_text("\n".join([*lines, '{"prompt": "x"}']), encoding="utf-8")
    config = toy_config(
        f"data.train_file={path}", "data.validation_file=null", "data.max_samples=null",
        "data.validation_split_percentage=0.2", "data.streaming=true", "data.on_bad_row=skip",
        f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    tokenizer = tokenizer_of(config)

    train, held_out = stream(config, tokenizer)
    assert held_out is not None
    assert len(train) + len(held_out) == 200
    assert 20 < len(held_out) < 60
    places = [data.place(row) for data in (train, held_out) for row in range(len(data))]
    assert len(set(places)) == 200
    assert not {train.prompt_key(row) for row in range(len(train))} & {
        held_out.prompt_key(row) for row in range(len(held_out))
    }
    assert any(f"{path}:201: needs the columns" in line for line in train.report.lines())

    again, _ = stream(config, tokenizer)
    assert again.report.from_cache
    assert any(f"{path}:201: needs the columns" in line for line in again.report.lines())

    path.write_text(path.read_text(encoding="utf-8").replace("رقم 7 ", "رقم ٧ "), encoding="utf-8")
    changed, _ = stream(config, tokenizer)
    assert not changed.report.from_cache, "a changed file was served stale"
