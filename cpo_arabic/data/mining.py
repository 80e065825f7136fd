"""Hard negatives by search: good answers to other prompts, or a model's own answers.

(N) rows  (C) distinct candidate texts  (D) embedding  (Q) queries of a block  (k) best of each

What is mined never equals, or nearly equals, a chosen text of the same prompt, be it of another
row.
The result is a JSONL file that a person can read and edit; it is used again as long as the rows and
the way of mining are the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
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
Search = Callable[[NDArray[np.float32], NDArray[np.float32], int], NDArray[np.int64]]
Generate = Callable[[Sequence[PreferenceRecord], int], list[str]]
Progress = Callable[[int, int], None]
Ranking = Iterator[list[tuple[int, float]]]

NEAR = 0.8
"""Share of common words (Jaccard) from which a text counts as nearly the chosen one."""
TEXTS = 256
"""Texts that are embedded, and queries that are searched for, at a time."""
KEYS = 16_384
"""Candidates that a block of queries meets at a time: their scores are 16 MiB."""


@dataclass(frozen=True)
class Mined:
    """A hard negative and how hard its miner holds it to be."""

    text: str
    score: float
    source: str  # place of the row whose chosen text it is, or the model


def silent(done: int, total: int) -> None:
    """Progress that nobody is told."""


def search_semantic(
    records: Sequence[PreferenceRecord],
    embed: Embed,
    *,
    per_row: int,
    progress: Progress = silent,
) -> list[list[Mined]]:
    """The answers of other prompts closest in meaning to each prompt: exact search, by blocks.

    Held at a time are the candidates' embeddings, (C, D) float32, and one block of scores.

    Args:
        records: rows.
        embed: texts → (n, D) unit vectors.
        per_row: most negatives a row gets, the hardest first.
        progress: told the texts embedded, of all.
    """
    candidates = _candidates(records)
    prompts = [record.prompt_text for record in records]
    chosen = [record.chosen for record in candidates]
    total, search = len(chosen) + len(prompts), nearest_search()
    keys = np.empty((0, 0), np.float32)
    for start in range(0, len(chosen), TEXTS):
        block = embed(chosen[start : start + TEXTS])
        if start == 0:
            keys = np.empty((len(chosen), block.shape[1]), np.float32)
        keys[start : start + TEXTS] = block
        progress(min(start + TEXTS, len(chosen)), total)

    def ranking() -> Ranking:
        for start in range(0, len(prompts), TEXTS):
            queries = embed(prompts[start : start + TEXTS])
            yield from _ranked(queries, keys, search, 4 * per_row + 8)
            progress(min(len(chosen) + start + TEXTS, total), total)

    return _kept(records, candidates, ranking(), per_row)


def nearest_search() -> Search:
    """FAISS's exact search where it is installed, else numpy's by blocks: they find the same."""
    try:
        from faiss import METRIC_INNER_PRODUCT, knn
    except ImportError:
        return nearest_by_blocks

    def nearest(
        queries: NDArray[np.float32], keys: NDArray[np.float32], count: int
    ) -> NDArray[np.int64]:
        found: NDArray[np.int64] = knn(queries, keys, count, metric=METRIC_INNER_PRODUCT)[1]
        return found

    return nearest


def nearest_by_blocks(
    queries: NDArray[np.float32], keys: NDArray[np.float32], count: int
) -> NDArray[np.int64]:
    """(Q, k) numbers of the keys with the greatest inner products, in no order.

    Args:
        queries: (Q, D).
        keys: (C, D), met ``KEYS`` at a time.
        count: k, no more than C.
    """
    best = np.empty((len(queries), 0), np.float32)
    found = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(keys), KEYS):
        scores = queries @ keys[start : start + KEYS].T
        numbers = np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)
        best, found = np.hstack([best, scores]), np.hstack([found, numbers])
        if best.shape[1] > count:
            kept = np.argpartition(best, -count, axis=1)[:, -count:]
            best = np.take_along_axis(best, kept, axis=1)
            found = np.take_along_axis(found, kept, axis=1)
    return found


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
    """A model's own samples as negatives (on-policy); blank or nearly right ones are left out.

    Args:
        records: rows.
        generate: rows, attempt → one sample for each; another attempt gives others.
        per_row: attempts.
        source: what the negatives' origin is called.
    """
    mined: list[list[Mined]] = [[] for _ in records]
    right = _right_answers(records)
    for attempt in range(per_row):
        answers = generate(records, attempt)
        for record, found, text in zip(records, mined, answers, strict=True):
            taken = {canonical(m.text) for m in found}
            fresh = bool(text.strip()) and canonical(text) not in taken
            if fresh and not _near(text, right[record.prompt_key]):
                found.append(Mined(text, 1.0, source))
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


def _right_answers(records: Sequence[PreferenceRecord]) -> dict[int, list[str]]:
    """Every chosen text of each prompt."""
    right: dict[int, list[str]] = defaultdict(list)
    for record in records:
        right[record.prompt_key].append(record.chosen)
    return right


def _ranked(
    queries: NDArray[np.float32], keys: NDArray[np.float32], search: Search, count: int
) -> Ranking:
    """The nearest keys of each query with their scores, the nearest first.

    Scores are computed anew in float64, so that equal embeddings tie whatever found them; the
    earlier candidate then comes first.
    """
    for query, found in zip(queries, search(queries, keys, min(count, len(keys))), strict=True):
        scores = (keys[found] * query.astype(np.float64)).sum(axis=1)
        order = np.lexsort((found, -scores))
        yield [(int(found[i]), float(scores[i])) for i in order]


def _kept(
    records: Sequence[PreferenceRecord],
    candidates: Sequence[PreferenceRecord],
    ranking: Iterator[list[tuple[int, float]]],
    per_row: int,
) -> list[list[Mined]]:
    right, mined = _right_answers(records), []
    for record, ranked in zip(records, ranking, strict=True):
        found: list[Mined] = []
        for index, score in ranked:
            other = candidates[index]
            if not _near(other.chosen, right[record.prompt_key]):
                found.append(Mined(other.chosen, score, other.place))
            if len(found) == per_row:
                break
        mined.append(found)
    return mined


def _near(text: str, answers: Sequence[str]) -> bool:
    """Equal to one of the answers, or nearly so by shared words."""
    words = set(_words(text))
    for answer in answers:
        others = set(_words(answer))
        if canonical(text) == canonical(answer):
            return True
        if len(words & others) >= NEAR * len(words | others) > 0:
            return True
    return False


def _words(text: str) -> list[str]:
    return [word.strip("،؛؟.,!:«»()\"'") for word in canonical(text).split()]
