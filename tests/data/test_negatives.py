"""The draw of negatives: what each strategy promises, and that nothing else moves it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_arabic.data.negatives import STRATEGIES, Reference, draw_negatives
from cpo_arabic.errors import DataError


@dataclass
class FakePools:
    """Rows as (prompt, easy, hard); texts are numbered apart unless `keys` says otherwise."""

    rows: list[tuple[int, int, int]]
    keys: dict[tuple[int, int], int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def pool_sizes(self, row: int) -> tuple[int, int]:
        return self.rows[row][1:]

    def prompt_key(self, row: int) -> int:
        return self.rows[row][0]

    def completion_keys(self, row: int) -> Sequence[int]:
        _, easy, hard = self.rows[row]
        keys = self.keys or {}
        return [keys.get((row, i), row * 1000 + i) for i in range(1 + easy + hard)]


def draw(pools: FakePools, row: int = 0, **options: object) -> list[Reference]:
    settings_ = {"epoch": 0, "seed": 0, "num_negatives": 2, **options}
    return draw_negatives(pools, row, **settings_)  # type: ignore[arg-type]


def counts(pools: FakePools, draws: int, **options: object) -> Counter[Reference]:
    return Counter(
        reference for epoch in range(draws) for reference in draw(pools, epoch=epoch, **options)
    )


OTHERS = [(number, 1, 0) for number in range(1, 40)]


def test_random_draws_every_own_negative_equally_often() -> None:
    pools = FakePools([(0, 3, 2), *OTHERS])
    seen = counts(pools, 4000, num_negatives=2, strategy="random")
    assert set(seen) == {Reference(0, candidate) for candidate in range(1, 6)}
    for count in seen.values():
        assert count == pytest.approx(4000 * 2 / 5, rel=0.08)


def test_mixed_draws_h_from_the_hard_pool_and_the_rest_from_the_easy_one() -> None:
    pools = FakePools([(0, 4, 5), *OTHERS])
    for epoch in range(200):
        drawn = draw(pools, epoch=epoch, num_negatives=4, strategy="mixed", hard_negative_ratio=0.3)
        assert sum(candidate > 4 for _, candidate in drawn) == 1  # round(1.2)
    seen = counts(pools, 4000, num_negatives=4, strategy="mixed", hard_negative_ratio=0.5)
    for candidate in range(5, 10):
        assert seen[Reference(0, candidate)] == pytest.approx(4000 * 2 / 5, rel=0.08)


def test_hard_takes_the_hardest_and_the_rest_from_what_is_left() -> None:
    pools = FakePools([(0, 2, 4), *OTHERS])
    seen = counts(pools, 3000, num_negatives=3, strategy="hard", hard_negative_ratio=0.6)
    assert seen[Reference(0, 3)] == seen[Reference(0, 4)] == 3000  # h = round(1.8) = 2
    for candidate in (1, 2, 5, 6):
        assert seen[Reference(0, candidate)] == pytest.approx(3000 / 4, rel=0.1)


def test_a_short_pool_is_topped_up_from_the_other_pool_first() -> None:
    few_hard = FakePools([(0, 5, 1), *OTHERS])
    few_easy = FakePools([(0, 1, 5), *OTHERS])
    for epoch in range(50):
        mixed = {"epoch": epoch, "num_negatives": 4, "strategy": "mixed"}
        drawn = draw(few_hard, **mixed, hard_negative_ratio=0.75)
        assert {row for row, _ in drawn} == {0}
        assert sum(candidate == 6 for _, candidate in drawn) == 1
        drawn = draw(few_easy, **mixed, hard_negative_ratio=0.25)
        assert {row for row, _ in drawn} == {0}
        assert Reference(0, 1) in drawn


def test_then_from_other_prompts_equally_often() -> None:
    pools = FakePools([(0, 1, 0), *OTHERS])
    seen = counts(pools, 4000, num_negatives=3)
    assert seen.pop(Reference(0, 1)) == 4000
    assert len(seen) == 39 * 2
    assert max(seen.values()) < 2 * min(seen.values())


def test_a_top_up_never_comes_from_the_same_prompt_nor_repeats_a_text() -> None:
    same_prompt = [(0, 3, 0), (0, 3, 0), (0, 3, 0), (1, 1, 0)]
    pools = FakePools(same_prompt, keys={(3, 0): 2})  # row 3's chosen text equals candidate 2
    for epoch in range(30):
        drawn = draw(pools, epoch=epoch, num_negatives=6)
        assert sorted(drawn) == [(0, 1), (0, 2), (0, 3), (3, 1)]


def test_a_lone_prompt_gives_what_it_has() -> None:
    assert sorted(draw(FakePools([(0, 1, 1)]), num_negatives=5)) == [(0, 1), (0, 2)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 4)), min_size=8,
             max_size=20),
    st.sampled_from(STRATEGIES),
    st.integers(1, 6),
    st.floats(0, 1),
    st.integers(0, 50),
)  # fmt: skip
def test_a_draw_has_k_distinct_texts_and_never_the_chosen_one(
    rows: list[tuple[int, int, int]], strategy: str, k: int, ratio: float, epoch: int
) -> None:
    rows = [*rows, *((100 + extra, 2, 0) for extra in range(3))]
    pools = FakePools(rows)
    drawn = draw(pools, epoch=epoch, num_negatives=k, strategy=strategy, hard_negative_ratio=ratio)
    assert len(drawn) == len(set(drawn)) == k
    assert Reference(0, 0) not in drawn
    assert all(row == 0 or pools.prompt_key(row) != pools.prompt_key(0) for row, _ in drawn)


def test_the_draw_changes_with_seed_epoch_and_row_and_with_nothing_else() -> None:
    pools = FakePools([(number, 6, 6) for number in range(8)])
    options = {"num_negatives": 4, "strategy": "mixed", "hard_negative_ratio": 0.5}
    first = draw(pools, **options)
    assert first == draw(pools, **options)
    assert first != draw(pools, **options, epoch=1)
    assert first != draw(pools, **options, seed=1)
    assert [c for _, c in first] != [c for _, c in draw(pools, 1, **options)]


def test_another_process_draws_the_same() -> None:
    code = (
        "from tests.data.test_negatives import FakePools, draw;"
        "print(draw(FakePools([(n, 3, 3) for n in range(9)]), 2, epoch=5, num_negatives=8))"
    )
    here = draw(FakePools([(n, 3, 3) for n in range(9)]), 2, epoch=5, num_negatives=8)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_an_unknown_strategy_is_refused_by_name() -> None:
    with pytest.raises(DataError, match='"easy" is not one of random, mixed, hard'):
        draw(FakePools([(0, 1, 0)]), strategy="easy")
