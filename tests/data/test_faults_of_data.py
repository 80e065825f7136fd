"""What a user's file may do to the program, through the command line: rows 17-32 of the fault list.

The rules themselves are proved where they are made (`test_jsonstream`, `test_records`,
`test_sources`, `test_tokenize`); here stands what a user sees of them: one message with the file,
the line and the remedy, exit status 2, no traceback, nothing written.
"""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpo_arabic.cli import main
from cpo_arabic.data.pack import Padding, collate
from cpo_arabic.data.records import read_records
from cpo_arabic.data.tokenize import tokenize_records
from cpo_arabic.errors import DataError
from tests.data.conftest import ROOT, pair, record

Command = Callable[..., tuple[int, str]]

GOOD = [json.dumps(pair(number), ensure_ascii=False).encode() for number in range(4)]


def changed(**change: Any) -> bytes:
    """A row whose values differ; ``...`` leaves a column out."""
    row = {key: value for key, value in {**pair(9), **change}.items() if value is not ...}
    return json.dumps(row).encode()


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run a verb on a file of data, in this process; give the exit status and what was shown."""

    def run(verb: list[str], name: str, content: bytes, *overrides: str) -> tuple[int, str]:
        (tmp_path / name).write_bytes(content)
        config = tmp_path / "run.yaml"
        config.write_text(
            f"model: {{name: '{ROOT / 'demo/base-model'}', max_length: 64}}\n"
            f"data: {{train_file: '{tmp_path / name}', validation_file: null}}\n"
            f"training: {{output_dir: '{tmp_path / 'run'}'}}\n",
            encoding="utf-8",
        )
        given = [part for override in overrides for part in ("--set", override)]
        monkeypatch.setattr(sys, "argv", ["cpo-arabic", *verb, str(config), *given])
        monkeypatch.setenv("COLUMNS", "400")
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


BAD_ROWS = {
    "18 not UTF-8": (b'{"prompt": "\xd8", "chosen": "a", "rejected": "b"}', ["0xd8", "UTF-8"]),
    "20 lone surrogate": (
        b'{"prompt": "x", "chosen": "\\ud800", "rejected": "b"}',
        ["surrogate"],
    ),
    "21 NaN": (b'{"prompt": "x", "chosen": "a", "rejected": "b", "s": NaN}', ["NaN"]),
    "21 1e400": (b'{"prompt": "x", "chosen": "a", "rejected": "b", "s": 1e400}', ["1e400"]),
    "21 key twice": (b'{"prompt": "x", "prompt": "y", "chosen": "a"}', ['"prompt"', "twice"]),
    "24 missing": (changed(rejected=...), ["rejected", "Columns found: prompt, chosen"]),
    "24 null": (changed(chosen=None), ['"chosen" is null', "Columns found: prompt, chosen"]),
    "24 type": (
        changed(chosen=5),
        ['"chosen"', "a number", "Columns found: prompt, chosen, rejected"],
    ),
    "25 no negative": (changed(chosen="آمن", rejected=" \u0627\u0653من\n"), ["equals the chosen"]),
    "26 empty": (changed(chosen=""), ["chosen", "empty or blank"]),
    "26 blank": (changed(rejected=" \u00a0\n"), ["negative", "empty or blank"]),
    "27 truncated": (b'{"prompt": "x", "chosen": "a", "rej', ["cut off"]),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_ends_training_with_its_line_and_remedy_and_may_be_skipped(
    command: Command, tmp_path: Path, fault: str
) -> None:
    bad, words = BAD_ROWS[fault]
    content = b"\n".join([*GOOD[:2], bad, *GOOD[2:]])
    status, shown = command(["train"], "rows.jsonl", content)
    assert status == 2
    assert f"{tmp_path / 'rows.jsonl'}:3: " in shown
    for word in [*words, "data.on_bad_row: skip"]:
        assert word in shown
    assert "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run.yaml"]

    status, shown = command(["data", "check"], "rows.jsonl", content, "data.on_bad_row=skip")
    assert status == 0
    assert "1 bad rows skipped" in shown
    assert "rows.jsonl:3: " in shown
    assert "4 rows from 1 source" in shown


BAD_FILES = {
    "23 empty": ("rows.jsonl", b"", ["rows.jsonl: the source is empty", "A row looks like"]),
    "23 blank": ("rows.jsonl", b"\xef\xbb\xbf\r\n \n", ["the source is empty"]),
    "23 no row left": (
        "rows.csv", b"prompt,chosen,rejected\na,b,b\n", ["no row is left", "rows.csv:2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_file_without_a_row_is_refused(command: Command, tmp_path: Path, fault: str) -> None:
    name, content, words = BAD_FILES[fault]
    status, shown = command(["train"], name, content, "data.on_bad_row=skip")
    assert status == 2
    for word in words:
        assert word in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spelling", ["bom", "crlf", "no final newline", "all three"])
def test_17_the_spelling_of_line_ends_changes_nothing(command: Command, spelling: str) -> None:
    lines = b"\n".join(GOOD) + b"\n"
    _, expected = command(["data", "preview", "--row", "1", "--json"], "rows.jsonl", lines)
    if spelling in ("crlf", "all three"):
        lines = lines.replace(b"\n", b"\r\n")
    if spelling in ("no final newline", "all three"):
        lines = lines.rstrip(b"\r\n")
    if spelling in ("bom", "all three"):
        lines = b"\xef\xbb\xbf" + lines
    status, shown = command(["data", "preview", "--row", "1", "--json"], "rows.jsonl", lines)
    assert (status, shown) == (0, expected)


def test_19_a_unicode_line_separator_is_text(command: Command) -> None:
    text = "a\u2028b\u0085c\u000bd"
    content = b"\n".join([*GOOD, json.dumps(pair(chosen=text), ensure_ascii=False).encode()])
    status, shown = command(["data", "check"], "rows.jsonl", content)
    assert status == 0
    assert "5 rows from 1 source" in shown


@pytest.mark.parametrize(
    ("name", "head"),
    [("long.jsonl.gz", GOOD[0] + b'\n{"prompt": "'), ("long.csv.gz", b"prompt,chosen,rejected\n")],
)
def test_22_a_line_of_a_gigabyte_is_refused_in_bounded_memory(
    tmp_path: Path, name: str, head: bytes
) -> None:
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(256):  # as much as is read before the refusal, and more
            file.write(b"x" * 2**20)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"{name}:2: .*more than 64 MiB: split it"):
        read_records(str(tmp_path / name), on_bad_row="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 64 * 2**20  # the naive reader holds bytes and text of all of it


@pytest.mark.parametrize("padding", ["max_length", "longest", "packed"])
def test_30_where_pad_is_eos_the_last_token_trains_in_every_layout(
    tokenizer: Any, padding: Padding
) -> None:
    rows = [record(), record("سؤال أطول بكثير من الأول؟", "نعم.", ("كلا البتة.",))]
    dataset = tokenize_records(
        rows, tokenizer, max_length=64, max_prompt_length=32, max_target_length=32
    )
    groups = [dataset.group(row, epoch=0, seed=0, num_negatives=1) for row in range(2)]
    batch = collate(
        groups,
        padding=padding,
        pad_id=tokenizer.eos_token_id,
        max_length=64,
        max_tokens_per_row=64,
    )
    expected = [ids for group in groups for ids in group.completion_ids]
    assert batch.completion_lengths.tolist() == [len(ids) for ids in expected]
    lengths = batch.completion_lengths.tolist()
    targets = [part.tolist() for part in batch.token_targets.split(lengths)]
    assert targets == expected
    assert all(ids[-1] == tokenizer.eos_token_id for ids in targets)


def test_held_out_rows_may_be_a_pattern_and_a_missing_file_is_named(
    command: Command, tmp_path: Path
) -> None:
    for number in range(3):
        (tmp_path / f"held-{number}.jsonl").write_bytes(changed(prompt=f"سؤال آخر {number}"))
    rows = b"\n".join(GOOD)
    pattern = f"data.validation_file={tmp_path}/held-*.jsonl"
    status, shown = command(["data", "check"], "rows.jsonl", rows, pattern)
    assert status == 0
    assert "held out: 3 rows from 3 source" in shown
    missing = f"data.validation_file={tmp_path}/held-7.jsonl"
    status, shown = command(["data", "check"], "rows.jsonl", rows, missing)
    assert status == 2
    for words in ("data.validation_file", "no such file", "Did you mean", "write null to split"):
        assert words in shown
