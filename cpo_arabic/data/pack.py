"""Groups of token ids → one PreferenceBatch of plain tensors.

(R) rows  (L) tokens of a row  (G) groups  (S) completions  (T) completion tokens

A group is one prompt and its completions, the chosen one first. The batch says *where* in the rows
everything lies, by flat indices into (R·L), so that nothing downstream depends on the layout:

- ``longest`` and ``max_length``: one completion a row, the prompt repeated before each, padded on
  the right. A plain causal mask is right, since no token sees what lies after it.
- ``packed``: a group is a tree (prompt, then branches that see the prompt and themselves), and
  several trees share a row. ``trees`` tells the attention where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """What one forward and its losses need. All index tensors are int64."""

    input_ids: Tensor  # (R, L)
    position_ids: Tensor  # (R, L) restart after the prompt in every branch
    trees: tuple[Tree, ...] | None  # None: one completion a row, causal attention is enough
    token_targets: Tensor  # (T) the completion tokens, completion after completion
    token_predictors: Tensor  # (T) flat position whose hidden state predicts the token
    token_positions: Tensor  # (T) flat position of the token itself
    token_completions: Tensor  # (T) its completion, in [0, S)
    completion_lengths: Tensor  # (S) tokens of each completion
    completion_groups: Tensor  # (S) its group, in [0, G)
    completion_chosen: Tensor  # (S) bool
    completion_keys: Tensor  # (S) text hashes
    prompt_ends: Tensor  # (G) flat position of the prompt's last token
    prompt_keys: Tensor  # (G) text hashes
    group_rows: Tensor  # (G) the record's row number
    padding_share: float  # padded positions / all positions
