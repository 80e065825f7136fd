"""What a person should know about preference data before training on it.

Counts and shares, no verdict on the texts: the findings name what commonly spoils a run (rows on
both sides of a split, completions cut, chosen simply longer than rejected, a dialect that stands on
one side only) and leave the judgement to the reader.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpo_arabic.data.records import PreferenceRecord
from cpo_arabic.data.text import DIACRITICS, text_key
from cpo_arabic.data.tokenize import PreferenceDataset

EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
NEAR_EMPTY_WORDS = 2
LONGER_IS_SUSPECT = 0.75  # share of rows whose chosen text is the longer one
ONE_SIDED_DIALECT = 0.2  # difference in the share of texts with a marker

# Function words that Modern Standard Arabic does not use, by region. A hint, not a classifier.
DIALECT_MARKERS = {
    "Egyptian": "مش ده دي دول دلوقتي علشان عشان ازاي إزاي ليه فين كده عايز عاوز بتاع احنا إحنا",
    "Levantine": "شو هيك هلق ليش بدي بدك منيح كتير هاد هاي لسا مو",
    "Gulf": "وش ايش إيش وين الحين زين ابغى أبغى شلون هالحين مب",
    "Maghrebi": "واش بزاف ديال كيفاش علاش دابا حنا هاد بغيت",
}
_MARKERS = {region: frozenset(words.split()) for region, words in DIALECT_MARKERS.items()}
_WORDS = re.compile("[\u0621-\u064a\u066e-\u06d3]+")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Lengths:
    """Token lengths: order statistics and a histogram over `EDGES`."""

    count: int
    mean: float
    least: int
    median: int
    p90: int
    p99: int
    most: int
    histogram: tuple[int, ...]  # rows in [EDGES[i], EDGES[i+1]), the last open


@dataclass(frozen=True)
class Side:
    """One side of the preference: the chosen texts, or the negatives."""

    texts: int
    near_empty: int  # two words or fewer
    latin: float  # share of Latin letters among all letters
    diacritised: float  # share of texts with a diacritic
    dialect: dict[str, float]  # share of texts with a marker, by region
    any_dialect: float


@dataclass(frozen=True)
class SplitCheck:
    """One split."""

    rows: int
    prompts: int  # different ones
    repeated_rows: int  # same prompt and same completions as an earlier row
    easy_negatives: float  # a row, on average
    hard_negatives: float
    chosen_longer: float  # share of rows whose chosen text outgrows its negatives' mean
    length_ratio: float  # tokens of chosen / tokens of negatives, before the cut
    chosen: Side
    negatives: Side
    lengths: dict[str, Lengths]  # prompt, chosen, negatives; each also "… kept"
    prompts_truncated: int
    completions_cut: int
    chosen_cut: int
    negatives_alike_after_cut: int
    refused: int


@dataclass(frozen=True)
class DataCheck:
    """All splits, what reading said, and findings in words."""

    splits: dict[str, SplitCheck]
    prompts_on_both_sides: int
    reading: list[str]
    findings: list[str]

    def as_data(self) -> dict[str, Any]:
        """The check as plain data; the histogram's edges with it."""
        return {**asdict(self), "histogram_edges": list(EDGES)}


def check_data(
    splits: dict[str, tuple[Sequence[PreferenceRecord], PreferenceDataset]],
    reading: Iterable[str] = (),
) -> DataCheck:
    """Look at every split and between them."""
    checks = {name: _split(records, dataset) for name, (records, dataset) in splits.items()}
    keys = [{record.prompt_key for record in records} for records, _ in splits.values()]
    shared = len(set.union(*(a & b for i, a in enumerate(keys) for b in keys[:i]), set()))
    findings = [line for name, check in checks.items() for line in _findings(name, check)]
    if shared:
        findings.insert(0, f"{shared} prompts stand in more than one split: held-out numbers lie")
    return DataCheck(checks, shared, list(reading), findings)


