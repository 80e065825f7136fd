"""Hard negatives by search: good answers to other prompts, or a model's own answers.

(N) rows  (C) distinct candidate texts  (D) embedding

What is mined never equals, or nearly equals, the chosen text, and never answers the same prompt.
The result is a JSONL file that a person can read and edit; it is used again as long as the rows and
the way of mining are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpo_arabic.data.records import PreferenceRecord
from cpo_arabic.data.text import canonical
from cpo_arabic.errors import DataError
from cpo_arabic.files import write_whole

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
Generate = Callable[[Sequence[PreferenceRecord]], list[str]]
Ranking = Iterator[list[tuple[int, float]]]

NEAR = 0.8
"""Share of common words (Jaccard) from which a text counts as nearly the chosen one."""
BLOCK = 1024


@dataclass(frozen=True)
class Mined:
    """A hard negative and how hard its miner holds it to be."""

    text: str
    score: float
    source: str  # place of the row whose chosen text it is, or the model


def search_semantic(
    records: Sequence[PreferenceRecord], embed: Embed, *, per_row: int
) -> list[list[Mined]]:
    """The answers of other prompts closest in meaning to each prompt: exact search, by blocks.

    Args:
        records: rows.
        embed: texts → (n, D) unit vectors.
        per_row: most negatives a row gets, the hardest first.
    """
    candidates = _candidates(records)
    keys = embed([record.chosen for record in candidates])

    def ranking() -> Ranking:
        for start in range(0, len(records), BLOCK):
            queries = embed([r.prompt_text for r in records[start : start + BLOCK]])
            yield from _top(queries @ keys.T, 4 * per_row + 8)

    return _kept(records, candidates, ranking(), per_row)


def search_bm25(records: Sequence[PreferenceRecord], *, per_row: int) -> list[list[Mined]]:
    """The answers of other prompts that share the most telling words with each prompt.

    Raises:
        DataError: the package bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise DataError(
            "data.hard_negative_strategy: bm25 needs bm25s; install it with "
            "pip install 'cpo-arabic[mining]', or use semantic_search"
        ) from error
    candidates = _candidates(records)
    index = bm25s.BM25()
    index.index([_words(r.chosen) for r in candidates], show_progress=False)
    count = min(4 * per_row + 8, len(candidates))
    found, scores = index.retrieve(
        [_words(r.prompt_text) or [""] for r in records], k=count, show_progress=False
    )
    ranking = (
        [(int(i), float(s)) for i, s in zip(row, row_scores, strict=True) if s > 0]
        for row, row_scores in zip(found, scores, strict=True)
    )
    return _kept(records, candidates, ranking, per_row)


def own_answers(
    records: Sequence[PreferenceRecord], generate: Generate, *, per_row: int, source: str
) -> list[list[Mined]]:
    """A model's own samples as negatives (on-policy); blank or nearly right ones are left out."""
    mined: list[list[Mined]] = [[] for _ in records]
    for _ in range(per_row):
        for row, text in enumerate(generate(records)):
            taken = {canonical(found.text) for found in mined[row]}
            fresh = bool(text.strip()) and canonical(text) not in taken
            if fresh and not _near(text, records[row].chosen):
                mined[row].append(Mined(text, 1.0, source))
    return mined


def with_mined(
    records: Sequence[PreferenceRecord], mined: Sequence[Sequence[Mined]]
) -> list[PreferenceRecord]:
    """Adds what was mined behind each row's own hard negatives, hardest first, none twice."""
    joined = []
    for record, found in zip(records, mined, strict=True):
        known = {canonical(text) for text in record.completions}
        new = tuple(m.text for m in found if canonical(m.text) not in known)
        joined.append(replace(record, hard_negatives=(*record.hard_negatives, *new)))
    return joined


def cached(
    records: Sequence[PreferenceRecord],
    how: Sequence[Any],
    folder: Path,
    mine: Callable[[], list[list[Mined]]],
) -> tuple[list[list[Mined]], Path]:
    """Mines once for the same rows and way of mining; an edited file counts as it stands.

    Raises:
        DataError: the file was edited into something that does not fit the rows.
    """
    digest = blake2b(repr(tuple(how)).encode(), digest_size=8)
    for record in records:
        digest.update(repr((record.turns, record.chosen)).encode("utf-8", "surrogatepass"))
    path = folder / f"mined-{digest.hexdigest()}.jsonl"
    if path.exists():
        return _read(path, len(records)), path
    mined = mine()
    folder.mkdir(parents=True, exist_ok=True)
    lines = (
        {
            "prompt": record.prompt_text,
            "chosen": record.chosen,
            "mined": [{"text": m.text, "score": m.score, "source": m.source} for m in found],
        }
        for record, found in zip(records, mined, strict=True)
    )
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return mined, path


def _read(path: Path, rows: int) -> list[list[Mined]]:
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if len(lines) != rows:
        raise DataError(f"{path} has {len(lines)} lines for {rows} rows; delete it to mine anew")
    mined = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)["mined"]
            mined.append([Mined(m["text"], float(m["score"]), m["source"]) for m in found])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a mined row; delete the file to mine anew"
            ) from error
    return mined


def _candidates(records: Sequence[PreferenceRecord]) -> list[PreferenceRecord]:
    """One row for each distinct chosen text."""
    return list({canonical(record.chosen): record for record in records}.values())


def _top(scores: NDArray[np.float32], count: int) -> Ranking:
    count = min(count, scores.shape[1])
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    for row, columns in zip(scores, best, strict=True):
        ordered = sorted(columns.tolist(), key=lambda c: (-row[c], c))
        yield [(int(c), float(row[c])) for c in ordered]


def _kept(
    records: Sequence[PreferenceRecord],
    candidates: Sequence[PreferenceRecord],
    ranking: Iterator[list[tuple[int, float]]],
    per_row: int,
) -> list[list[Mined]]:
    mined = []
    for record, ranked in zip(records, ranking, strict=True):
        found: list[Mined] = []
        for index, score in ranked:
            other = candidates[index]
            if other.prompt_key != record.prompt_key and not _near(other.chosen, record.chosen):
                found.append(Mined(other.chosen, score, other.place))
            if len(found) == per_row:
                break
        mined.append(found)
    return mined


def _near(text: str, chosen: str) -> bool:
    """Equal, or nearly so by shared words."""
    a, b = set(_words(text)), set(_words(chosen))
    return canonical(text) == canonical(chosen) or (len(a & b) >= NEAR * len(a | b) > 0)


def _words(text: str) -> list[str]:
    return [word.strip("،؛؟.,!:«»()\"'") for word in canonical(text).split()]
