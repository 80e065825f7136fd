"""Where rows come from: local files of every usual kind, folders, globs and `datasets` names.

A source is a string:

- a file: ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``; the
  text ones also as ``.gz``, ``.bz2``, ``.xz``, ``.zst`` or ``.lz4``;
- a glob (``data/*.jsonl``, ``data/**/part-*.parquet``), read in the order of the names;
- a folder: written by ``Dataset.save_to_disk``, or whatever ``datasets.load_dataset`` reads;
- a hub name, ``owner/name`` or ``hf://owner/name``.

Folders and hub names take ``?config=…&split=…&revision=…``; the split is ``train`` unless said.
Rows come one after another; nothing but the row at hand is held.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import parse_qs

from cpo_arabic.data.jsonstream import MAX_ROW_BYTES, BadRow, JsonStream, Row
from cpo_arabic.data.text import has_lone_surrogate, visible
from cpo_arabic.errors import DataError

Item = Row | BadRow

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OPTIONS = ("config", "split", "revision")


@dataclass(frozen=True)
class Part:
    """One file, folder or hub split of a source: its name in messages, and its rows."""

    name: str
    rows: Callable[[], Iterator[Item]]
    path: Path | None = None  # None where the hub holds it


def open_source(source: str) -> list[Part]:
    """Find what a source names; a source that names nothing is refused."""
    path = Path(source).expanduser()
    if path.is_dir():
        return [_folder(path, {})]
    if path.exists():
        return [_file(path)]
    if glob.has_magic(source) and "?" not in source:
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  (absolute too)
        if not matches:
            raise DataError(f"{visible(source)}: the pattern matches no file.")
        return [_file(Path(match)) for match in matches if Path(match).is_file()]
    name, options = _options(source)
    if options and Path(name).is_dir():
        return [_folder(Path(name), options)]
    if name.startswith("hf://") or _looks_like_hub_name(name):
        return [_hub(name.removeprefix("hf://").removeprefix("datasets/"), options)]
    raise DataError(_missing(Path(name)))


def _options(source: str) -> tuple[str, dict[str, str]]:
    """Take ``?config=…&split=…`` off a source."""
    name, _, query = source.partition("?")
    options = {key: values[-1] for key, values in parse_qs(query).items()}
    for key in options:
        if key not in _OPTIONS:
            raise DataError(
                f'{visible(source)}: unknown option "{visible(key)}"; there are '
                f"{', '.join(_OPTIONS)}."
            )
    return name, options


def _looks_like_hub_name(name: str) -> bool:
    """``owner/name`` that is no file suffix and whose owner is no folder here."""
    path = Path(name)
    known = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *COMPRESSIONS, ".txt")
    return (
        _HUB_NAME.fullmatch(name) is not None
        and path.suffix.lower() not in known
        and not path.parent.is_dir()
        and path.parts[0] != "data"
    )


def _missing(path: Path) -> str:
    """Say that a file is missing, and what lies near it."""
    message = f"{visible(str(path), 300)}: no such file."
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f" Did you mean {visible(str(path.parent / close[0]), 300)}?" if close else ""
    else:
        hint = f" The folder {visible(str(path.parent), 300)} does not exist either."
    return f"{message}{hint} Relative paths start at {Path.cwd()}."


# --- files --------------------------------------------------------------------------------------


def _file(path: Path) -> Part:
    if not path.is_file():
        raise DataError(f"{visible(str(path))}: not a regular file.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    readers: dict[str, Callable[[IO[bytes]], Iterator[Item]]] = {
        **dict.fromkeys(JSON_SUFFIXES, _json_rows),
        ".csv": lambda stream: _csv_rows(stream, ","),
        ".tsv": lambda stream: _csv_rows(stream, "\t"),
        ".parquet": _parquet_rows,
        ".arrow": _arrow_rows,
    }
    if kind not in readers:
        known = " ".join((*readers, *COMPRESSIONS))
        raise DataError(f"{visible(str(path))}: unknown kind of file; known suffixes are {known}.")

    def rows() -> Iterator[Item]:
        try:
            with _open(path, compression) as stream:
                yield from readers[kind](stream)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{visible(str(path))}: cannot be read: {error}") from error

    return Part(visible(str(path), 300), rows, path)


def _open(path: Path, compression: str) -> IO[bytes]:
    """Open for reading, decompressing as the suffix says."""
    openers: dict[str, Callable[[Path], Any]] = {
        "": lambda file: file.open("rb"),
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    if compression in openers:
        return cast("IO[bytes]", openers[compression](path))
    import pyarrow as pa

    codec = {".zst": "zstd", ".lz4": "lz4"}[compression]
    stream = pa.input_stream(str(path), compression=codec)
    return io.BufferedReader(cast("Any", stream))


def _json_rows(stream: IO[bytes]) -> Iterator[Item]:
    yield from JsonStream(stream, MAX_ROW_BYTES)


def _csv_rows(stream: IO[bytes], delimiter: str) -> Iterator[Item]:
    """Rows of a table with a header; an empty cell is a null, a JSON list in a cell is a list."""
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(_bounded(text), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            yield BadRow(1, "a column name stands twice in the header", fatal=True)
            return
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _csv_row(line, header, cells)
            line = reader.line_num + 1
    except _LongLineError:
        size = MAX_ROW_BYTES // 2**20
        yield BadRow(reader.line_num + 1, f"a row of more than {size} MiB: split it", fatal=True)
    except csv.Error as error:
        yield BadRow(reader.line_num, f"not CSV: {error}", fatal=True)
    finally:
        text.detach()  # the stream is its opener's to close


class _LongLineError(Exception):
    """A line that would not fit into memory's share."""


