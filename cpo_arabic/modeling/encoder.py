"""From hidden states to contrastive embeddings, and what keeps them over steps.

(R) rows  (L) tokens of a row  (H) hidden size  (D) embedding size
(G) groups  (S) completions  (T) completion tokens  (Q) queue slots

The queries and keys are SimCSE's and MoCo's: pooled states, dropout, a two-layer projection head,
L2 normalisation (Gao et al. 2021; He et al. 2020; Chen et al. 2020, MoCo v2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpo_arabic.data.pack import PreferenceBatch


class ProjectionHead(nn.Sequential):
    """Two linear layers with a ReLU between them, (…, H) → (…, D), kept in float32."""

    def __init__(self, hidden_size: int, projection_dim: int) -> None:
        super().__init__(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, projection_dim)
        )


def pool_queries(hidden: Tensor, batch: PreferenceBatch) -> Tensor:
    """(R, L, H) → (G, H): the state of each prompt's last token."""
    return hidden.flatten(0, 1)[batch.prompt_ends]


def pool_keys(hidden: Tensor, batch: PreferenceBatch) -> Tensor:
    """(R, L, H) → (S, H) float32 or wider: the mean over each completion's tokens."""
    states = hidden.flatten(0, 1)[batch.token_positions]
    states = states if states.dtype == torch.float64 else states.float()
    sums = states.new_zeros(len(batch.completion_lengths), states.shape[1])
    sums = sums.index_add(0, batch.token_completions, states)
    return sums / batch.completion_lengths[:, None].to(states.dtype)


@dataclass(frozen=True)
class EmbeddingSettings:
    """How pooled states become embeddings. ``dropout`` is SimCSE's rate, training only."""

    dropout: float
    normalize: bool


def embed(
    pooled: Tensor,
    head: nn.Module | None,
    settings: EmbeddingSettings,
    *,
    dropout_seed: int | None,
) -> Tensor:
    """(N, H) → (N, D): dropout, projection head, L2 normalisation.

    Args:
        pooled: pooled hidden states.
        head: the projection head, or None.
        settings: dropout rate and whether to normalise.
        dropout_seed: seeds this call's mask, so that a second pass over the same batch draws the
            same one; None turns dropout off (evaluation).
    """
    if dropout_seed is not None and settings.dropout > 0:
        generator = torch.Generator(device=pooled.device).manual_seed(dropout_seed)
        uniform = torch.rand(pooled.shape, generator=generator, device=pooled.device)
        pooled = pooled * (uniform >= settings.dropout) / (1 - settings.dropout)
    if head is not None:
        pooled = head(pooled.to(next(head.parameters()).dtype))
    return F.normalize(pooled, dim=-1) if settings.normalize else pooled


class MomentumEncoder:
    """An exponential moving average of exactly the parameters that train (He et al. 2020, eq. 2).

    Only the averages are kept: :meth:`applied` puts them in the model's place and takes them out
    again, so the frozen weights of a LoRA model exist once.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], beta: float) -> None:
        self.beta = beta
        self._parameters = parameters
        self.averages = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average ← beta·average + (1 − beta)·parameter; once an optimizer step."""
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [p.data for p in self._parameters.values()], 1 - self.beta)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model computes with the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data


class EmbeddingQueue:
    """The newest keys of earlier steps: a ring, first in first out, never cloned."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pointer = 0
        self.filled = 0
        self.embeddings: Tensor | None = None  # (Q, D), made from the first keys
        self.labels: Tensor | None = None  # (Q, 3)

    def entries(self) -> tuple[Tensor, Tensor] | None:
        """The filled slots as views, (n, D) and (n, 3); None while the queue is empty."""
        if self.embeddings is None or self.labels is None or self.filled == 0:
            return None
        return self.embeddings[: self.filled], self.labels[: self.filled]

    @torch.no_grad()
    def push(self, embeddings: Tensor, labels: Tensor) -> None:
        """Appends keys in order; more than ``size`` at once keeps the newest ``size``.

        Args:
            embeddings: (N, D), stored detached in their own dtype.
            labels: (N, 3) int64: group, prompt's hash, text's hash. The group is stored as −1:
                groups are numbered within a step.
        """
        if self.embeddings is None or self.labels is None:
            self.embeddings = embeddings.new_zeros(self.size, embeddings.shape[1])
            self.labels = labels.new_zeros(self.size, labels.shape[1])
        embeddings, labels = embeddings[-self.size :], labels[-self.size :].clone()
        labels[:, 0] = -1
        first = min(len(labels), self.size - self.pointer)
        for ring, new in ((self.embeddings, embeddings), (self.labels, labels)):
            ring[self.pointer : self.pointer + first] = new[:first]
            ring[: len(new) - first] = new[first:]
        self.pointer = (self.pointer + len(labels)) % self.size
        self.filled = min(self.filled + len(labels), self.size)
