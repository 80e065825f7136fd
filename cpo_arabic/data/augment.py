"""Augmented twins of training rows: the prompt said otherwise, the answers left as they are.

A twin is a row of its own: the last user turn is rewritten, every completion stays. Which rows get
one, and what becomes of them, depends on the seed and the text alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cpo_arabic.data.records import PreferenceRecord, Turn
from cpo_arabic.data.text import DIACRITICS, canonical

Strategy = Literal["paraphrase", "diacritics", "orthography", "digits"]
Rewrite = Callable[[Sequence[str]], list[str]]

_ORTHOGRAPHY = str.maketrans("أإآ", "ااا")
_LATIN, _ARABIC = "0123456789", "٠١٢٣٤٥٦٧٨٩"
_DIGITS = str.maketrans(_LATIN + _ARABIC, _ARABIC + _LATIN)


@dataclass(frozen=True)
class Augmented:
    """The rows with their twins behind them, and how many there are."""

    records: list[PreferenceRecord]
    twins: int
    unchanged: int  # rows passed over, since the strategy leaves their prompt as it is


def without_diacritics(text: str) -> str:
    """The text as most people type it: no short vowels."""
    return DIACRITICS.sub("", text)


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
        strategy: ``diacritics`` strips tashkeel (it never adds any: that would be guessing),
            ``orthography`` and ``digits`` write the prompt as others would, ``paraphrase`` asks a
            model.
        ratio: share of rows that get one twin, in [0, 1].
        seed: decides which.
        paraphrase: texts → texts; needed by ``paraphrase``.
    """
    order = list(range(len(records)))
    random.Random(f"augment:{seed}").shuffle(order)
    wanted, rewrite = round(ratio * len(records)), _rewriter(strategy, paraphrase)
    twins: list[PreferenceRecord] = []
    unchanged = 0
    for start in range(0, len(order), 64):
        if len(twins) >= wanted:
            break
        part = [records[row] for row in order[start : start + 64]]
        for record, text in zip(part, rewrite([_last(r) for r in part]), strict=True):
            if len(twins) >= wanted:
                break
            if not text.strip() or canonical(text) == canonical(_last(record)):
                unchanged += 1
                continue
            turns = (*record.turns[:-1], Turn(record.turns[-1].role, text))
            twins.append(replace(record, turns=turns))
    return Augmented([*records, *twins], len(twins), unchanged)


def _last(record: PreferenceRecord) -> str:
    return record.turns[-1].content


def _rewriter(strategy: Strategy, paraphrase: Rewrite | None) -> Rewrite:
    if strategy == "paraphrase":
        assert paraphrase is not None
        return paraphrase
    one = {
        "diacritics": without_diacritics,
        "orthography": loose_orthography,
        "digits": other_digits,
    }[strategy]
    return lambda texts: [one(text) for text in texts]


def _loose_ending(word: str) -> str:
    core = word.rstrip('،؛؟.!:»")')
    tail = word[len(core) :]
    for old, new in (("ة", "ه"), ("ي", "ى")):
        if len(core) > 2 and core.endswith(old):
            return core[:-1] + new + tail
    return word