def _bounded(text: io.TextIOWrapper) -> Iterator[str]:
    """Lines, none of which is held whole where it would not fit."""
    while line := text.readline(MAX_ROW_BYTES):
        if len(line) == MAX_ROW_BYTES:
            raise _LongLineError
        yield line


def _csv_row(line: int, header: list[str], cells: list[str]) -> Item:
    if len(cells) != len(header):
        return BadRow(line, f"{len(cells)} cells under {len(header)} columns")
    if any(has_lone_surrogate(cell) for cell in cells):
        return BadRow(line, "bytes that are not UTF-8")
    return Row(line, {name: _cell(cell) for name, cell in zip(header, cells, strict=True)})


def _cell(cell: str) -> Any:
    if not cell:
        return None
    if cell.startswith("[") and cell.endswith("]"):
        try:
            value = json.loads(cell)
        except ValueError:
            return cell
        if all(isinstance(item, str | dict | list) for item in value):
            return value
    return cell


def _parquet_rows(stream: IO[bytes]) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from _batches(pq.ParquetFile(stream).iter_batches(batch_size=1024))
    except pa.ArrowInvalid as error:
        yield BadRow(1, f"not Parquet: {error}", fatal=True)


def _arrow_rows(stream: IO[bytes]) -> Iterator[Item]:
    """Rows of an Arrow file or stream (`datasets` writes streams)."""
    import pyarrow as pa

    try:
        try:
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        except pa.ArrowInvalid:
            stream.seek(0)
            batches = iter(pa.ipc.open_stream(stream))
        yield from _batches(batches)
    except pa.ArrowInvalid as error:
        yield BadRow(1, f"not Arrow: {error}", fatal=True)


def _batches(batches: Iterator[Any]) -> Iterator[Item]:
    line = 1
    for batch in batches:
        for values in batch.to_pylist():
            yield Row(line, values)
            line += 1


# --- folders and the hub ------------------------------------------------------------------------


def _folder(path: Path, options: dict[str, str]) -> Part:
    name = visible(str(path), 300)
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    load = (lambda: _load_saved(path, options)) if saved else (lambda: _load(str(path), options))
    return Part(name, lambda: _dataset_rows(name, load), path)


def _hub(name: str, options: dict[str, str]) -> Part:
    shown = visible(name, 300)
    return Part(shown, lambda: _dataset_rows(shown, lambda: _load(name, options)))


def _load_saved(path: Path, options: dict[str, str]) -> Any:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if not isinstance(dataset, DatasetDict):
        return dataset
    split = options.get("split", "train")
    if split not in dataset:
        raise ValueError(f'no split "{split}"; there are {", ".join(dataset)}: write ?split=…')
    return dataset[split]


def _load(name: str, options: dict[str, str]) -> Any:
    from datasets import load_dataset

    return load_dataset(
        name,
        options.get("config"),
        split=options.get("split", "train"),
        revision=options.get("revision"),
    )


def _dataset_rows(name: str, load: Callable[[], Any]) -> Iterator[Item]:
    try:
        dataset = load()
    except Exception as error:
        raise DataError(f"{name}: `datasets` cannot load it: {error}") from error
    for line, values in enumerate(dataset, start=1):
        yield Row(line, values)
