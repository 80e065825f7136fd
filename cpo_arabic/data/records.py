"""Sources → PreferenceRecords, every refusal with file and line.

What is dropped is counted: negatives that equal the chosen text or each other (after Unicode NFC
and stripping), and, where ``on_bad_row="skip"``, whole rows with the reason for each.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

from cpo_arabic.data.jsonstream import BadRow
from cpo_arabic.data.schemas import Columns, Draft, RowError, Turn, draft_row
from cpo_arabic.data.sources import open_source
from cpo_arabic.data.text import Normalization, canonical, has_lone_surrogate, normalize, text_key
from cpo_arabic.errors import DataError

__all__ = [
    "Columns",
    "PreferenceRecord",
    "ReadReport",
    "RecordSet",
    "SkippedRow",
    "Turn",
    "iter_records",
    "limit_records",
    "read_records",
    "split_records",
]

OnBadRow = Literal["error", "skip"]
Source = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt with its chosen text and its negatives, hardest of the hard ones first."""

    turns: tuple[Turn, ...]  # system first if any; the last is the user's
    chosen: str
    easy_negatives: tuple[str, ...]
    hard_negatives: tuple[str, ...]
    source: str
    line: int

    @property
    def completions(self) -> tuple[str, ...]:
        """The chosen text, the easy negatives, the hard ones: candidate i is the i-th of these."""
        return (self.chosen, *self.easy_negatives, *self.hard_negatives)

    @property
    def prompt_text(self) -> str:
        """What the user said and heard, without the system message: what makes prompts equal."""
        spoken = [turn for turn in self.turns if turn.role != "system"]
        if len(spoken) == 1:
            return spoken[0].content
        return "\n\n".join(f"{turn.role}: {turn.content}" for turn in spoken)

    @property
    def prompt_key(self) -> int:
        """A hash of the prompt's text; the split and the false negatives go by it."""
        return text_key(self.prompt_text)

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class SkippedRow:
    """A row that was left out because the user asked for it."""

    source: str
    line: int
    reason: str


@dataclass
class ReadReport:
    """What reading met, filled while rows are read."""

    rows: int = 0  # records kept
    sources: Counter[str] = field(default_factory=Counter)  # records by file
    schemas: Counter[str] = field(default_factory=Counter)  # records by convention
    negatives_like_chosen: int = 0  # dropped
    negatives_repeated: int = 0  # dropped
    skipped: list[SkippedRow] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report in words, a finding a line."""
        said = [f"{self.rows} rows from {len(self.sources)} source(s)"]
        said += [f"{rows} rows as {name}" for name, rows in self.schemas.most_common()]
        if self.negatives_like_chosen:
            said.append(f"{self.negatives_like_chosen} negatives equal to the chosen text dropped")
        if self.negatives_repeated:
            said.append(f"{self.negatives_repeated} repeated negatives dropped")
        if self.skipped:
            said.append(f"{len(self.skipped)} bad rows skipped")
            said += [f"  {row.source}:{row.line}: {row.reason}" for row in self.skipped]
        return said


@dataclass(frozen=True)
class RecordSet:
    """Records and the report of reading them."""

    records: list[PreferenceRecord]
    report: ReadReport


def read_records(
    source: Source,
    *,
    columns: Columns | None = None,
    on_bad_row: OnBadRow = "error",
    normalization: Normalization = "none",
    normalize_completions: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
) -> RecordSet:
    """Read a source, several, or a mixture (source → share of the rows).

    A mixture takes as many rows as its shares allow without repeating one. Normalisation touches
    the prompt's side only, unless ``normalize_completions`` asks for the texts to be written too.
    """
    report = ReadReport()

    def load(part: str | Sequence[str]) -> list[PreferenceRecord]:
        return list(
            iter_records(
                part,
                columns=columns,
                on_bad_row=on_bad_row,
                normalization=normalization,
                normalize_completions=normalize_completions,
                report=report,
            )
        )

    if isinstance(source, Mapping):
        records = _mix({name: load(name) for name in source}, source, seed)
    else:
        records = load(source)
    if not records:
        raise DataError(_nothing_left(source, report))
    if max_samples is not None:
        records = limit_records(records, max_samples, seed)
    return RecordSet(records, report)


def iter_records(
    source: str | Sequence[str],
    *,
    columns: Columns | None = None,
    on_bad_row: OnBadRow = "error",
    normalization: Normalization = "none",
    normalize_completions: bool = False,
    report: ReadReport | None = None,
) -> Iterator[PreferenceRecord]:
    """Stream the records of a source or several; nothing but the row at hand is held."""
    columns = columns or Columns()
    report = report if report is not None else ReadReport()
    sources = [source] if isinstance(source, str) else list(source)
    for part in [part for name in sources for part in open_source(name)]:
        for item in part.rows():
            try:
                if isinstance(item, BadRow):
                    raise RowError(item.reason)
                schema, draft = draft_row(item.values, columns)
                record = _record(
                    draft, part.name, item.line, normalization, normalize_completions, report
                )
            except RowError as error:
                fatal = isinstance(item, BadRow) and item.fatal
                if on_bad_row == "error" or fatal:
                    raise DataError(_refusal(part.name, item.line, str(error))) from None
                report.skipped.append(SkippedRow(part.name, item.line, str(error)))
                continue
            report.rows += 1
            report.sources[part.name] += 1
            report.schemas[schema] += 1
            yield record


def _refusal(source: str, line: int, reason: str) -> str:
    remedy = "Correct the row, or set data.on_bad_row: skip to leave such rows out."
    return f"{source}:{line}: {reason}. {remedy}"


def _nothing_left(source: Source, report: ReadReport) -> str:
    names = [source] if isinstance(source, str) else list(source)
    shown = ", ".join(names)
    if report.skipped:
        first = report.skipped[0]
        return (
            f"{shown}: no row is left: all {len(report.skipped)} were skipped, the first "
            f"({first.source}:{first.line}) because: {first.reason}."
        )
    row = '{"prompt": …, "chosen": …, "rejected": …}'
    return f"{shown}: the source is empty. A row looks like {row}."


def _record(
    draft: Draft,
    source: str,
    line: int,
    normalization: Normalization,
    normalize_completions: bool,
    report: ReadReport,
) -> PreferenceRecord:
    """Check the texts of a draft, drop useless negatives, and close it."""
    how: Normalization = normalization if normalize_completions else "none"
    chosen = _completion(draft.chosen, "the chosen text", how)
    hard = [_completion(text, "a hard negative", how) for text in draft.hard]
    easy = [_completion(text, "a negative", how) for text in draft.easy]
    for turn in draft.turns:
        if turn.role != "assistant" and not turn.content.strip():
            raise RowError(f"the {turn.role}'s text in the prompt is blank")
        if has_lone_surrogate(turn.content):
            raise RowError("the prompt holds a lone surrogate, which is not text")
    chosen_form = canonical(chosen)
    seen: set[str] = set()
    # A text in both pools is a hard one: that is the more that is known of it.
    hard = _distinct(hard, seen, chosen_form, report)
    easy = _distinct(easy, seen, chosen_form, report)
    if not easy and not hard:
        raise RowError("every negative equals the chosen text, so nothing can be learnt")
    turns = tuple(Turn(turn.role, normalize(turn.content, normalization)) for turn in draft.turns)
    return PreferenceRecord(turns, chosen, tuple(easy), tuple(hard), source, line)


def _completion(text: str, what: str, how: Normalization) -> str:
    if not text.strip():
        raise RowError(f"{what} is empty or blank")
    if has_lone_surrogate(text):
        raise RowError(f"{what} holds a lone surrogate, which is not text")
    return normalize(text, how)


def _distinct(texts: list[str], seen: set[str], chosen: str, report: ReadReport) -> list[str]:
    """Keep the first of equal texts, and none that equals the chosen one; count the others."""
    kept = []
    for text in texts:
        form = canonical(text)
        if form == chosen:
            report.negatives_like_chosen += 1
        elif form in seen:
            report.negatives_repeated += 1
        else:
            seen.add(form)
            kept.append(text)
    return kept


# --- choosing rows ------------------------------------------------------------------------------


def limit_records(
    records: Sequence[PreferenceRecord], max_samples: int, seed: int
) -> list[PreferenceRecord]:
    """Shuffle by seed and cut; what stays keeps the file's order."""
    if max_samples < 1:
        raise DataError(f"max_samples is {max_samples}; it must be 1 or more, or null for all.")
    if max_samples >= len(records):
        return list(records)
    kept = random.Random(f"limit:{seed}").sample(range(len(records)), max_samples)
    return [records[index] for index in sorted(kept)]