def _split(records: Sequence[PreferenceRecord], dataset: PreferenceDataset) -> SplitCheck:
    rows = range(len(dataset))
    before = [dataset.store.lengths_before(row) for row in rows]
    kept = [dataset.lengths(row) for row in rows]
    report = dataset.report
    repeated = Counter(
        (record.prompt_key, *map(text_key, record.completions)) for record in records
    )
    chosen = sum(completions[0] for _, completions in before)
    negatives = sum(_mean(completions[1:]) for _, completions in before)
    return SplitCheck(
        rows=len(records),
        prompts=len({record.prompt_key for record in records}),
        repeated_rows=sum(count - 1 for count in repeated.values()),
        easy_negatives=_mean([len(record.easy_negatives) for record in records]),
        hard_negatives=_mean([len(record.hard_negatives) for record in records]),
        chosen_longer=_mean([_outgrows(c[0], _mean(c[1:])) for _, c in before]),
        length_ratio=chosen / negatives if negatives else 0.0,
        chosen=_side([record.chosen for record in records]),
        negatives=_side([text for record in records for text in record.completions[1:]]),
        lengths={
            "prompt": _lengths([prompt for prompt, _ in before]),
            "prompt kept": _lengths([prompt for prompt, _ in kept]),
            "chosen": _lengths([c[0] for _, c in before]),
            "chosen kept": _lengths([c[0] for _, c in kept]),
            "negatives": _lengths([length for _, c in before for length in c[1:]]),
            "negatives kept": _lengths([length for _, c in kept for length in c[1:]]),
        },
        prompts_truncated=report.prompts_truncated,
        completions_cut=report.completions_cut,
        chosen_cut=report.chosen_cut,
        negatives_alike_after_cut=report.negatives_alike_after_cut,
        refused=len(report.refused),
    )


def _outgrows(chosen: float, negatives: float) -> float:
    return 0.5 if chosen == negatives else float(chosen > negatives)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _lengths(values: list[int]) -> Lengths:
    ordered = sorted(values) or [0]

    def at(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    bounds = [*EDGES[1:], float("inf")]
    counts = [0] * len(EDGES)
    for value in values:
        counts[next(i for i, bound in enumerate(bounds) if value < bound)] += 1
    return Lengths(
        len(values), _mean(values), ordered[0], at(0.5), at(0.9), at(0.99), ordered[-1],
        tuple(counts),
    )  # fmt: skip


def _side(texts: list[str]) -> Side:
    letters = sum(len(_LETTER.findall(text)) for text in texts)
    latin = sum(len(_LATIN.findall(text)) for text in texts)
    words = [frozenset(_WORDS.findall(DIACRITICS.sub("", text))) for text in texts]

    def share(holds: Callable[[frozenset[str]], bool]) -> float:
        return _mean([holds(found) for found in words])

    dialect = {
        region: share(lambda found, markers=markers: bool(found & markers))  # type: ignore[misc]
        for region, markers in _MARKERS.items()
    }
    every = frozenset[str]().union(*_MARKERS.values())
    return Side(
        texts=len(texts),
        near_empty=sum(len(text.split()) <= NEAR_EMPTY_WORDS for text in texts),
        latin=latin / letters if letters else 0.0,
        diacritised=_mean([bool(DIACRITICS.search(text)) for text in texts]),
        dialect=dialect,
        any_dialect=share(lambda found: bool(found & every)),
    )


def _findings(name: str, check: SplitCheck) -> list[str]:
    said = []
    rows = max(check.rows, 1)
    if check.prompts_truncated:
        said.append(
            f"{check.prompts_truncated} prompts ({check.prompts_truncated / rows:.0%}) are "
            f"truncated: raise cpo.max_prompt_length to {check.lengths['prompt'].most}, or accept"
        )
    if check.chosen_cut:
        said.append(
            f"{check.chosen_cut} chosen texts ({check.chosen_cut / rows:.0%}) are cut and lose "
            f"their EOS: raise cpo.max_target_length to {check.lengths['chosen'].most}"
        )
    if check.refused:
        said.append(f"{check.refused} rows are refused by their budgets")
    if check.repeated_rows:
        said.append(f"{check.repeated_rows} rows repeat an earlier row word for word")
    if check.chosen_longer > LONGER_IS_SUSPECT or check.chosen_longer < 1 - LONGER_IS_SUSPECT:
        side = "longer" if check.chosen_longer > 0.5 else "shorter"
        share = max(check.chosen_longer, 1 - check.chosen_longer)
        said.append(
            f"chosen is {side} than its negatives in {share:.0%} of the rows "
            f"({check.length_ratio:.2f}× the tokens): length may be all that is learnt; "
            f"cpo.alpha: 1 compares means"
        )
    gap = check.chosen.any_dialect - check.negatives.any_dialect
    if abs(gap) > ONE_SIDED_DIALECT:
        side = "chosen" if gap > 0 else "negative"
        said.append(
            f"dialect words stand mostly in {side} texts ({check.chosen.any_dialect:.0%} of "
            f"chosen, {check.negatives.any_dialect:.0%} of negatives): the variety is learnt first"
        )
    if check.chosen.near_empty:
        said.append(f"{check.chosen.near_empty} chosen texts have two words or fewer")
    if check.chosen.latin > 0.3:
        said.append(f"{check.chosen.latin:.0%} of the letters in chosen texts are Latin")
    return [f"{name}: {line}" for line in said]
