"""collate says where everything is; these tests read it back and compare with what went in."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_arabic.data.pack import (
    WINDOW_BATCHES,
    Padding,
    PreferenceBatch,
    TokenizedGroup,
    collate,
    pack_rows,
    plan_batches,
)
from cpo_arabic.errors import DataError

PAD = 99
LAYOUTS: tuple[Padding, ...] = ("longest", "max_length", "packed")


def group(row: int, prompt: list[int], *completions: list[int]) -> TokenizedGroup:
    return TokenizedGroup(
        row=row,
        prompt_ids=prompt,
        completion_ids=list(completions),
        prompt_key=1000 + row,
        completion_keys=[10 * row + i for i in range(len(completions))],
    )


def lay_out(groups: list[TokenizedGroup], padding: Padding, budget: int = 16) -> PreferenceBatch:
    return collate(groups, padding=padding, pad_id=PAD, max_length=24, max_tokens_per_row=budget)


TWO = [group(7, [1, 2, 3], [4, 5], [6]), group(3, [8], [9, 10, 11])]


def test_longest_gives_every_completion_a_row_after_its_own_copy_of_the_prompt() -> None:
    batch = lay_out(TWO, "longest")
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 6, PAD],
        [8, 9, 10, 11, PAD],
    ]
    assert batch.trees is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert batch.token_targets.tolist() == [4, 5, 6, 9, 10, 11]
    assert batch.token_positions.tolist() == [3, 4, 8, 11, 12, 13]
    assert batch.token_predictors.tolist() == [2, 3, 7, 10, 11, 12]
    assert batch.prompt_ends.tolist() == [2, 10]  # in the chosen completion's row
    assert batch.padding_share == pytest.approx(2 / 15)


def test_max_length_is_longest_padded_further() -> None:
    batch = lay_out(TWO, "max_length")
    assert batch.input_ids.shape == (3, 24)
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4, 5] + [PAD] * 19
    assert batch.position_ids[0].tolist() == list(range(24))
    assert batch.prompt_ends.tolist() == [2, 48]


def test_packed_holds_each_prompt_once_and_restarts_positions_in_every_branch() -> None:
    batch = lay_out(TWO, "packed")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 8, 9, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert batch.token_predictors.tolist() == [2, 3, 2, 6, 7, 8]  # both branches from position 2
    assert batch.prompt_ends.tolist() == [2, 6]
    assert batch.padding_share == 0.0
    assert batch.trees is not None
    assert [(t.row, t.start, t.prompt_length, t.branch_lengths) for t in batch.trees] == [
        (0, 0, 3, (2, 1)),
        (0, 6, 1, (3,)),
    ]


@pytest.mark.parametrize("padding", LAYOUTS)
def test_numbering_follows_the_groups_given_in_every_layout(padding: Padding) -> None:
    batch = lay_out(TWO, padding)
    assert batch.group_rows.tolist() == [7, 3]
    assert batch.prompt_keys.tolist() == [1007, 1003]
    assert batch.completion_groups.tolist() == [0, 0, 1]
    assert batch.chosen_tokens.tolist() == [0, 1, 3, 4, 5]
    assert batch.completion_lengths.tolist() == [2, 1, 3]
    assert batch.completion_keys.tolist() == [70, 71, 30]
    assert batch.token_completions.tolist() == [0, 0, 1, 2, 2, 2]


def test_keys_keep_63_bits() -> None:
    large = TokenizedGroup(0, [1], [[2]], 2**63 - 1, [2**63 - 2])
    batch = lay_out([large], "packed")
    assert batch.prompt_keys.item() == 2**63 - 1
    assert batch.completion_keys.item() == 2**63 - 2


tokens = st.integers(0, 50)
group_lists = st.lists(
    st.builds(
        lambda row, prompt, completions: group(row, prompt, *completions),
        st.integers(0, 10**6),
        st.lists(tokens, min_size=1, max_size=9),
        st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=150, deadline=None)
@given(groups=group_lists, padding=st.sampled_from(LAYOUTS), budget=st.integers(1, 80))
def test_every_prompt_and_completion_can_be_read_back(
    groups: list[TokenizedGroup], padding: Padding, budget: int
) -> None:
    batch = lay_out(groups, padding, budget)
    ids, places = batch.input_ids.flatten(), batch.position_ids.flatten()
    completions = [ids for g in groups for ids in g.completion_ids]
    owners = [g for g, each in enumerate(groups) for _ in each.completion_ids]
    taken: list[int] = []
    for s, wanted in enumerate(completions):
        prompt = groups[owners[s]].prompt_ids
        mine = batch.token_completions == s
        positions, predictors = batch.token_positions[mine], batch.token_predictors[mine]
        assert ids[positions].tolist() == batch.token_targets[mine].tolist() == wanted
        assert predictors[1:].tolist() == positions[:-1].tolist()
        end = int(predictors[0])  # the prompt's last token, wherever this completion's copy is
        assert ids[end - len(prompt) + 1 : end + 1].tolist() == prompt
        path = places[end - len(prompt) + 1 : end + 1].tolist() + places[positions].tolist()
        assert path == list(range(len(prompt) + len(wanted)))
        assert (positions // batch.input_ids.shape[1]).unique().tolist() == [
            end // batch.input_ids.shape[1]
        ]
        if s == owners.index(owners[s]):  # the chosen one
            assert batch.prompt_ends[owners[s]] == end
        taken += positions.tolist() + list(range(end - len(prompt) + 1, end + 1))
    assert batch.token_targets.numel() == sum(map(len, completions))

    unused = torch.ones_like(ids, dtype=torch.bool)
    unused[torch.tensor(taken)] = False
    assert (ids[unused] == PAD).all()
    assert batch.padding_share == pytest.approx(unused.float().mean().item(), abs=1e-6)
    repeats = Counter(taken)
    if padding != "packed":
        assert set(repeats.values()) == {1}


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), budget=st.integers(1, 60))
def test_packed_rows_keep_the_budget_and_hold_everything_once(
    sizes: list[int], budget: int
) -> None:
    rows = pack_rows(sizes, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(row for row in rows)
    assert max(sum(sizes[i] for i in row) for row in rows) <= max(budget, *sizes)
    assert rows == pack_rows(sizes, budget)


def test_rows_are_evened_out_because_the_longest_sets_the_width_of_all() -> None:
    # first-fit-decreasing alone: 6 + 4, and 2; the second row would be 8 tokens of padding
    assert pack_rows([6, 4, 2], 10) == [[0], [1, 2]]


def test_more_rows_are_taken_where_they_leave_less_padding() -> None:
    # three rows, of which the widest has two items: 3 × 20; five rows of one item each: 5 × 10
    assert pack_rows([10] * 5, 20) == [[0], [1], [2], [3], [4]]
    # no more rows where they would save nothing
    assert len(pack_rows([10] * 4, 20)) == 2


def test_a_group_above_the_budget_widens_the_rows_of_its_batch() -> None:
    assert pack_rows([30, 5, 5, 5], 10) == [[0], [1, 2, 3]]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), max_size=200),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    padding=st.sampled_from(LAYOUTS),
)
def test_a_plan_holds_every_row_once_in_full_batches_but_the_last(
    lengths: list[int], size: int, seed: int, epoch: int, padding: Padding
) -> None:
    plan = plan_batches(lengths, size, seed, epoch, padding)
    assert sorted(row for batch in plan for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in plan[:-1])
    assert not plan or 1 <= len(plan[-1]) <= size
    assert plan == plan_batches(lengths, size, seed, epoch, padding)


@pytest.mark.parametrize("padding", LAYOUTS)
def test_the_plan_changes_with_seed_and_epoch(padding: Padding) -> None:
    lengths = [1 + (37 * i) % 101 for i in range(300)]
    plans = [plan_batches(lengths, 4, seed, epoch, padding) for seed, epoch in ((0, 0), (0, 1))]
    plans.append(plan_batches(lengths, 4, 1, 0, padding))
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_plans_are_the_same_on_every_machine() -> None:
    """A resumed run continues the order, so it must not change between versions."""
    assert plan_batches([5, 1, 4, 2, 3], 2, 0, 0, "packed") == [[0, 1], [4, 3], [2]]


def test_longest_puts_like_lengths_together_but_only_within_a_window() -> None:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 500, (4 * 8 * WINDOW_BATCHES,), generator=rng).tolist()

    def spread(padding: Padding) -> float:
        plan = plan_batches(lengths, 8, 0, 0, padding)
        padded = sum(len(b) * max(lengths[i] for i in b) for b in plan)
        return padded / sum(lengths)

    assert spread("longest") < 1.05 < 1.5 < spread("max_length")
    plan = plan_batches(lengths, 8, 0, 0, "longest")
    firsts = [max(lengths[i] for i in batch) for batch in plan]
    assert sorted(firsts) != firsts and sorted(firsts, reverse=True) != firsts


def test_packed_batches_have_nearly_equal_totals() -> None:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 500, (4 * 8 * WINDOW_BATCHES,), generator=rng).tolist()

    def spread(padding: Padding) -> float:
        totals = [sum(lengths[i] for i in b) for b in plan_batches(lengths, 8, 0, 0, padding)]
        return max(totals) / min(totals)

    assert spread("packed") < 1.15 < 1.5 < spread("max_length")


def test_refusals_name_the_row() -> None:
    with pytest.raises(DataError, match="row 5: the prompt has no tokens"):
        lay_out([group(5, [], [1])], "packed")
    with pytest.raises(DataError, match="row 6: every completion needs"):
        lay_out([group(6, [1], [2], [])], "packed")
    with pytest.raises(DataError, match="row 6: every completion needs"):
        lay_out([group(6, [1])], "packed")
    with pytest.raises(DataError, match="row 8: one key"):
        lay_out([TokenizedGroup(8, [1], [[2]], 0, [])], "packed")
    with pytest.raises(DataError, match=r"row 4: prompt and completion have 30 tokens .* is 24"):
        lay_out([group(3, [1], [2]), group(4, [1] * 20, [2], [3] * 10)], "max_length")
    with pytest.raises(DataError, match="at least one group"):
        lay_out([], "longest")


def test_to_moves_what_the_model_reads_and_leaves_labels_on_the_host() -> None:
    batch = lay_out(TWO, "packed")
    moved = batch.to("meta", non_blocking=True)
    tensors = {n: v for n, v in vars(moved).items() if isinstance(v, torch.Tensor)}
    stay = {name for name, value in tensors.items() if value.device.type == "cpu"}
    assert stay == {"completion_groups", "completion_keys", "prompt_keys", "group_rows"}
    assert moved.trees == batch.trees
    assert moved.padding_share == batch.padding_share
    assert batch.input_ids.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_pin_memory_pins() -> None:
    assert lay_out(TWO, "packed").pin_memory().input_ids.is_pinned()
