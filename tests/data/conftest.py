"""What the data tests share: a writer of files, and the small real Qwen tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cpo_arabic.data.records import PreferenceRecord, Turn

ROOT = Path(__file__).resolve().parents[2]
Rows = list[Mapping[str, Any]]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "demo" / "base-model")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[Rows], str]:
    """Write rows to a JSONL file and give its path."""

    def write(rows: Rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        return str(path)

    return write


def pair(number: int = 0, **other: Any) -> dict[str, Any]:
    """One plain row."""
    return {
        "prompt": f"ما هي عاصمة الدولة رقم {number}؟",
        "chosen": f"العاصمة رقم {number} مدينة كبيرة.",
        "rejected": f"لا أعرف {number}.",
        **other,
    }


def record(
    prompt: str = "ما هي عاصمة فرنسا؟",
    chosen: str = "عاصمة فرنسا هي باريس.",
    easy: tuple[str, ...] = ("باريس.",),
    hard: tuple[str, ...] = (),
    system: str | None = None,
    line: int = 1,
) -> PreferenceRecord:
    """One record without a file."""
    turns = (Turn("user", prompt),)
    if system is not None:
        turns = (Turn("system", system), *turns)
    return PreferenceRecord(turns, chosen, easy, hard, "memory", line)
