"""What the steps of a run are made of: its micro-batches, the largest and the mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.pack import PreferenceBatch, TokenizedGroup
from cpo_arabic.data.tokenize import PreferenceDataset
from cpo_arabic.errors import DataError
from cpo_arabic.run import data as run_data
from cpo_arabic.run import model as run_model
from cpo_arabic.run.stream import stream

SURVEYED = 512
"""Micro-batches that are laid out to find the largest and the mean."""


@dataclass(frozen=True)
class Workload:
    """What the steps of a run are made of."""

    source: str
    largest: PreferenceBatch
    single: PreferenceBatch  # of one group
    positions: float  # of a micro-batch, padding included, on average
    tokens: float  # of them, without padding
    micro_batches: int  # of a step
    steps: int | None
    rows: int | None


@dataclass(frozen=True)
class Shape:
    """Groups without data: prompt tokens, completion tokens, negatives."""

    prompt: int
    completion: int
    negatives: int

    def groups(self, count: int) -> list[TokenizedGroup]:
        """``count`` groups of that shape."""
        keys = list(range(self.negatives + 1))
        answers = [[0] * self.completion for _ in keys]
        return [TokenizedGroup(row, [0] * self.prompt, answers, row, keys) for row in range(count)]


def tokens_of(config: CPOConfig) -> tuple[PreferenceDataset, Any]:
    """The training rows as the run would have them, but for mined negatives and twins."""
    tokenizer = run_model.tokenizer_of(config)
    if config.data.streaming:
        return stream(config, tokenizer)[0], tokenizer
    return run_data.tokenize(config, run_data.read(config).train, tokenizer), tokenizer


def surveyed(
    config: CPOConfig, dataset: PreferenceDataset, tokenizer: Any, world_size: int
) -> Workload:
    """The first epoch's micro-batches: the largest, and what they are like on average."""
    groups = run_data.groups(config, dataset)
    lay_out = run_data.collation(config, tokenizer)
    lengths = groups.lengths()
    plan = run_data.order(config, groups)(0)
    by_size = sorted(plan, key=lambda rows: -sum(lengths[row] for row in rows))
    apart = max(1, 2 * len(plan) // SURVEYED)
    evenly, longest = by_size[::apart], by_size[: SURVEYED // 2]

    def laid_out(batches: Sequence[list[int]]) -> list[PreferenceBatch]:
        return [lay_out([groups.group(row, 0) for row in rows]) for rows in batches]

    seen = laid_out(evenly)
    largest = max([*seen, *(laid_out(longest) if apart > 1 else ())], key=_size)
    return Workload(
        source=f"{len(groups)} training rows",
        largest=largest,
        single=laid_out([plan[0][:1]])[0],
        positions=sum(batch.input_ids.numel() for batch in seen) / len(seen),
        tokens=sum(batch.tokens for batch in seen) / len(seen),
        micro_batches=min(config.training.gradient_accumulation_steps, len(plan)),
        steps=run_data.schedule(config, len(groups), world_size).total_steps,
        rows=len(groups),
    )


def _size(batch: PreferenceBatch) -> tuple[int, int]:
    return batch.input_ids.numel(), len(batch.token_targets)


def shaped(config: CPOConfig, shape: Shape) -> Workload:
    """Micro-batches of groups that are all alike.

    Raises:
        DataError: they are longer than the configuration lets a row be.
    """
    limit = config.cpo.max_length
    if shape.prompt + shape.completion > limit:
        raise DataError(
            f"--shape: {shape.prompt} and {shape.completion} tokens are more than cpo.max_length "
            f"{limit}; such rows would be truncated"
        )
    training = config.training

    lay_out = run_data.layout(config, pad_id=0)
    batch = lay_out(shape.groups(training.batch_size))
    return Workload(
        source=f"groups of {shape.prompt} prompt and {shape.negatives + 1} × {shape.completion} "
        "completion tokens",
        largest=batch,
        single=lay_out(shape.groups(1)),
        positions=batch.input_ids.numel(),
        tokens=batch.tokens,
        micro_batches=training.gradient_accumulation_steps,
        steps=training.max_steps,
        rows=None,
    )
