"""Configuration → tokenised rows, and the batches made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.pack import PreferenceBatch, TokenizedGroup, collate, plan_batches
from cpo_arabic.data.records import (
    Columns,
    PreferenceRecord,
    ReadReport,
    RecordSet,
    iter_records,
    limit_records,
    read_records,
    split_records,
)
from cpo_arabic.data.sources import open_source
from cpo_arabic.data.tokenize import PreferenceDataset, tokenize_records
from cpo_arabic.errors import DataError
from cpo_arabic.training.plan import Schedule


@dataclass(frozen=True)
class Records:
    """The rows of a run as text, with what reading them met."""

    train: list[PreferenceRecord]
    validation: list[PreferenceRecord]
    notes: list[str]


@dataclass(frozen=True)
class Groups:
    """Rows of a split with the run's way of drawing negatives; what the loader holds."""

    dataset: PreferenceDataset
    seed: int
    num_negatives: int
    strategy: str
    hard_negative_ratio: float

    def __len__(self) -> int:
        return len(self.dataset)

    def group(self, row: int, epoch: int) -> TokenizedGroup:
        """The row's group in an epoch, a pure function of (seed, epoch, row)."""
        return self.dataset.group(
            row,
            epoch=epoch,
            seed=self.seed,
            num_negatives=self.num_negatives,
            strategy=self.strategy,
            hard_negative_ratio=self.hard_negative_ratio,
        )

    def lengths(self) -> list[int]:
        """Tokens a row is about to bring: prompt, chosen and the mean of its negatives."""
        found = []
        for row in range(len(self)):
            prompt, completions = self.dataset.lengths(row)
            negatives = completions[1:] or [0]
            mean = sum(negatives) / len(negatives)
            found.append(prompt + completions[0] + round(self.num_negatives * mean))
        return found


def read(config: CPOConfig) -> Records:
    """Reads the training and the held-out rows.

    Raises:
        DataError: a file is missing or a row cannot be used.
    """
    data, seed = config.data, config.training.seed
    everything = _read(config, train_source(config))
    notes = everything.report.lines()
    named = validation_file(config)
    if named is not None:
        held = _read(config, named)
        notes += [f"held out: {line}" for line in held.report.lines()]
        train, validation = everything.records, held.records
        shared = {r.prompt_key for r in train} & {r.prompt_key for r in validation}
        if shared:
            notes.append(f"{len(shared)} prompts stand in both training and held-out rows")
    else:
        train, validation = split_records(
            everything.records, data.validation_split_percentage, seed
        )
    if data.max_samples is not None:
        train = limit_records(train, data.max_samples, seed)
    return Records(train=train, validation=validation, notes=notes)


def read_test(config: CPOConfig) -> list[PreferenceRecord]:
    """The rows of ``data.test_file``; none where it is not set."""
    return _read(config, config.data.test_file).records if config.data.test_file else []


def tokenize(
    config: CPOConfig,
    records: Iterable[PreferenceRecord],
    tokenizer: Any,
    *,
    cache_key: str | None = None,
    reading: ReadReport | None = None,
) -> PreferenceDataset:
    """Tokenises rows within the configuration's budgets; a stream of them under ``cache_key``.

    ``reading`` is filled while the stream is read; what it says joins the data set's report.
    """
    data, cpo = config.data, config.cpo
    return tokenize_records(
        records,
        tokenizer,
        template=data.conversation_template,
        max_length=cpo.max_length,
        max_prompt_length=cpo.max_prompt_length,
        max_target_length=cpo.max_target_length,
        truncation_mode=cpo.truncation_mode,
        truncation=data.truncation,
        add_special_tokens=data.add_special_tokens,
        num_workers=data.preprocessing_num_workers,
        on_bad_row=data.on_bad_row,
        cache_dir=data.cache_dir,
        cache_key=cache_key,
        reading=reading,
    )


def groups(config: CPOConfig, dataset: PreferenceDataset) -> Groups:
    """The rows with the configuration's negatives; none where no term reads them."""
    cpo = config.cpo
    reads_negatives = cpo.preference_weight > 0 or cpo.contrastive_weight > 0
    return Groups(
        dataset=dataset,
        seed=config.training.seed,
        num_negatives=cpo.num_negatives if reads_negatives else 0,
        strategy=cpo.negative_sampling_strategy,
        hard_negative_ratio=cpo.hard_negative_ratio,
    )


