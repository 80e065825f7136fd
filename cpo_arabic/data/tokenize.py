"""Records → a PreferenceDataset of token ids: budgets, counts, workers, cache.

Every completion of a record is tokenised once; a group is put together for an epoch by drawing
references to them (:mod:`cpo_arabic.data.negatives`). The result does not depend on the number of
workers. What was cut, dropped or refused stands in the report, never nowhere.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from cpo_arabic.data.encoding import (
    Budgets,
    RenderedRow,
    RowEncoder,
    TextEncoder,
    TruncationMode,
    cut_completion,
)
from cpo_arabic.data.negatives import Reference, draw_negatives
from cpo_arabic.data.pack import TokenizedGroup
from cpo_arabic.data.records import OnBadRow, PreferenceRecord, ReadReport, SkippedRow
from cpo_arabic.data.store import SCHEMA, TokenStore, write_batches
from cpo_arabic.data.templates import Template, load_template
from cpo_arabic.data.workers import Encoded, Part, Place, encode_part, start_worker, work_on
from cpo_arabic.errors import DataError

__all__ = ["PreferenceDataset", "TokenReport", "tokenize_records"]

CACHE_VERSION = 2
BATCH_ROWS = 512
WORTH_WORKERS = 16_384  # rows under which starting processes costs more than it saves


@dataclass
class TokenReport:
    """What tokenisation met."""

    rows: int = 0
    completions: int = 0
    prompts_truncated: int = 0
    completions_cut: int = 0
    chosen_cut: int = 0
    negatives_alike_after_cut: int = 0
    open_seams: int = 0  # a combining mark opens a completion right behind a letter
    refused: list[SkippedRow] = field(default_factory=list)
    reading: list[str] = field(default_factory=list)  # what reading a stream of rows met
    from_cache: bool = False

    def lines(self) -> list[str]:
        """The report in words, a finding a line."""
        said = [*self.reading, f"{self.rows} rows with {self.completions} completions tokenised"]
        counts = {
            "prompts truncated to max_prompt_length": self.prompts_truncated,
            f"completions cut ({self.chosen_cut} of them chosen), each without its EOS": (
                self.completions_cut
            ),
            "negatives dropped, equal to a sibling after the cut": self.negatives_alike_after_cut,
            "rows whose completion opens with a mark that would join the prompt's last letter": (
                self.open_seams
            ),
            "rows refused": len(self.refused),
        }
        said += [f"{count} {what}" for what, count in counts.items() if count]
        said += [f"  {row.source}:{row.line}: {row.reason}" for row in self.refused]
        return said


@dataclass(frozen=True)
class PreferenceDataset:
    """Tokenised records; rows are numbered from 0 in the order they came."""

    store: TokenStore
    budgets: Budgets
    closing: int  # tokens that end an uncut completion
    report: TokenReport

    def __len__(self) -> int:
        return len(self.store)

    def references(
        self,
        row: int,
        *,
        epoch: int,
        seed: int,
        num_negatives: int,
        strategy: str = "random",
        hard_negative_ratio: float = 0.0,
    ) -> list[Reference]:
        """Which negatives a row's group has in an epoch."""
        return draw_negatives(
            self,
            row,
            epoch=epoch,
            seed=seed,
            num_negatives=num_negatives,
            strategy=strategy,
            hard_negative_ratio=hard_negative_ratio,
        )

    def group(
        self,
        row: int,
        *,
        epoch: int,
        seed: int,
        num_negatives: int,
        strategy: str = "random",
        hard_negative_ratio: float = 0.0,
    ) -> TokenizedGroup:
        """The group of a row in an epoch: its prompt, its chosen text and its drawn negatives."""
        drawn = self.references(
            row,
            epoch=epoch,
            seed=seed,
            num_negatives=num_negatives,
            strategy=strategy,
            hard_negative_ratio=hard_negative_ratio,
        )
        prompt = self.store.prompt_ids(row)
        own = self.store.completion_keys(row)
        ids = [self.store.completion_ids(row, 0)]
        keys = [own[0]]
        budget = self.budgets.completion(len(prompt))
        for other, candidate in drawn:
            if other == row:
                ids.append(self.store.completion_ids(row, candidate))
                keys.append(own[candidate])
            else:  # another prompt's completion answers to this prompt's budget
                borrowed = self.store.completion_ids(other, candidate)
                ids.append(cut_completion(borrowed, budget, self.closing))
                keys.append(self.store.completion_keys(other)[candidate])
        return TokenizedGroup(
            row=row,
            prompt_ids=prompt,
            completion_ids=ids,
            prompt_key=self.prompt_key(row),
            completion_keys=keys,
        )

    def lengths(self, row: int) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each candidate completion (the chosen one first)."""
        return self.store.lengths(row)

    def place(self, row: int) -> str:
        """File and line of a row."""
        return self.store.place(row)

    # What the draw of negatives looks at.

    def pool_sizes(self, row: int) -> tuple[int, int]:
        """Easy and hard negatives of a row."""
        easy = int(self.store.easy_counts[row])
        return easy, int(self.store.candidate_counts[row]) - 1 - easy

    def prompt_key(self, row: int) -> int:
        """Hash of the row's prompt."""
        return int(self.store.prompt_keys[row])

    def completion_keys(self, row: int) -> Sequence[int]:
        """Hashes of the row's completions."""
        return self.store.completion_keys(row)


