"""The contrastive term: prompts as queries, completions as keys.

(B) queries  (N) keys  (Q) filled queue slots  (D) embedding

    l⁺ = (sim⁺ − margin)/τ,  l⁻_j = sim_j/τ,  w_j = exp(β_h·sim_j) / mean_j exp(β_h·sim_j)
    loss = −l⁺ + log( exp(l⁺) + Σ_j w_j·exp(l⁻_j) )

InfoNCE, Oord et al. 2018 (eq. 4); the weights, Robinson et al. 2021 (eq. 4); the queue, He et
al. 2020; the factor τ on the loss, Chen et al. 2021 (MoCo v3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpo_arabic.kernels import infonce


@dataclass(frozen=True)
class ContrastiveSettings:
    """Constants of the term. ``concentration`` is β_h; 0 is plain InfoNCE."""

    temperature: float
    margin: float
    concentration: float


@dataclass(frozen=True)
class Keys:
    """Keys with what tells true negatives from false ones.

    ``labels`` (N, 3) int64: group, prompt's text hash, completion's text hash. Group −1 is a key of
    an earlier step.
    """

    embeddings: Tensor  # (N, D)
    labels: Tensor  # (N, 3)


@dataclass(frozen=True)
class ContrastiveOutput:
    """Per query: the loss without its factor τ, and whether the positive beats every negative."""

    loss: Tensor  # (B)
    correct: Tensor  # (B) bool


def contrastive_loss(
    queries: Tensor,
    query_labels: Tensor,
    positives: Tensor,
    keys: Keys,
    settings: ContrastiveSettings,
    *,
    queue: Keys | None = None,
) -> ContrastiveOutput:
    """InfoNCE of each query against its own, the other groups' and the queued keys.

    Args:
        queries: (B, D).
        query_labels: (B, 3) int64: group, prompt's hash, hash of the positive's text.
        positives: (B) int64, index of each query's positive in ``keys``.
        keys: of the whole global batch.
        settings: τ_c, margin and β_h.
        queue: keys of earlier steps, detached.
    """
    output = infonce(
        queries,
        keys.embeddings,
        positives,
        temperature=settings.temperature,
        margin=settings.margin,
        concentration=settings.concentration,
        query_labels=query_labels,
        key_labels=keys.labels,
        queue=None if queue is None else queue.embeddings,
        queue_labels=None if queue is None else queue.labels,
    )
    correct = output.positive_similarity > output.hardest_negative
    return ContrastiveOutput(loss=output.loss, correct=correct)


def key_labels(groups: Tensor, prompt_keys: Tensor, completion_keys: Tensor) -> Tensor:
    """(N, 3) labels of a batch's keys from its (S) groups, (G) prompt and (S) completion hashes."""
    return torch.stack([groups, prompt_keys[groups], completion_keys], dim=1)
