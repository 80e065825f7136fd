"""Byte-pair ranks, as tiktoken files hold them, and the merges that made them.

A tiktoken file lists tokens by rank and leaves the merges implicit; byte-level vocabularies list
the merges. A token's own merge is what byte-pair encoding of its bytes does last, with only the
merges that came before it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from cpo_arabic.errors import DataError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How every Qwen tokenizer cuts a text into words, after NFC."""

Ranks = Mapping[bytes, int]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a tiktoken file: one base64 token and its rank a line.

    Raises:
        DataError: a line that is no such pair, or a token named twice.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            key, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{path}:{number}: {line[:40]!r} is not a base64 token and its rank"
            ) from error
        if key in ranks:
            raise DataError(f"{path}:{number}: token {key!r} has rank {ranks[key]} and {value}")
        ranks[key] = value
    return ranks


def bpe(ranks: Ranks, word: bytes, below: int | None = None) -> list[bytes]:
    """Splits ``word`` by byte-pair encoding, using only merges of a rank under ``below``."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        candidates = [
            (ranks[parts[i] + parts[i + 1]], i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in ranks
        ]
        if not candidates:
            break
        rank, i = min(candidates)
        if below is not None and rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merge_pair(ranks: Ranks, token: bytes) -> tuple[bytes, bytes]:
    """The two parts whose merge made ``token``.

    Raises:
        DataError: the ranks under its own do not lead to it.
    """
    parts = bpe(ranks, token, below=ranks[token])
    if len(parts) != 2:
        raise DataError(f"token {token!r} is not the merge of two tokens but of {len(parts)}")
    return parts[0], parts[1]


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    table.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return table


def byte_level(ranks: Ranks) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of a byte-level tokenizer whose ids are the ranks.

    Raises:
        DataError: the ranks are not 0, 1, 2, …, a single byte is missing, or a token is no merge.
    """
    order = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in order] != list(range(len(order))):
        raise DataError("the ranks are not 0, 1, 2, … without a gap, so they cannot be ids")
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise DataError(f"byte 0x{absent[0]:02x} has no token, so not every text can be encoded")
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {spell(token): ranks[token] for token in order}
    pairs = (merge_pair(ranks, token) for token in order if len(token) > 1)
    return vocabulary, [(spell(left), spell(right)) for left, right in pairs]