def tokenize_records(
    records: Iterable[PreferenceRecord],
    tokenizer: Any,
    *,
    template: str = "default",
    max_length: int,
    max_prompt_length: int,
    max_target_length: int,
    truncation_mode: TruncationMode = "keep_end",
    truncation: bool = True,
    add_special_tokens: bool = True,
    num_workers: int = 1,
    on_bad_row: OnBadRow = "error",
    cache_dir: str | Path | None = None,
    cache_key: str | None = None,
    reading: ReadReport | None = None,
) -> PreferenceDataset:
    """Tokenise records within their budgets.

    With ``cache_dir`` the tokens are written there and memory-mapped, under a key of everything
    they depend on: the records, the tokenizer, the template, the lengths and this code's version.
    A stream of records (an iterator) cannot be hashed before it is read: give ``cache_key``, a
    hash of what it comes from, or it is tokenised anew; and ``reading``, what is filled while the
    stream is read, or what was skipped there stays unsaid.
    """
    budgets = Budgets(max_length, max_prompt_length, max_target_length, truncation_mode, truncation)
    if not 0 < max_prompt_length < max_length or max_target_length < 1:
        raise DataError(
            f"max_prompt_length {max_prompt_length} and max_target_length {max_target_length} must "
            f"be above 0, and max_prompt_length below max_length {max_length}."
        )
    written = load_template(template, tokenizer, add_special_tokens=add_special_tokens)
    work = _Work(written, budgets, tokenizer, num_workers, on_bad_row, reading)
    if cache_dir is None:
        batches = list(work.batches(records))
        return work.dataset(TokenStore(batches))
    identity = work.identity(records, cache_key)
    return work.cached(records, Path(cache_dir), identity)


