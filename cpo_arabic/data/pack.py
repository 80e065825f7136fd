"""Groups of token ids → one PreferenceBatch of plain tensors, and which groups share a batch.

(R) rows  (L) tokens of a row  (G) groups  (S) completions  (T) completion tokens

A group is one prompt and its completions, the chosen one first. The batch says *where* in the rows
everything lies, by flat indices into (R·L), so that nothing downstream depends on the layout:

- ``longest`` and ``max_length``: one completion a row, the prompt repeated before each, padded on
  the right. A plain causal mask is right, since no token sees what lies after it.
- ``packed``: a group is a tree (prompt, then branches that see the prompt and themselves), and
  several trees share a row. ``trees`` tells the attention where they lie.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from cpo_arabic.errors import DataError

Padding = Literal["max_length", "longest", "packed"]

WINDOW_BATCHES = 32
"""Batches whose rows ``plan_batches`` may exchange with each other to even out their lengths."""

SPARE_ROWS = 8
"""How many rows above the fewest :func:`pack_rows` tries: with more, padding is small anyway."""


@dataclass(frozen=True)
class TokenizedGroup:
    """One prompt and its completions as token ids; ``completion_ids[0]`` is the chosen one.

    ``prompt_key`` and ``completion_keys`` are 63-bit hashes of the (NFC, stripped) texts: equal
    texts have equal keys. They find false negatives. ``row`` is the record's number in its split.
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    prompt_key: int
    completion_keys: list[int]


@dataclass(frozen=True)
class Tree:
    """Where one group lies in a packed row: prompt at [start, start + prompt_length), then the
    branches one after another, ``branch_lengths`` tokens each."""

    row: int
    start: int
    prompt_length: int
    branch_lengths: tuple[int, ...]


@dataclass(frozen=True)
class PreferenceBatch:
    """What one forward and its losses need. All index tensors are int64.

    What is compared or looked up on the host stays there when the batch is sent to a device: a GPU
    that is asked for it has to finish its work first.
    """

    input_ids: Tensor  # (R, L)
    position_ids: Tensor  # (R, L) restart after the prompt in every branch
    trees: tuple[Tree, ...] | None  # None: one completion a row, causal attention is enough
    token_targets: Tensor  # (T) the completion tokens, completion after completion
    token_predictors: Tensor  # (T) flat position whose hidden state predicts the token
    token_positions: Tensor  # (T) flat position of the token itself
    token_completions: Tensor  # (T) its completion, in [0, S)
    completion_lengths: Tensor  # (S) tokens of each completion
    chosen_tokens: Tensor  # the chosen completions' tokens, in [0, T)
    prompt_ends: Tensor  # (G) flat position of the prompt's last token
    completion_groups: Tensor  # (S) its group, in [0, G); on the host
    completion_keys: Tensor  # (S) text hashes; on the host
    prompt_keys: Tensor  # (G) text hashes; on the host
    group_rows: Tensor  # (G) the record's row number; on the host
    tokens: int  # prompt and completion tokens of its rows, without padding

    @property
    def padding_share(self) -> float:
        """Padded positions / all positions."""
        return 1.0 - self.tokens / self.input_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """The batch with its tensors on ``device``, but for those of the host."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PreferenceBatch:
        """The batch in page-locked memory, from where ``to(..., non_blocking=True)`` overlaps."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> PreferenceBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(value)
            for name, value in values.items()
            if isinstance(value, Tensor) and name not in _ON_HOST
        }
        return replace(self, **changed)


_ON_HOST = {"completion_groups", "completion_keys", "prompt_keys", "group_rows"}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``, without waiting for it: from page-locked memory where it is a GPU."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def collate(
    groups: Sequence[TokenizedGroup],
    *,
    padding: Padding,
    pad_id: int,
    max_length: int,
    max_tokens_per_row: int | None,
) -> PreferenceBatch:
    """Lay the groups out in rows; they keep their order in every numbering, whatever row they get.

    ``max_length`` is the row length of ``padding="max_length"``, ``max_tokens_per_row`` the budget
    of a packed row (see :func:`pack_rows`; None: one row takes all, and has no padding); each is
    unused by the other layouts. In the layouts with one completion a row, ``prompt_ends`` points
    into the chosen completion's row.
    """
    _refuse_empty(groups)
    if padding == "packed":
        places = _places_in_trees(groups, max_tokens_per_row)
    else:
        places = _places_in_rows(groups, max_length if padding == "max_length" else None)
    return _batch(groups, places, pad_id)


