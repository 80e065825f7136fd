"""Augmented twins of training rows: the prompt said otherwise, the answers left as they are.

A twin is a row of its own: the last user turn is rewritten, every completion stays. Which rows get
one, and what becomes of them, depends on the seed and the rows alone.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from cpo_arabic.data.records import PreferenceRecord, Turn
from cpo_arabic.data.text import DIACRITICS, canonical, normalize
from cpo_arabic.errors import DataError
from cpo_arabic.files import write_whole

Strategy = Literal["paraphrase", "diacritics", "orthography", "digits"]
Rewrite = Callable[[Sequence[str]], list[str]]

_ORTHOGRAPHY = str.maketrans("أإآ", "ااا")
_LATIN, _ARABIC = "0123456789", "٠١٢٣٤٥٦٧٨٩"
_DIGITS = str.maketrans(_LATIN + _ARABIC, _ARABIC + _LATIN)
_WORD = re.compile("[\u0621-\u0655\u0670\u0671]+")
# A word's last vowel, in the order of NFC: a shadda stands behind it, and stays.
_CASE_ENDING = re.compile("[\u064b-\u0650](?=\u0651?$)|\u0652$")


@dataclass(frozen=True)
class Augmented:
    """The rows with their twins behind them, and how many there are."""

    records: list[PreferenceRecord]
    twins: int
    unchanged: int  # rows passed over, since the strategy leaves their prompt as it is


def without_diacritics(text: str) -> str:
    """The text as most people type it: no short vowels. A hamza is part of its letter."""
    return DIACRITICS.sub("", normalize(text, "nfc"))


def vocalisations(texts: Iterable[str]) -> dict[str, str]:
    """Words without tashkeel → as they are written with it, where these texts know one way only.

    The vowel at a word's end mostly marks its case, which the next sentence may not share: it is
    left off.
    """
    known: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        if DIACRITICS.search(text):
            for word in _WORD.findall(normalize(text, "nfc")):
                spelling = _CASE_ENDING.sub("", word)
                if spelling != (bare := without_diacritics(word)):
                    known[bare].add(spelling)
    return {bare: next(iter(ways)) for bare, ways in known.items() if len(ways) == 1}


def other_diacritics(text: str, lexicon: Mapping[str, str]) -> str:
    """Tashkeel off where the text has some, else on for the words that the lexicon knows."""
    text = normalize(text, "nfc")
    if DIACRITICS.search(text):
        return without_diacritics(text)
    return _WORD.sub(lambda match: lexicon.get(match[0], match[0]), text)


def loose_orthography(text: str) -> str:
    """Hamza left off alef, final ya and ta marbuta without their dots, as people really type."""
    words = text.translate(_ORTHOGRAPHY).split(" ")
    return " ".join(_loose_ending(word) for word in words)


def other_digits(text: str) -> str:
    """Latin digits as Arabic-Indic ones, and the other way round."""
    return text.translate(_DIGITS)


def augment_records(
    records: Sequence[PreferenceRecord],
    *,
    strategy: Strategy,
    ratio: float,
    seed: int,
    paraphrase: Rewrite | None = None,
) -> Augmented:
    """Adds twins for ``ratio`` of the rows.

    Args:
        records: training rows.
        strategy: ``diacritics`` strips tashkeel, or adds it to words that these rows write with
            it in one way only (anything else would be guessing); ``orthography`` and ``digits``
            write the prompt as others would; ``paraphrase`` asks a model.
        ratio: share of rows that get one twin, in [0, 1].
        seed: decides which.
        paraphrase: texts → texts; needed by ``paraphrase``.
    """
    order = list(range(len(records)))
    random.Random(f"augment:{seed}").shuffle(order)
    wanted, rewrite = round(ratio * len(records)), _rewriter(strategy, records, paraphrase)
    twins: list[PreferenceRecord] = []
    unchanged = 0
    rows = iter(order)
    while part := [records[row] for row in islice(rows, min(64, wanted - len(twins)))]:
        for record, text in zip(part, rewrite([_last(r) for r in part]), strict=True):
            if not text.strip() or canonical(text) == canonical(_last(record)):
                unchanged += 1
                continue
            turns = (*record.turns[:-1], Turn(record.turns[-1].role, text))
            twins.append(replace(record, turns=turns, source=f"{record.source} (augmented)"))
    return Augmented([*records, *twins], len(twins), unchanged)


def remembered(rewrite: Rewrite, path: Path) -> Rewrite:
    """The same texts → texts, each asked for once: ``path`` keeps them, and may be edited.

    Raises:
        DataError: from the call, where the file was edited into something else.
    """

    def look_up(texts: Sequence[str]) -> list[str]:
        known = _read(path) if path.exists() else {}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, rewrite(new), strict=True))
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = ({"text": old, "rewritten": text} for old, text in known.items())
            write_whole(
                path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            )
        return [known[text] for text in texts]

    return look_up


def _read(path: Path) -> dict[str, str]:
    known: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            text, rewritten = row["text"], row["rewritten"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a rewritten text; delete the file to have it made anew"
            ) from error
        known[text] = str(rewritten)
    return known


def _last(record: PreferenceRecord) -> str:
    return record.turns[-1].content


def _rewriter(
    strategy: Strategy, records: Sequence[PreferenceRecord], paraphrase: Rewrite | None
) -> Rewrite:
    if strategy == "paraphrase":
        assert paraphrase is not None
        return paraphrase
    one: Callable[[str], str]
    match strategy:
        case "orthography":
            one = loose_orthography
        case "digits":
            one = other_digits
        case "diacritics":
            one = partial(other_diacritics, lexicon=vocalisations(_texts(records)))
    return lambda texts: [one(text) for text in texts]


def _texts(records: Sequence[PreferenceRecord]) -> Iterable[str]:
    for record in records:
        yield from (turn.content for turn in record.turns)
        yield from record.completions


def _loose_ending(word: str) -> str:
    core = word.rstrip('،؛؟.!:»")')
    tail = word[len(core) :]
    for old, new in (("ة", "ه"), ("ي", "ى")):
        if len(core) > 2 and core.endswith(old):
            return core[:-1] + new + tail
    return word