def split_records(
    records: Sequence[PreferenceRecord], fraction: float, seed: int
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """Part training from validation rows by prompt: no prompt is on both sides.

    Prompts are taken in an order that depends on the seed and the prompt's text alone, until the
    validation side has ``fraction`` of the rows (at least one). 0 means no validation side.
    """
    if not 0 <= fraction < 1:
        raise DataError(
            f"validation_split_percentage is {fraction}; it is a fraction in [0, 1): write "
            f"{fraction / 100:g} for {fraction:g} %."
        )
    if fraction == 0:
        return list(records), []
    keys = [record.prompt_key for record in records]
    rows = Counter(keys)
    if len(rows) < 2:
        raise DataError(
            "a validation split needs two different prompts or more; name a validation_file, or "
            "set validation_split_percentage: 0."
        )
    wanted = max(1, round(fraction * len(records)))
    held: set[int] = set()
    taken = 0
    for key in sorted(rows, key=lambda key: _order(seed, key))[:-1]:
        if taken >= wanted:
            break
        held.add(key)
        taken += rows[key]
    train = [record for record, key in zip(records, keys, strict=True) if key not in held]
    validation = [record for record, key in zip(records, keys, strict=True) if key in held]
    return train, validation


def in_validation(record: PreferenceRecord, fraction: float, seed: int) -> bool:
    """The split for a stream: each prompt by itself, with ``fraction`` as its chance."""
    return int.from_bytes(_order(seed, record.prompt_key), "little") < fraction * 2**64


def _order(seed: int, key: int) -> bytes:
    return blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()


def _mix(
    parts: Mapping[str, list[PreferenceRecord]], weights: Mapping[str, float], seed: int
) -> list[PreferenceRecord]:
    """Rows in the shares of the weights, none twice; order by source, then by line."""
    for name, weight in weights.items():
        if not (weight > 0 and weight != float("inf")):
            raise DataError(f"{name}: its weight is {weight}; a weight must be a number above 0.")
        if not parts[name]:
            raise DataError(f"{name}: the source is empty.")
    total = sum(weights.values())
    size = min(len(parts[name]) * total / weight for name, weight in weights.items())
    mixed: list[PreferenceRecord] = []
    for name, weight in weights.items():
        rows = max(1, round(size * weight / total))
        mixed += limit_records(parts[name], min(rows, len(parts[name])), seed)
    return mixed