def pack_rows(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Share out items of ``sizes`` tokens over rows of at most ``budget`` tokens, hardly padded.

    First-fit-decreasing finds how few rows there can be. The longest row sets the width of all, so
    items are then dealt largest first to the emptiest row, for that number of rows and for up to
    ``SPARE_ROWS`` more; the arrangement of the smallest area (rows × width) is taken, of equal ones
    that with the fewest rows. An item above the budget raises the budget of this batch to its
    size: the rows are as wide as it anyway. Deterministic; items in a row and rows by their first
    item are in the order given.
    """
    budget = max(budget, *sizes)
    largest_first = sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))
    fitted = _first_fit(largest_first, sizes, budget)
    counts = range(len(fitted), min(len(fitted) + SPARE_ROWS, len(sizes)) + 1)
    dealt = [_deal(largest_first, sizes, rows=n, capacity=len(sizes)) for n in counts]

    def area(rows: list[list[int]]) -> int:
        return len(rows) * _width(rows, sizes)

    within = [rows for rows in (fitted, *dealt) if _width(rows, sizes) <= budget]
    return sorted(sorted(row) for row in min(within, key=area))


def _first_fit(items: Iterable[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Each item goes to the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in items:
        row = next((r for r, left in enumerate(room) if left >= sizes[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


def _width(rows: Iterable[list[int]], sizes: Sequence[int]) -> int:
    return max(sum(sizes[item] for item in row) for row in rows)


def plan_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, padding: Padding
) -> list[list[int]]:
    """Which rows of the data set make which micro-batch: a pure function of (seed, epoch).

    Every row occurs once and every batch has ``batch_size`` rows, save that the last takes what is
    left. Rows are shuffled; then, within windows of ``WINDOW_BATCHES`` batches only, ``longest``
    puts rows of like length together (little padding), and ``packed`` gives every batch about the
    same number of tokens (packed rows equally full, peak memory even). The order of the batches in
    a window is shuffled again, so that no epoch runs from short to long.
    """
    shuffler = random.Random(f"batches of seed {seed}, epoch {epoch}")
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    whole = len(order) - len(order) % batch_size

    batches: list[list[int]] = []
    for start in range(0, whole, WINDOW_BATCHES * batch_size):
        window = order[start : min(start + WINDOW_BATCHES * batch_size, whole)]
        if padding != "max_length":
            window.sort(key=lambda row: -lengths[row])  # stable: ties stay shuffled
        count = len(window) // batch_size
        if padding == "packed":
            made = _deal(window, lengths, rows=count, capacity=batch_size)
        else:
            made = [window[i * batch_size : (i + 1) * batch_size] for i in range(count)]
        shuffler.shuffle(made)
        batches += made
    return batches + [order[whole:]] * (whole < len(order))


def _deal(
    items: Iterable[int], sizes: Sequence[int], *, rows: int, capacity: int
) -> list[list[int]]:
    """Give the items one by one to the row that has the fewest tokens and still has a place."""
    dealt: list[list[int]] = [[] for _ in range(rows)]
    emptiest = [(0, row) for row in range(rows)]
    for item in items:
        load, row = heapq.heappop(emptiest)
        dealt[row].append(item)
        if len(dealt[row]) < capacity:
            heapq.heappush(emptiest, (load + sizes[item], row))
    return dealt


@dataclass(frozen=True)
class _Places:
    """Flat positions in (R·L). Prompts may have several copies, completions have one."""

    shape: tuple[int, int]  # R, L
    prompt_copies: list[tuple[int, int]]  # group, flat start
    own_prompts: list[int]  # (S) flat start of the prompt copy each completion continues
    completions: list[int]  # (S) flat start
    trees: tuple[Tree, ...] | None


def _places_in_rows(groups: Sequence[TokenizedGroup], length: int | None) -> _Places:
    """One completion a row after its own copy of the prompt; ``length`` None: the longest's."""
    owners = [g for g, group in enumerate(groups) for _ in group.completion_ids]
    prompts = [len(groups[g].prompt_ids) for g in owners]
    ends = [p + len(ids) for p, ids in zip(prompts, _completions(groups), strict=True)]
    width = max(ends) if length is None else length
    if (worst := max(ends)) > width:
        row = groups[owners[ends.index(worst)]].row
        raise DataError(
            f"row {row}: prompt and completion have {worst} tokens and max_length is {width}. "
            "Truncate, or raise max_length."
        )
    starts = [row * width for row in range(len(owners))]
    return _Places(
        shape=(len(owners), width),
        prompt_copies=list(zip(owners, starts, strict=True)),
        own_prompts=starts,
        completions=[start + p for start, p in zip(starts, prompts, strict=True)],
        trees=None,
    )


def _places_in_trees(groups: Sequence[TokenizedGroup], budget: int | None) -> _Places:
    """Every group once, as a tree, several trees to a row."""
    branches = [tuple(map(len, group.completion_ids)) for group in groups]
    sizes = [len(g.prompt_ids) + sum(b) for g, b in zip(groups, branches, strict=True)]
    rows = [list(range(len(groups)))] if budget is None else pack_rows(sizes, budget)
    width = max(sum(sizes[g] for g in row) for row in rows)

    trees: dict[int, Tree] = {}
    for r, row in enumerate(rows):
        start = 0
        for g in row:
            trees[g] = Tree(r, start, len(groups[g].prompt_ids), branches[g])
            start += sizes[g]
    own_prompts: list[int] = []
    completions: list[int] = []
    for g in range(len(groups)):
        flat = trees[g].row * width + trees[g].start
        branch = flat + trees[g].prompt_length
        for length in branches[g]:
            own_prompts.append(flat)
            completions.append(branch)
            branch += length
    return _Places(
        shape=(len(rows), width),
        prompt_copies=[(g, trees[g].row * width + trees[g].start) for g in range(len(groups))],
        own_prompts=own_prompts,
        completions=completions,
        trees=tuple(trees[g] for g in range(len(groups))),
    )


def _batch(groups: Sequence[TokenizedGroup], places: _Places, pad_id: int) -> PreferenceBatch:
    """Tensors from places: the same arithmetic for every layout."""
    targets = _int64(chain.from_iterable(_completions(groups)))  # (T)
    lengths = _int64(len(ids) for ids in _completions(groups))  # (S)
    owners = _int64(g for g, group in enumerate(groups) for _ in group.completion_ids)  # (S)
    first = torch.ones_like(owners, dtype=torch.bool)
    first[1:] = owners[1:] != owners[:-1]

    prompt_lengths = _int64(len(group.prompt_ids) for group in groups)  # (G)
    ends = _int64(places.own_prompts) + prompt_lengths[owners] - 1  # (S)
    completions, offsets = _enumerate_runs(lengths)
    positions = _int64(places.completions)[completions] + offsets
    predictors = torch.where(offsets == 0, ends[completions], positions - 1)

    copied = [groups[g].prompt_ids for g, _ in places.prompt_copies]
    copies, prompt_offsets = _enumerate_runs(_int64(map(len, copied)))
    prompt_positions = _int64(start for _, start in places.prompt_copies)[copies] + prompt_offsets

    rows, width = places.shape
    input_ids = torch.full((rows * width,), pad_id, dtype=torch.int64)
    input_ids[prompt_positions] = _int64(chain.from_iterable(copied))
    input_ids[positions] = targets
    if places.trees is None:  # padding counts on: a restart would read as packing
        position_ids = torch.arange(width).repeat(rows)
    else:
        position_ids = torch.zeros_like(input_ids)
        position_ids[prompt_positions] = prompt_offsets
        position_ids[positions] = prompt_lengths[owners][completions] + offsets

    return PreferenceBatch(
        input_ids=input_ids.view(rows, width),
        position_ids=position_ids.view(rows, width),
        trees=places.trees,
        token_targets=targets,
        token_predictors=predictors,
        token_positions=positions,
        token_completions=completions,
        completion_lengths=lengths,
        chosen_tokens=first[completions].nonzero()[:, 0],
        prompt_ends=ends[first],
        completion_groups=owners,
        completion_keys=_int64(chain.from_iterable(group.completion_keys for group in groups)),
        prompt_keys=_int64(group.prompt_key for group in groups),
        group_rows=_int64(group.row for group in groups),
        tokens=len(prompt_positions) + len(positions),
    )


def _refuse_empty(groups: Sequence[TokenizedGroup]) -> None:
    """An empty prompt predicts nothing, an empty completion has no score."""
    if not groups:
        raise DataError("a batch needs at least one group")
    for group in groups:
        if not group.prompt_ids:
            raise DataError(f"row {group.row}: the prompt has no tokens, it needs at least one")
        if not group.completion_ids or not all(group.completion_ids):
            raise DataError(f"row {group.row}: every completion needs at least one token")
        if len(group.completion_keys) != len(group.completion_ids):
            raise DataError(f"row {group.row}: one key is needed for each completion")


def _completions(groups: Sequence[TokenizedGroup]) -> Iterable[list[int]]:
    return chain.from_iterable(group.completion_ids for group in groups)


def _int64(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _enumerate_runs(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (N) → for every element of the runs: which run, and how far into it.

    ``[2, 3]`` → ``[0, 0, 1, 1, 1]``, ``[0, 1, 0, 1, 2]``.
    """
    runs = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    starts = lengths.cumsum(0) - lengths
    return runs, torch.arange(len(runs)) - starts[runs]
