"""What a step works with: micro-batches on the device, and what keeps state over steps.

(G) groups  (K) completions of a group  (S) completions
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from cpo_arabic.data.pack import PreferenceBatch, sent
from cpo_arabic.modeling.encoder import EmbeddingQueue, MomentumEncoder
from cpo_arabic.modeling.policy import Policy, Reference, Wanted
from cpo_arabic.objective.contrastive import key_labels
from cpo_arabic.objective.total import ObjectiveSettings


@dataclass(frozen=True)
class MicroBatch:
    """A batch on the device, with the tables that are cheap to make before it gets there."""

    batch: PreferenceBatch
    table: Tensor  # (G, K) each group's completions, chosen first; −1 where it has fewer
    query_labels: Tensor  # (G, 3)
    key_labels: Tensor  # (S, 3)
    chosen: Tensor  # (G) the chosen completion of each group
    groups: int
    chosen_tokens: int
    tokens: int  # prompt and completion tokens of its rows
    positions: int  # the same and padding


@dataclass
class Engine:
    """What a step works with. ``policy`` is the prepared (possibly distributed) module."""

    accelerator: Accelerator
    policy: torch.nn.Module
    objective: ObjectiveSettings
    reference: Reference | None
    momentum: MomentumEncoder | None
    queue: EmbeddingQueue | None
    seed: int

    @property
    def bare(self) -> Policy:
        """The policy without its distributed wrapper."""
        bare = self.accelerator.unwrap_model(self.policy)
        assert isinstance(bare, Policy)
        return bare

    def reduce(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        total = self.accelerator.reduce(value, reduction="sum")
        assert isinstance(total, Tensor)
        return total


def group_table(completion_groups: Tensor) -> Tensor:
    """(S) groups in order → (G, K) completions of each group, −1 where there are fewer."""
    counts = torch.bincount(completion_groups)
    starts = counts.cumsum(0) - counts
    columns = torch.arange(int(counts.max()))
    return torch.where(columns < counts[:, None], starts[:, None] + columns, -1)


def prepare(batch: PreferenceBatch, device: torch.device) -> MicroBatch:
    """Derives the tables on the host and moves everything to the device, without waiting."""
    table = group_table(batch.completion_groups)
    chosen = table[:, 0]
    groups = torch.arange(len(chosen))
    queries = torch.stack([groups, batch.prompt_keys, batch.completion_keys[chosen]], dim=1)
    keys = key_labels(batch.completion_groups, batch.prompt_keys, batch.completion_keys)
    return MicroBatch(
        batch=batch.to(device, non_blocking=True),
        table=sent(table, device),
        query_labels=sent(queries, device),
        key_labels=sent(keys, device),
        chosen=sent(chosen, device),
        groups=len(chosen),
        chosen_tokens=int(batch.completion_lengths[chosen].sum()),
        tokens=batch.tokens,
        positions=batch.input_ids.numel(),
    )


def wanted(engine: Engine, *, keys: bool) -> Wanted:
    """What the objective needs from a training forward: a weight of 0 asks for nothing."""
    objective = engine.objective
    return Wanted(
        log_probs=objective.preference_weight > 0 or objective.cpo_alpha > 0,
        only_chosen=objective.preference_weight == 0,
        queries=objective.contrastive_weight > 0,
        keys=keys,
    )
