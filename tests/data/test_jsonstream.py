"""Rows out of bytes: what is accepted, what is refused, and on which line."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_arabic.data.jsonstream import BadRow, JsonStream, Row


def read(data: bytes, limit: int = 1 << 20) -> list[Row | BadRow]:
    return list(JsonStream(io.BytesIO(data), limit))


def values(data: bytes) -> list[dict[str, object]]:
    rows = read(data)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def test_bom_crlf_and_a_missing_final_newline_change_no_row() -> None:
    plain = '{"a": "ألف"}\n{"a": "باء"}\n'.encode()
    expected = values(plain)
    assert len(expected) == 2
    assert values(b"\xef\xbb\xbf" + plain) == expected
    assert values(plain.replace(b"\n", b"\r\n")) == expected
    assert values(plain.removesuffix(b"\n")) == expected
    assert values(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n").removesuffix(b"\r\n")) == expected


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001c"])
def test_unicode_line_separators_inside_a_string_are_text(separator: str) -> None:
    raw = f'{{"a": "x{separator}y"}}\n{{"a": "z"}}\n'.encode()
    assert [row["a"] for row in values(raw)] == [f"x{separator}y", "z"]
    assert len(raw.decode().splitlines()) > 2, "the naive reader is caught by this very file"


def test_objects_over_several_lines_carry_the_line_they_start_on() -> None:
    text = '\n{\n  "a": 1,\n  "b": [\n    "س"\n  ]\n}\n\n{"a": 2}\n{\n"a": 3}'
    rows = read(text.encode())
    assert [(row.line, row.values["a"]) for row in rows if isinstance(row, Row)] == [
        (2, 1),
        (9, 2),
        (10, 3),
    ]


def test_an_array_is_read_like_its_objects() -> None:
    rows = [{"a": number, "b": {"c": [number]}} for number in range(5)]
    for indent in (None, 2):
        assert values(json.dumps(rows, indent=indent).encode()) == rows


def test_an_array_that_is_not_closed_is_reported() -> None:
    *rows, last = read(b'[{"a": 1},\n{"a": 2}')
    assert len(rows) == 2
    assert isinstance(last, BadRow)
    assert "closed" in last.reason


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e400}', "float64"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": {"b": 1, "b": 1}}', "twice"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"a": "x', "cut off"),
        ('{"a": 1,', "cut off"),
        ('{"a"', "cut off"),
        ("[1]", "object"),
        ('"text"', "object"),
        ("{'a': 1}", "not JSON"),
        ('{"a": ' + "[" * 100_000 + "}", "nested"),
        ('{"a": ' + "9" * 5000 + "}", "digit"),
    ],
)
def test_a_value_no_row_may_hold_is_refused(text: str, word: str) -> None:
    rows = read(b'{"a": 0}\n' + text.encode() + b'\n{"a": 3}\n')
    bad = next(row for row in rows if isinstance(row, BadRow))
    assert bad.line == 2
    assert word in bad.reason


def test_reading_goes_on_behind_a_bad_line() -> None:
    rows = read(b'{"a": 1}\n{"a": "cut\n{"a": 3}\nrubbish\n{"a": 5}\n')
    assert [type(row) for row in rows] == [Row, BadRow, Row, BadRow, Row]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]


def test_a_line_that_is_not_utf8_is_reported_by_itself() -> None:
    rows = read(b'{"a": 1}\n{"a": "\xd8"}\n{"a": 3}\n')
    assert [row.line for row in rows if isinstance(row, Row)] == [1, 3]
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.line for row in bad] == [2]
    assert "UTF-8" in bad[0].reason


def test_an_escaped_surrogate_pair_is_one_character() -> None:
    assert values(b'{"a": "\\ud83d\\ude00"}') == [{"a": "😀"}]


def test_an_endless_line_is_refused_with_bounded_memory() -> None:
    class Endless(io.RawIOBase):
        def __init__(self) -> None:
            self.given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            head = b'{"a": "' if not self.given else b""
            buffer[:] = (head + b"x" * len(buffer))[: len(buffer)]
            self.given += len(buffer)
            assert self.given < 1 << 30, "read a gigabyte of one line"
            return len(buffer)

    tracemalloc.start()
    stream = io.BufferedReader(Endless(), 1 << 16)
    rows = list(JsonStream(stream, 4 << 20))  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(rows[-1], BadRow)
    assert rows[-1].fatal
    assert "MiB" in rows[-1].reason
    assert peak < 80 << 20


_text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
_rows = st.lists(
    st.dictionaries(_text, _text | st.lists(_text, max_size=3), max_size=4), max_size=8
)


@settings(max_examples=300, deadline=None)
@given(_rows, st.sampled_from([None, 2]), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_any_rows_come_back_as_written(
    rows: list[dict[str, object]], indent: int | None, ascii_only: bool, end: str
) -> None:
    texts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    assert values(end.join(texts).encode()) == rows
