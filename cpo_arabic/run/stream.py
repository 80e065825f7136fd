"""Data larger than memory: rows go from their files straight into memory-mapped tokens."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.records import PreferenceRecord, ReadReport, in_validation
from cpo_arabic.data.sources import open_source
from cpo_arabic.data.tokenize import PreferenceDataset
from cpo_arabic.run import data as run_data
from cpo_arabic.training.checkpoint import sha256


def stream(config: CPOConfig, tokenizer: Any) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """Training and held-out rows, tokenised once into ``data.cache_dir``.

    Without a validation file each prompt falls on one side by itself, with
    ``validation_split_percentage`` as its chance.

    Raises:
        DataError: a file is missing or a row cannot be used.
    """
    fraction = config.data.validation_split_percentage
    named = run_data.validation_file(config)
    source = run_data.train_source(config)
    if named is not None:
        train = _tokens(config, tokenizer, source, side="whole")
        return train, _tokens(config, tokenizer, named, side="whole")
    train = _tokens(config, tokenizer, source, side="train")
    held_out = _tokens(config, tokenizer, source, side="held-out") if fraction > 0 else None
    return train, held_out


def _tokens(config: CPOConfig, tokenizer: Any, source: Any, *, side: str) -> PreferenceDataset:
    reading = ReadReport()
    rows = _side(config, source, side, reading)
    return run_data.tokenize(
        config, rows, tokenizer, cache_key=_content(config, source, side), reading=reading
    )


def _side(
    config: CPOConfig, source: Any, side: str, reading: ReadReport
) -> Iterator[PreferenceRecord]:
    data, seed = config.data, config.training.seed
    rows = run_data.iterate(config, source, reading)
    if side == "whole":
        yield from rows
        return
    for record in rows:
        held = in_validation(record, data.validation_split_percentage, seed)
        if held == (side == "held-out"):
            yield record


def _content(config: CPOConfig, source: Any, side: str) -> str | None:
    """A hash of what the rows come from; None for a hub, whose content is not known beforehand."""
    names = [source] if isinstance(source, str) else list(source)
    paths = [part.path for name in names for part in open_source(name)]
    if any(path is None or path.is_dir() for path in paths):
        return None
    facts = (
        side,
        config.training.seed,
        config.data.validation_split_percentage,
        run_data.columns_of(config),
        config.data.normalization,
        [sha256(path) for path in paths if path is not None],
    )
    return blake2b(repr(facts).encode(), digest_size=16).hexdigest()
