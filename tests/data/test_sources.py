"""Every kind of source gives the same records as JSONL; what cannot be read is refused in words."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_arabic.data.records import PreferenceRecord, read_records
from cpo_arabic.errors import DataError
from tests.data.conftest import pair

ROWS = [pair(number, negatives=[f"كلا {number}", "لا"]) for number in range(6)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def texts(records: list[PreferenceRecord]) -> list[tuple[Any, ...]]:
    return [(record.turns, record.completions) for record in records]


@pytest.fixture
def expected(tmp_path: Path) -> list[tuple[Any, ...]]:
    path = tmp_path / "reference.jsonl"
    path.write_bytes(LINES)
    return texts(read_records(str(path)).records)


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(ROWS[0])
        for row in ROWS:
            writer.writerow(
                json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell
                for cell in row.values()
            )


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_with_pyarrow(codec: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with pa.output_stream(str(path), compression=codec) as sink:
            sink.write(LINES)

    return write


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"),
    "rows.csv": write_csv,
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.arrow": write_arrow,
    "file.arrow": write_arrow_file,
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "rows.JSONL.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "rows.jsonl.zst": write_with_pyarrow("zstd"),
    "rows.jsonl.lz4": write_with_pyarrow("lz4"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records(
    tmp_path: Path, expected: list[tuple[Any, ...]], name: str
) -> None:
    WRITERS[name](tmp_path / name)
    assert texts(read_records(str(tmp_path / name)).records) == expected


def test_a_saved_dataset_and_a_split_of_a_saved_dict(
    tmp_path: Path, expected: list[tuple[Any, ...]]
) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": dataset.select([0]), "dev": dataset}).save_to_disk(str(tmp_path / "two"))
    assert texts(read_records(str(tmp_path / "one")).records) == expected
    assert len(read_records(str(tmp_path / "two")).records) == 1
    assert texts(read_records(f"{tmp_path / 'two'}?split=dev").records) == expected
    with pytest.raises(DataError, match='no split "test"; there are train, dev'):
        read_records(f"{tmp_path / 'two'}?split=test")


def test_the_loading_code_of_hub_names_reads_a_folder_with_config_and_split(
    tmp_path: Path, expected: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "team" / "arabic-pairs"
    (folder / "msa").mkdir(parents=True)
    (folder / "msa" / "test.jsonl").write_bytes(LINES)
    (folder / "msa" / "train.jsonl").write_bytes(LINES.splitlines(keepends=True)[0])
    card = "---\nconfigs:\n- config_name: msa\n  data_files:\n  - split: train\n    path: msa/train.jsonl\n  - split: test\n    path: msa/test.jsonl\n---\n"  # noqa: E501
    (folder / "README.md").write_text(card, encoding="utf-8")
    assert texts(read_records(f"{folder}?config=msa&split=test").records) == expected
    assert len(read_records(str(folder)).records) == 1
    with pytest.raises(DataError, match="`datasets` cannot load it"):
        read_records(f"{folder}?config=egyptian")
    with pytest.raises(DataError, match='unknown option "spilt"'):
        read_records(f"{folder}?spilt=test")


def test_a_glob_reads_its_files_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        row = json.dumps(pair(number), ensure_ascii=False)
        (tmp_path / f"part-{number}.jsonl").write_text(row, encoding="utf-8")
    loaded = read_records(str(tmp_path / "part-*.jsonl"))
    assert [Path(record.source).name for record in loaded.records] == [
        f"part-{number}.jsonl" for number in range(3)
    ]
    assert len(loaded.report.sources) == 3
    with pytest.raises(DataError, match="matches no file"):
        read_records(str(tmp_path / "no-*.jsonl"))


def test_a_list_of_sources_is_read_one_after_another(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(LINES)
    both = read_records([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    assert len(both.records) == 12
    assert both.records[0].source.endswith("b.jsonl")


def test_a_mixture_has_the_shares_of_its_weights_and_repeats_no_row(tmp_path: Path) -> None:
    paths = {}
    for name, count in (("large", 300), ("small", 40)):
        path = tmp_path / f"{name}.jsonl"
        lines = (json.dumps(pair(number), ensure_ascii=False) for number in range(count))
        path.write_text("\n".join(lines), encoding="utf-8")
        paths[name] = str(path)
    mixed = read_records({paths["large"]: 3.0, paths["small"]: 1.0}, seed=1).records
    from_small = [record for record in mixed if record.source == paths["small"]]
    assert (len(mixed), len(from_small)) == (160, 40)
    assert len({record.place for record in mixed}) == 160
    again = read_records({paths["large"]: 3.0, paths["small"]: 1.0}, seed=1).records
    other = read_records({paths["large"]: 3.0, paths["small"]: 1.0}, seed=2).records
    assert mixed == again
    assert mixed != other
    with pytest.raises(DataError, match="above 0"):
        read_records({paths["large"]: 0.0})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES)[:-20], ["cut.jsonl.gz", "cannot be read"]),
        ("not.jsonl.gz", LINES, ["not.jsonl.gz", "cannot be read"]),
        ("not.parquet", LINES, ["not Parquet"]),
        ("not.arrow", LINES, ["not Arrow"]),
        ("rows.txt", LINES, ["unknown kind of file", ".jsonl"]),
        ("bad.csv", b"prompt,chosen,rejected\na,b\n", ["bad.csv:2", "2 cells under 3 columns"]),
        ("bad.csv", b"prompt,chosen,rejected\na,b,\xff\n", ["bad.csv:2", "UTF-8"]),
        ("bad.csv", b"prompt,chosen,rejected\na,b,\n", ["bad.csv:2", '"rejected" is null']),
        ("bad.csv", b"prompt,chosen,chosen\na,b,c\n", ["bad.csv:1", "twice"]),
        ("bad.csv", b'prompt,chosen,rejected\na,"b"x,c\n', ["bad.csv:2", "not CSV"]),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_records(str(tmp_path / name))
    for word in words:
        assert word in str(caught.value)


def test_a_csv_cell_may_hold_line_ends_and_unicode_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    text = 'سطر\nثان\u2028ثالث "مقتبس"'
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], [text, "أ", "ب"], ["س", "ج", "د"]])  # fmt: skip  # noqa: E501
    records = read_records(str(path)).records
    assert records[0].turns[0].content == text
    assert [record.line for record in records] == [2, 4]


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read_records(str(tmp_path / "pipe.jsonl"))
