"""Which negatives a group gets: a pure function of (seed, epoch, row).

With k = ``num_negatives`` and h = round(k · ``hard_negative_ratio``):

- ``random``: k without replacement from both pools together;
- ``mixed``: h uniformly from the hard pool, the rest uniformly from the easy pool;
- ``hard``: the h hardest of the hard pool (its order), the rest uniformly from what is left.

A pool that runs short is topped up from the group's other pool, then from other prompts'
completions, never one of the same prompt, never a text that the group already holds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from cpo_arabic.errors import DataError

Strategy = Literal["random", "mixed", "hard"]
STRATEGIES: tuple[Strategy, ...] = ("random", "mixed", "hard")


class Reference(NamedTuple):
    """A completion by its row and its number there: 0 chosen, then easy, then hard ones."""

    row: int
    candidate: int


class Pools(Protocol):
    """What the draw may know of the data: counts and text hashes, never a text."""

    def __len__(self) -> int: ...

    def pool_sizes(self, row: int) -> tuple[int, int]:
        """Easy and hard negatives of a row."""

    def prompt_key(self, row: int) -> int:
        """Hash of the row's prompt."""

    def completion_keys(self, row: int) -> Sequence[int]:
        """Hashes of the row's completions, the chosen one first."""


def draw_negatives(
    pools: Pools,
    row: int,
    *,
    epoch: int,
    seed: int,
    num_negatives: int,
    strategy: str = "random",
    hard_negative_ratio: float = 0.0,
) -> list[Reference]:
    """Draw the negatives of one group; fewer than asked only where no other prompt can help."""
    generator = random.Random(f"negatives:{seed}:{epoch}:{row}")
    easy_count, hard_count = pools.pool_sizes(row)
    easy = list(range(1, 1 + easy_count))
    hard = list(range(1 + easy_count, 1 + easy_count + hard_count))
    wanted_hard = round(num_negatives * hard_negative_ratio)

    if strategy == "random":
        own = _take(generator, easy + hard, num_negatives)
    elif strategy == "mixed":
        own = _take(generator, hard, wanted_hard)
        own += _take(generator, easy, num_negatives - len(own))
        left = [candidate for candidate in hard if candidate not in own]
        own += _take(generator, left, num_negatives - len(own))
    elif strategy == "hard":
        own = hard[:wanted_hard]
        left = easy + hard[wanted_hard:]
        own += _take(generator, left, num_negatives - len(own))
    else:
        known = ", ".join(STRATEGIES)
        raise DataError(f'negative_sampling_strategy "{strategy}" is not one of {known}.')

    drawn = [Reference(row, candidate) for candidate in own]
    return drawn + _foreign(pools, row, generator, num_negatives - len(drawn))


def _take(generator: random.Random, pool: Sequence[int], count: int) -> list[int]:
    return generator.sample(pool, min(count, len(pool)))


def _foreign(pools: Pools, row: int, generator: random.Random, count: int) -> list[Reference]:
    """Completions of other prompts, without any text that the group holds already."""
    if count <= 0:
        return []
    taken = set(pools.completion_keys(row))
    prompt = pools.prompt_key(row)
    found: list[Reference] = []

    def accept(other: int, candidate: int) -> bool:
        key = pools.completion_keys(other)[candidate]
        if pools.prompt_key(other) == prompt or key in taken:
            return False
        taken.add(key)
        found.append(Reference(other, candidate))
        return True

    rows = len(pools)
    for _ in range(20 * count):  # nearly always a few tries
        if len(found) == count:
            return found
        other = generator.randrange(rows)
        accept(other, generator.randrange(len(pools.completion_keys(other))))
    # Few other prompts: look at every completion once, from a random place on.
    start = generator.randrange(rows)
    for step in range(rows):
        other = (start + step) % rows
        for candidate in range(len(pools.completion_keys(other))):
            if len(found) == count:
                return found
            accept(other, candidate)
    return found
