r"""JSON objects out of a byte stream, strictly, with the line each one starts on.

One object a line (JSONL), objects spread over several lines, objects one after another, and one
array of objects are all read, with memory bounded by the longest row. Lines end at ``\n`` alone:
U+2028, U+0085 and VT inside a string are text. Refused: bytes that are not UTF-8, lone surrogates,
``NaN``, numbers beyond float64, duplicate keys, truncated objects, rows over ``MAX_ROW_BYTES``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from cpo_arabic.data.text import has_lone_surrogate, visible

MAX_ROW_BYTES = 64 * 1024 * 1024
BLOCK_BYTES = 1024 * 1024

_BLANK = re.compile(r"[ \t\r\n]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read: the line it starts on, why, and whether reading stops there."""

    line: int
    reason: str
    fatal: bool = False


@dataclass(frozen=True)
class Row:
    """One object and the line it starts on."""

    line: int
    values: dict[str, Any]


class _RefusedError(ValueError):
    """Valid JSON grammar, but a value that no row may hold."""


def _constant(name: str) -> float:
    raise _RefusedError(f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _RefusedError(f"the number {digits[:40]} is beyond float64")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RefusedError(f'the key "{visible(twice)}" stands twice')
    return values


def _decoder(strict: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, strict=strict
    )


_STRICT = _decoder(strict=True)
_LENIENT = _decoder(strict=False)  # raw control characters inside a string, VT for one


class _IncompleteError(Exception):
    """The text ends before the value does."""


def _decode(text: str, start: int) -> tuple[Any, int]:
    """Decode one value at ``start``; say whether a failure may be cured by more text."""
    try:
        value, end = _STRICT.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Invalid control character") and text[error.pos] not in "\r\n":
            return _decode_lenient(text, start)
        raise _classified(error, text) from None
    if _SURROGATE_ESCAPE.search(text, start, end) and _any_surrogate(value):
        raise _RefusedError("a lone surrogate (\\ud800-\\udfff without its partner) is not text")
    return value, end


def _decode_lenient(text: str, start: int) -> tuple[Any, int]:
    """Decode an object that holds raw control characters, as long as it stays on its line."""
    line_end = text.find("\n", start)
    line = text[start : line_end if line_end >= 0 else len(text)]
    try:
        value, end = _LENIENT.raw_decode(line)
    except json.JSONDecodeError as error:
        raise _RefusedError(f"not JSON: {error.msg}") from None
    if _any_surrogate(value):
        raise _RefusedError("a lone surrogate (\\ud800-\\udfff without its partner) is not text")
    return value, start + end


def _classified(error: json.JSONDecodeError, text: str) -> Exception:
    """Tell a value that stops at the end of the text from one that is broken."""
    tail = len(text) - error.pos
    # A string is reported at its opening quote; it can only run to the end of the text.
    if error.msg.startswith("Unterminated string") or tail <= 10:
        return _IncompleteError(error.msg)
    lines = text.count("\n", 0, error.pos)
    if error.msg.startswith("Invalid control character"):
        return _RefusedError("cut off, or not JSON: a string is not closed on its line")
    where = f" ({lines} lines below)" if lines else ""
    return _RefusedError(f"cut off, or not JSON: {error.msg}{where}")


def _any_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return has_lone_surrogate(value)
    if isinstance(value, dict):
        return any(_any_surrogate(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(_any_surrogate(item) for item in value)


class _Blocks:
    """Text in pieces that end where a line ends, with bad lines taken out and reported."""

    def __init__(self, stream: IO[bytes], max_row_bytes: int) -> None:
        self._stream = stream
        self._limit = max_row_bytes
        self._line = 1
        self.bad: list[BadRow] = []

    def next(self) -> str:
        """The next piece; an empty one at the end of the file."""
        data = self._stream.read(BLOCK_BYTES)
        if data and not data.endswith(b"\n"):
            data += self._stream.readline(self._limit + 1)
        if self._line == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            cut = len(data) > self._limit and not data.endswith(b"\n")
            text = data.decode("utf-8", "ignore") if cut else self._line_by_line(data)
        self._line += data.count(b"\n")
        return text

    def _line_by_line(self, data: bytes) -> str:
        """Keep the lines that are UTF-8; a bad one becomes an empty line, so numbers stay."""
        kept = []
        for offset, line in enumerate(data.split(b"\n")):
            try:
                kept.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                where = self._line + offset
                byte = line[error.start]
                reason = f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8"
                self.bad.append(BadRow(where, reason))
                kept.append("")
        return "\n".join(kept)


class JsonStream:
    """Iterate over the rows of a byte stream; a bad row is an item too, and reading goes on."""

    def __init__(self, stream: IO[bytes], max_row_bytes: int = MAX_ROW_BYTES) -> None:
        self._blocks = _Blocks(stream, max_row_bytes)
        self._limit = max_row_bytes
        self._text = ""
        self._start = 0  # of what is not yet decoded
        self._line = 1  # of that place
        self._ended = False

    def __iter__(self) -> Iterator[Row | BadRow]:
        in_array = self._skip_blank() == "["
        if in_array:
            self._advance(self._start + 1)
        while first := self._skip_blank():
            yield from self._drain_bad()
            if in_array and first == ",":
                self._advance(self._start + 1)
            elif in_array and first == "]":
                self._advance(self._start + 1)
                in_array = False
            else:
                row = self._row()
                yield row
                if isinstance(row, BadRow) and row.fatal:
                    return
        yield from self._drain_bad()
        if in_array:
            yield BadRow(self._line, "the file ends before its array is closed by ]")

    def _drain_bad(self) -> Iterator[BadRow]:
        while self._blocks.bad:
            yield self._blocks.bad.pop(0)

    def _overlong(self) -> bool:
        return len(self._text) - self._start > self._limit

    def _advance(self, to: int) -> None:
        self._line += self._text.count("\n", self._start, to)
        self._start = to

    def _more(self) -> bool:
        """Read on; what has been decoded is let go."""
        piece = self._blocks.next()
        self._text = self._text[self._start :] + piece
        self._start = 0
        self._ended = not piece
        return not self._ended

    def _skip_blank(self) -> str:
        """Go to the next character that means something, and give it; "" at the end."""
        while True:
            match = _BLANK.match(self._text, self._start)
            assert match is not None
            self._advance(match.end())
            if self._start < len(self._text):
                return self._text[self._start]
            if self._ended or not self._more():
                return ""

    def _row(self) -> Row | BadRow:
        """One object, reading on while it is incomplete."""
        line = self._line
        while True:
            try:
                value, end = _decode(self._text, self._start)
            except _IncompleteError as problem:
                if self._overlong():
                    size = self._limit // 2**20
                    return BadRow(line, f"a row of more than {size} MiB: split it", fatal=True)
                if self._ended:
                    return self._bad(line, f"cut off, or not JSON: {problem}")
                self._grow()
            except RecursionError:
                return self._bad(line, "nested too deep")
            except ValueError as problem:
                return self._bad(line, str(problem))
            else:
                if not isinstance(value, dict):
                    kind = type(value).__name__
                    return self._bad(line, f"a row must be a JSON object, not a {kind}")
                self._advance(end)
                return Row(line, value)

    def _grow(self) -> None:
        """Double what is held, so that a long row is decoded a few times and not thousands."""
        wanted = 2 * (len(self._text) - self._start)
        while len(self._text) - self._start < wanted and self._more():
            pass

    def _bad(self, line: int, reason: str) -> BadRow:
        """Report, and go to the next line that opens an object or closes the array."""
        while self._next_line():
            if self._skip_blank() in ("{", "]", ""):
                break
        return BadRow(line, reason)

    def _next_line(self) -> bool:
        """Go behind the next line end; False where there is none."""
        while (at := self._text.find("\n", self._start)) < 0:
            if self._ended or not self._more():
                self._advance(len(self._text))
                return False
        self._advance(at + 1)
        return True