def collation(
    config: CPOConfig, tokenizer: Any
) -> Callable[[Sequence[TokenizedGroup]], PreferenceBatch]:
    """Groups → batch, in the configuration's layout."""
    pad = tokenizer.pad_token_id
    return layout(config, tokenizer.eos_token_id if pad is None else pad)


def layout(config: CPOConfig, pad_id: int) -> Callable[[Sequence[TokenizedGroup]], PreferenceBatch]:
    """:func:`collation` with a padding token that needs no tokenizer."""
    return partial(
        collate,
        padding=config.data.padding,
        pad_id=pad_id,
        max_length=config.cpo.max_length,
        max_tokens_per_row=config.data.max_tokens_per_row,
    )


def schedule(config: CPOConfig, rows: int, world_size: int) -> Schedule:
    """The run's steps over ``rows`` training rows."""
    training = config.training
    return Schedule(
        rows=rows,
        batch_size=training.batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        world_size=world_size,
        epochs=training.num_epochs,
        max_steps=training.max_steps,
    )


@dataclass(frozen=True)
class BatchOrder:
    """Epoch → micro-batches of row numbers; picklable."""

    lengths: list[int]
    batch_size: int
    seed: int
    padding: str

    def __call__(self, epoch: int) -> list[list[int]]:
        return plan_batches(self.lengths, self.batch_size, self.seed, epoch, self.padding)  # type: ignore[arg-type]


def order(config: CPOConfig, source: Groups) -> BatchOrder:
    """Which rows make which micro-batch, by epoch."""
    training = config.training
    return BatchOrder(source.lengths(), training.batch_size, training.seed, config.data.padding)


def held_out_batches(
    source: Groups,
    collate_groups: Callable[[Sequence[TokenizedGroup]], PreferenceBatch],
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[PreferenceBatch]:
    """This rank's held-out batches, the negatives as in epoch 0, rows in order."""
    starts = range(0, len(source), batch_size)[rank::world_size]
    for start in starts:
        rows = range(start, min(start + batch_size, len(source)))
        yield collate_groups([source.group(row, 0) for row in rows])


def iterate(config: CPOConfig, source: Any, report: ReadReport) -> Iterator[PreferenceRecord]:
    """Streams a source's rows; nothing but the row at hand is held."""
    return iter_records(
        source,
        columns=columns_of(config),
        on_bad_row=config.data.on_bad_row,
        normalization=config.data.normalization,
        report=report,
    )


def columns_of(config: CPOConfig) -> Columns:
    """The names of the columns."""
    data = config.data
    return Columns(
        prompt=data.prompt_column,
        chosen=data.chosen_column,
        rejected=data.rejected_column,
        system=data.system_column,
        multiple_negatives=data.multiple_negatives_column,
        hard_negatives=data.hard_negatives_column,
    )


def _read(config: CPOConfig, source: Any) -> RecordSet:
    return read_records(
        source,
        columns=columns_of(config),
        on_bad_row=config.data.on_bad_row,
        normalization=config.data.normalization,
        seed=config.training.seed,
    )


def train_source(config: CPOConfig) -> Any:
    """What is read for training: files, or a hub's data set with its options."""
    data = config.data
    if data.dataset_name is None:
        return data.train_file
    options = [f"split={data.dataset_split}"]
    if data.dataset_config_name is not None:
        options.insert(0, f"config={data.dataset_config_name}")
    return f"{data.dataset_name}?{'&'.join(options)}"


def validation_file(config: CPOConfig) -> str | None:
    """The held-out file; the documented default path counts only where it exists."""
    path = config.data.validation_file
    if path is None or Path(path).exists():
        return path
    if not config.is_set("data.validation_file"):
        return None
    try:
        open_source(path)  # a pattern, or a hub's name
    except DataError as error:
        raise DataError(
            f"data.validation_file: {error} Correct it, or write null to split the training rows "
            "by data.validation_split_percentage"
        ) from None
    return path


def fingerprint(source: Groups) -> str:
    """A hash of every row's texts and token counts: the data as the run sees it."""
    digest = hashlib.blake2b(digest_size=16)
    for row in range(len(source)):
        prompt, completions = source.dataset.lengths(row)
        keys = list(source.dataset.completion_keys(row))
        digest.update(repr((prompt, completions, source.dataset.prompt_key(row), keys)).encode())
    return digest.hexdigest()
