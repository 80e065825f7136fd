"""Token ids in Arrow: written batch by batch, read row by row without a copy.

The same layout serves memory and disk. From disk it is memory-mapped, so a data set larger than
memory costs what its rows at hand cost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cpo_arabic.data.encoding import EncodedRow

_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("prompt_ids", _IDS),
        ("completion_ids", pa.list_(_IDS)),
        ("completion_keys", pa.list_(pa.int64())),
        ("completion_tokens", _IDS),  # before the cut
        ("prompt_key", pa.int64()),
        ("easy", pa.int32()),
        ("prompt_tokens", pa.int32()),  # before the cut
        ("source", pa.string()),
        ("line", pa.int64()),
    ]
)

SMALL = ("prompt_key", "easy", "prompt_tokens", "completion_tokens")
"""What is looked at for all rows at once; a sixtieth of the whole."""


def to_batch(rows: Sequence[EncodedRow], places: Sequence[tuple[str, int]]) -> pa.RecordBatch:
    """Lay encoded rows out as one Arrow batch."""
    columns = {
        name: [getattr(row, name) for row in rows]
        for name in SCHEMA.names
        if name not in ("source", "line")
    }
    columns["source"] = [source for source, _ in places]
    columns["line"] = [line for _, line in places]
    arrays = [pa.array(columns[field.name], type=field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def write_batches(batches: Iterable[pa.RecordBatch], path: Path) -> None:
    """Write an Arrow file, one batch in memory at a time, and its small columns beside it."""
    small = pa.schema([SCHEMA.field(name) for name in SMALL])
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        pa.OSFile(str(_beside(path)), "wb") as small_sink,
        pa.ipc.new_file(small_sink, small) as small_writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
            small_writer.write_batch(batch.select(list(SMALL)))


def _beside(path: Path) -> Path:
    return path.with_suffix(".small.arrow")


class _Chunk:
    """One Arrow batch as numpy views."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.prompts = _lists(batch["prompt_ids"])
        completions = batch["completion_ids"]
        self.completions_of = completions.offsets.to_numpy()
        self.completions = _lists(completions.values)
        self.completion_keys = batch["completion_keys"].values.to_numpy()
        self.completion_tokens = batch["completion_tokens"].values.to_numpy()

    def span(self, row: int) -> tuple[int, int]:
        """Where a row's completions lie among the chunk's."""
        return int(self.completions_of[row]), int(self.completions_of[row + 1])


def _lists(array: Any) -> tuple[Any, Any]:
    return array.offsets.to_numpy(), array.values.to_numpy()


def _item(lists: tuple[Any, Any], index: int) -> list[int]:
    offsets, values = lists
    ids: list[int] = values[offsets[index] : offsets[index + 1]].tolist()
    return ids


class TokenStore:
    """Encoded rows by number.

    ``small`` are the batches with what is looked at for all rows (`SMALL`); ``load`` gives a whole
    batch by its number, once a row of it is wanted.
    """

    def __init__(
        self, small: Sequence[pa.RecordBatch], load: Callable[[int], pa.RecordBatch] | None = None
    ) -> None:
        self._load = load or small.__getitem__
        self._chunks: dict[int, _Chunk] = {}
        self._starts = [0, *np.cumsum([batch.num_rows for batch in small]).tolist()]
        self._path: Path | None = None
        self.prompt_keys = _joined([batch["prompt_key"] for batch in small])
        self.easy_counts = _joined([batch["easy"] for batch in small])
        self.prompt_tokens = _joined([batch["prompt_tokens"] for batch in small])
        self.candidate_counts = _joined(
            [batch["completion_tokens"].value_lengths() for batch in small]
        )

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Memory-map an Arrow file. The small columns come from beside it: no page is touched."""
        with pa.OSFile(str(_beside(path))) as stream:
            file = pa.ipc.open_file(stream)
            small = [file.get_batch(index) for index in range(file.num_record_batches)]
        store = cls(small, pa.ipc.open_file(pa.memory_map(str(path))).get_batch)
        store._path = path
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the same file; what is in memory is copied."""
        if self._path is not None:
            return TokenStore.open, (self._path,)
        return TokenStore, ([self._load(index) for index in range(len(self._starts) - 1)],)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, row: int) -> tuple[_Chunk, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        index = bisect_right(self._starts, row) - 1
        if index not in self._chunks:
            self._chunks[index] = _Chunk(self._load(index))
        return self._chunks[index], row - self._starts[index]

    def prompt_ids(self, row: int) -> list[int]:
        """The prompt's tokens."""
        chunk, index = self._find(row)
        return _item(chunk.prompts, index)

    def completion_ids(self, row: int, candidate: int) -> list[int]:
        """One completion's tokens."""
        chunk, index = self._find(row)
        return _item(chunk.completions, chunk.span(index)[0] + candidate)

    def completion_keys(self, row: int) -> list[int]:
        """The hashes of a row's completions."""
        chunk, index = self._find(row)
        first, last = chunk.span(index)
        keys: list[int] = chunk.completion_keys[first:last].tolist()
        return keys

    def lengths(self, row: int) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each completion, as kept."""
        chunk, index = self._find(row)
        first, last = chunk.span(index)
        prompt, completion = chunk.prompts[0], chunk.completions[0]
        kept: list[int] = np.diff(completion[first : last + 1]).tolist()
        return int(prompt[index + 1] - prompt[index]), kept

    def lengths_before(self, row: int) -> tuple[int, list[int]]:
        """The same before the budgets cut."""
        chunk, index = self._find(row)
        first, last = chunk.span(index)
        before: list[int] = chunk.completion_tokens[first:last].tolist()
        return int(self.prompt_tokens[row]), before

    def place(self, row: int) -> str:
        """File and line of a row, for messages."""
        chunk, index = self._find(row)
        return f"{chunk.batch['source'][index].as_py()}:{chunk.batch['line'][index].as_py()}"


def _joined(columns: Sequence[Any]) -> Any:
    return np.concatenate([np.zeros(0, np.int32), *(column.to_numpy() for column in columns)])