class _Work:
    """One call of `tokenize_records`."""

    def __init__(
        self,
        template: Template,
        budgets: Budgets,
        tokenizer: Any,
        num_workers: int,
        on_bad_row: OnBadRow,
        reading: ReadReport | None,
    ) -> None:
        self.template = template
        self.budgets = budgets
        self.num_workers = num_workers
        self.on_bad_row = on_bad_row
        self.reading = reading
        self.report = TokenReport()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.description: str | None = backend.to_str() if backend is not None else None
        self.tokenizer = tokenizer

    def dataset(self, store: TokenStore) -> PreferenceDataset:
        """Close the result; a data set without a row is refused."""
        if not len(store):
            reason = self.report.refused[0].reason if self.report.refused else "there is no record"
            raise DataError(f"no row is left after tokenisation: {reason}.")
        return PreferenceDataset(store, self.budgets, len(self.template.closing), self.report)

    # --- encoding

    def batches(self, records: Iterable[PreferenceRecord]) -> Iterator[pa.RecordBatch]:
        """Encode in order, in this process or in workers."""
        parts = _parts(records, BATCH_ROWS)
        first = list(islice(parts, WORTH_WORKERS // BATCH_ROWS))
        many = sum(map(len, first)) >= WORTH_WORKERS
        if self.num_workers > 1 and many and self.description is not None:
            yield from self._in_workers(_chain(first, parts))
        else:
            encode = self._row_encoder()
            for part in _chain(first, parts):
                yield self._account(encode_part(encode, self._rendered(part)))
        if self.reading is not None:
            self.report.reading = self.reading.lines()

    def _row_encoder(self) -> RowEncoder:
        if self.description is None:
            return RowEncoder(_SlowEncoder(self.tokenizer), *self._row_arguments())
        return RowEncoder(TextEncoder.from_json(self.description), *self._row_arguments())

    def _row_arguments(self) -> tuple[Any, ...]:
        return self.budgets, self.template.opening, self.template.tail, self.template.closing

    def _rendered(self, part: Sequence[PreferenceRecord]) -> Part:
        try:
            prompts = self.template.render([record.turns for record in part])
        except DataError:
            part = [record for record in part if self._renders(record)]
            prompts = self.template.render([record.turns for record in part])
        rows = [
            RenderedRow(
                prompt=prompt,
                prompt_text=record.prompt_text,
                completions=[self.template.completion(text) for text in record.completions],
                texts=record.completions,
                easy=len(record.easy_negatives),
            )
            for prompt, record in zip(prompts, part, strict=True)
        ]
        return Part(rows, [(record.source, record.line) for record in part])

    def _renders(self, record: PreferenceRecord) -> bool:
        """Whether the template takes a row; if not, that is refused or skipped."""
        try:
            self.template.render([record.turns])
        except DataError as error:
            self._refuse((record.source, record.line), str(error).rstrip("."))
            return False
        return True

    def _in_workers(self, parts: Iterator[list[PreferenceRecord]]) -> Iterator[pa.RecordBatch]:
        """Keep every worker two parts ahead; give the results in the order of the parts."""
        assert self.description is not None
        waiting: list[Future[Encoded]] = []
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(
                self.num_workers,
                mp_context=get_context("spawn"),
                initializer=start_worker,
                # Through a file: a pipe would hold each start up until the last worker has read.
                initargs=(_written(self.description, Path(folder)), self._row_arguments()),
            ) as pool,
        ):
            for part in parts:
                waiting.append(pool.submit(work_on, self._rendered(part)))
                if len(waiting) > 2 * self.num_workers:
                    yield self._account(waiting.pop(0).result())
            for future in waiting:
                yield self._account(future.result())

    def _account(self, encoded: Encoded) -> pa.RecordBatch:
        """Add a part's counts to the report; refuse or skip its bad rows."""
        for place, reason in encoded.refused:
            self._refuse(place, reason)
        for name, count in encoded.counts.items():
            setattr(self.report, name, getattr(self.report, name) + count)
        return pa.ipc.read_record_batch(pa.py_buffer(encoded.batch), SCHEMA)

    def _refuse(self, place: Place, reason: str) -> None:
        if self.on_bad_row == "error":
            raise DataError(
                f"{place[0]}:{place[1]}: {reason}. Or set data.on_bad_row: skip to leave such rows "
                f"out."
            )
        self.report.refused.append(SkippedRow(*place, reason))

    # --- cache

    def identity(self, records: Iterable[PreferenceRecord], cache_key: str | None) -> str | None:
        """A hash of all that the tokens depend on; None where the records cannot be hashed."""
        if cache_key is None and not isinstance(records, Sequence):
            return None
        digest = blake2b(digest_size=16)
        facts = (
            CACHE_VERSION,
            self.description or repr(self.tokenizer),
            self.template.fingerprint,
            self.template.name,
            asdict(self.budgets),
            self.on_bad_row,
            cache_key,
        )
        digest.update(repr(facts).encode())
        if cache_key is None:
            for record in records:
                digest.update(repr(record).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def cached(
        self, records: Iterable[PreferenceRecord], folder: Path, identity: str | None
    ) -> PreferenceDataset:
        """Open the tokens of an earlier call, or write them; a damaged entry is written anew."""
        folder.mkdir(parents=True, exist_ok=True)
        if identity is not None:
            entry = folder / f"tokens-{identity}"
            if entry.is_dir():
                try:
                    self.report = _read_report(entry)
                    return self.dataset(TokenStore.open(entry / "tokens.arrow"))
                except (OSError, ValueError, TypeError, KeyError, pa.ArrowInvalid):
                    self.report = TokenReport()
                    shutil.rmtree(entry)
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=folder))
        try:
            write_batches(self.batches(records), draft / "tokens.arrow")
            (draft / "report.json").write_text(json.dumps(asdict(self.report)), encoding="utf-8")
            entry = folder / f"tokens-{identity or draft.name.removeprefix('draft-')}"
            if not entry.exists():
                draft.replace(entry)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return self.dataset(TokenStore.open(entry / "tokens.arrow"))


def _read_report(entry: Path) -> TokenReport:
    values = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    refused = [SkippedRow(**row) for row in values.pop("refused")]
    return TokenReport(**{**values, "refused": refused, "from_cache": True})


class _SlowEncoder(TextEncoder):
    """A tokenizer without a Rust backend: through its own `encode`, in this process."""

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids


def _written(description: str, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(description, encoding="utf-8")
    return path


def _parts(records: Iterable[PreferenceRecord], size: int) -> Iterator[list[PreferenceRecord]]:
    source = iter(records)
    while part := list(islice(source, size)):
        yield part


def _chain(
    first: list[list[PreferenceRecord]], rest: Iterator[list[PreferenceRecord]]
) -> Iterator[list[PreferenceRecord]]:
    yield from first
    yield from rest
