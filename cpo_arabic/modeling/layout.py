"""Where the trees of a packed batch lie, and what each attention backend derives from that.

(R) rows  (L) tokens of a row  (N) sequences, positions that are read  (Q) queries
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from cpo_arabic.data.pack import Tree, sent

Made = TypeVar("Made")


@dataclass(eq=False)
class TreeLayout:
    """Where the trees of a batch lie, and what attention derives from that once per batch."""

    trees: tuple[Tree, ...]
    rows: int
    length: int
    calls: int = 0  # layers that attended by it
    cache: dict[tuple[Hashable, ...], Any] = field(default_factory=dict, repr=False)

    def once(self, make: Callable[[], Made], *key: Hashable) -> Made:
        """What ``make`` makes, at its first use in this batch."""
        if key not in self.cache:
            self.cache[key] = make()
        made: Made = self.cache[key]
        return made

    @cached_property
    def by_row(self) -> list[list[Tree]]:
        """The trees of each row from left to right."""
        rows: list[list[Tree]] = [[] for _ in range(self.rows)]
        for tree in sorted(self.trees, key=lambda tree: tree.start):
            rows[tree.row].append(tree)
        return rows

    def read_positions(self, device: torch.device) -> Tensor:
        """(N) flat positions of completions and of each prompt's last token, in row order."""

        def make() -> Tensor:
            spans = []
            for tree in chain.from_iterable(self.by_row):
                branches = tree.row * self.length + tree.start + tree.prompt_length
                spans.append(torch.arange(branches - 1, branches + sum(tree.branch_lengths)))
            return sent(torch.cat(spans), device)

        return self.once(make, "read", device)

    def gather_read(self, flat: Tensor) -> Tensor:
        """(R·L, …) → (N, …): the positions that are read."""
        return flat.index_select(0, self.read_positions(flat.device))

    def spread_read(self, read: Tensor) -> Tensor:
        """(N, …) → (R·L, …), zero where nothing reads."""
        flat = read.new_zeros(self.rows * self.length, *read.shape[1:])
        return flat.index_copy(0, self.read_positions(read.device), read)

    def sequences(self, device: torch.device, *, only_read: bool) -> Sequences:
        """The layout for variable-length attention of all queries, or of those that are read."""
        make = partial(Sequences.of, self, device, only_read=only_read)
        return self.once(make, "sequences", device, only_read)

    def path_mask(
        self,
        queries: int,
        before: int,
        window: int | None,
        device: torch.device,
        additive: torch.dtype | None = None,
    ) -> Tensor:
        """:func:`path_mask`, as bool or as what is added to scores of dtype ``additive``."""

        def make() -> Tensor:
            sees = path_mask(queries, before, window, device)
            if additive is None:
                return sees
            zeros = torch.zeros(sees.shape, dtype=additive, device=device)
            return zeros.masked_fill(~sees, torch.finfo(additive).min)

        return self.once(make, "mask", queries, before, window, device, additive)

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The layout for flex attention."""
        return self.once(lambda: block_mask(self, window, device), "blocks", window, device)


def path_mask(queries: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """Which of ``before`` earlier and ``queries`` own keys each query sees, (1, 1, Q, N) bool."""
    query = torch.arange(before, before + queries, device=device)[:, None]
    key = torch.arange(before + queries, device=device)
    sees = key <= query
    if window is not None:
        sees &= key > query - window
    return sees[None, None]


@dataclass(frozen=True)
class Sequences:
    """The batch as N sequences: prompts, branches and the padding at a row's end, in row order.

    Query sequences lie one after another in (R·L), or in :meth:`TreeLayout.read_positions` where
    only these are asked for; key sequences are gathered by ``key_index``. Queries are the last ones
    of their keys' positions ("bottom-right" causal).
    """

    key_index: Tensor  # (ΣN) flat positions, int64
    query_bounds: Tensor  # (N + 1) int32
    key_bounds: Tensor  # (N + 1) int32
    longest_query: int
    longest_key: int

    @staticmethod
    def of(layout: TreeLayout, device: torch.device, *, only_read: bool) -> Sequences:
        """The sequences of a layout."""
        keys: list[Tensor] = []
        queries: list[int] = []
        for row, trees in enumerate(layout.by_row):
            flat = row * layout.length
            end = flat
            for tree in trees:
                prompt = torch.arange(end, end + tree.prompt_length)
                keys.append(prompt)
                queries.append(1 if only_read else tree.prompt_length)
                end += tree.prompt_length
                for length in tree.branch_lengths:
                    keys.append(torch.cat((prompt, torch.arange(end, end + length))))
                    queries.append(length)
                    end += length
            rest = flat + layout.length - end
            if rest and not only_read:
                keys.append(torch.arange(end, end + rest))
                queries.append(rest)
        lengths = [len(key) for key in keys]
        return Sequences(
            key_index=sent(torch.cat(keys), device),
            query_bounds=sent(_bounds(queries), device),
            key_bounds=sent(_bounds(lengths), device),
            longest_query=max(queries),
            longest_key=max(lengths),
        )


def _bounds(lengths: Sequence[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def block_mask(layout: TreeLayout, window: int | None, device: torch.device) -> BlockMask:
    """The whole layout as one block-sparse mask over (R, L, L)."""
    tree = torch.full((layout.rows, layout.length), -1)  # padding is a tree by itself
    segment = torch.zeros_like(tree)  # 0: prompt, then the branches
    place = torch.arange(layout.length).repeat(layout.rows, 1)  # on the path from the root
    for number, each in enumerate(layout.trees):
        end = each.start
        for branch, length in enumerate((each.prompt_length, *each.branch_lengths)):
            here = (each.row, slice(end, end + length))
            first = each.prompt_length if branch else 0
            tree[here] = number
            segment[here] = branch
            place[here] = torch.arange(first, first + length)
            end += length
    tree, segment, place = (sent(x, device) for x in (tree, segment, place))

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_path = (segment[row, key] == 0) | (segment[row, key] == segment[row, query])
        allowed = (tree[row, key] == tree[row, query]) & on_path & (key <= query)
        if window is not None:
            allowed = allowed & (place[row, query] - place[row, key] < window)
        return allowed

    return create_block_mask(
        sees, layout.rows, None, layout.length, layout.length, device=str(device)
    )
