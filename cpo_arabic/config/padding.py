"""How much of ``padding: max_length`` is padding, estimated from the data without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from cpo_arabic.config.rules import Settled

_ROWS = 200
_BYTES = 256 * 1024
_CHARACTERS_PER_TOKEN = 2.5  # Qwen tokenizers on Arabic text: between 2 and 3


def padding_share(files: list[str], c: Settled) -> float | None:
    """The share of padding when every sequence is padded to ``cpo.max_length``, or None.

    Every prompt-and-completion of the first rows of a JSONL file counts; None where no file is
    readable as that, since the answer is only advice.
    """
    longest = c.cpo.max_length
    lengths = [
        min(len(prompt + text) / _CHARACTERS_PER_TOKEN, longest)
        for row in _rows(files)
        for prompt, text in _texts(row, c)
    ]
    return 1 - sum(lengths) / (longest * len(lengths)) if lengths else None


def _rows(files: list[str]) -> Iterator[object]:
    path = next((Path(file) for file in files if Path(file).is_file()), None)
    if path is None or path.suffix != ".jsonl":
        return
    with path.open("rb") as file:
        text = file.read(_BYTES).decode("utf-8", errors="replace")
    for line in text.split("\n")[:_ROWS]:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):  # a cut last line, or no JSON: not counted
            continue


def _texts(row: object, c: Settled) -> Iterator[tuple[str, str]]:
    if not isinstance(row, dict):
        return
    prompt = row.get(c.data.prompt_column)
    for column in (c.data.chosen_column, c.data.rejected_column):
        text = row.get(column)
        if isinstance(prompt, str) and isinstance(text, str):
            yield prompt, text
