"""The contrastive term over a global batch: every key of the step, known before any backward.

(G) groups  (S) completions  (D) embedding size

The term couples the micro-batches and ranks. With a momentum encoder its keys are known before the
step; without one, the loss's gradient is taken on detached embeddings and handed to each
micro-batch's own backward (GradCache, Gao et al. 2021, sec. 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpo_arabic.modeling.encoder import EmbeddingQueue
from cpo_arabic.modeling.policy import PolicyOutput, Wanted
from cpo_arabic.objective.contrastive import Keys, contrastive_loss
from cpo_arabic.objective.total import Normalisers, term_weights
from cpo_arabic.training.engine import Engine, MicroBatch, wanted
from cpo_arabic.training.metrics import MetricSums


@dataclass(frozen=True)
class Bank:
    """The global batch's keys and this rank's place in it.

    ``gradients`` holds, for each of this rank's micro-batches, the contrastive term's gradient for
    its queries and keys; None where the keys come from the momentum encoder.
    """

    keys: Keys
    key_offsets: list[int]
    group_offsets: list[int]
    gradients: list[tuple[Tensor, Tensor]] | None


def build_bank(
    engine: Engine,
    micro: list[MicroBatch],
    seeds: list[int],
    normalisers: Normalisers,
    counted: bool,
    sums: MetricSums,
) -> tuple[Bank | None, PolicyOutput | None]:
    """The step's keys; and the forward already made, when one served for both."""
    if engine.objective.contrastive_weight == 0:
        return None, None
    first: PolicyOutput | None = None
    if engine.momentum is not None:
        with engine.momentum.applied(), torch.no_grad():
            outputs = _embeddings(engine, micro, seeds, queries=False)
    elif max(_sizes_of_ranks(engine, len(micro))) == 1:  # the same way on every rank
        first = engine.policy(micro[0].batch, wanted(engine, keys=True), seeds[0])
        outputs = [first]
    else:
        with torch.no_grad():
            outputs = _embeddings(engine, micro, seeds, queries=True)
    key_parts = [output.keys.detach() for output in outputs if output.keys is not None]
    groups = [mb.groups for mb in micro]
    key_counts = [len(part) for part in key_parts]
    rank = engine.accelerator.process_index
    groups_of_ranks = _sizes_of_ranks(engine, sum(groups) if counted else 0)
    keys_of_ranks = _sizes_of_ranks(engine, sum(key_counts) if counted else 0)
    # A stand-in is the window's first micro-batch again, so its place is the first.
    group_offsets = _offsets(groups, sum(groups_of_ranks[:rank]) if counted else 0)
    key_offsets = _offsets(key_counts, sum(keys_of_ranks[:rank]) if counted else 0)
    labels = [shifted(mb.key_labels, o) for mb, o in zip(micro, group_offsets, strict=True)]
    bank_keys = Keys(
        embeddings=_gather(engine, torch.cat(key_parts), keys_of_ranks),
        labels=_gather(engine, torch.cat(labels), keys_of_ranks),
    )
    gradients = None
    if engine.momentum is None:
        queries = torch.cat([o.queries.detach() for o in outputs if o.queries is not None])
        gradients = _embedding_gradients(
            engine,
            micro,
            queries,
            bank_keys,
            key_offsets,
            group_offsets,
            normalisers,
            counted,
            sums,
        )
    return Bank(bank_keys, key_offsets, group_offsets, gradients), first


def _embeddings(
    engine: Engine, micro: list[MicroBatch], seeds: list[int], *, queries: bool
) -> list[PolicyOutput]:
    asked = Wanted(queries=queries, keys=True)
    return [engine.bare(mb.batch, asked, seed) for mb, seed in zip(micro, seeds, strict=True)]


def _embedding_gradients(
    engine: Engine,
    micro: list[MicroBatch],
    queries: Tensor,
    keys: Keys,
    key_offsets: list[int],
    group_offsets: list[int],
    normalisers: Normalisers,
    counted: bool,
    sums: MetricSums,
) -> list[tuple[Tensor, Tensor]]:
    """d(weighted contrastive term)/d(queries, keys) of this rank, from the whole global batch.

    Every rank computes its own queries' loss; the keys' gradients are summed over the ranks, since
    a key is a negative of everyone's queries.
    """
    objective = engine.objective
    query_leaf = queries.requires_grad_()
    key_leaf = keys.embeddings.clone().requires_grad_()
    labels = torch.cat(
        [shifted(mb.query_labels, o) for mb, o in zip(micro, group_offsets, strict=True)]
    )
    positives = torch.cat([mb.chosen + o for mb, o in zip(micro, key_offsets, strict=True)])
    output = contrastive_loss(
        query_leaf,
        labels,
        positives,
        Keys(embeddings=key_leaf, labels=keys.labels),
        objective.contrastive,
        queue=queued(engine.queue),
    )
    contrastive_metrics(sums, output.loss, output.correct)
    scale = term_weights(objective)["contrastive"] / normalisers.groups
    total = output.loss.sum() * (scale if counted else 0.0)
    query_gradient, key_gradient = torch.autograd.grad(total, [query_leaf, key_leaf])
    key_gradient = engine.reduce(key_gradient)
    sizes = [len(mb.key_labels) for mb in micro]
    own_keys = key_gradient[key_offsets[0] : key_offsets[0] + sum(sizes)]
    if not counted:
        own_keys = key_gradient.new_zeros(sum(sizes), key_gradient.shape[1])
    by_query = torch.split(query_gradient, [mb.groups for mb in micro])
    return list(zip(by_query, torch.split(own_keys, sizes), strict=True))


def queued(queue: EmbeddingQueue | None) -> Keys | None:
    """The queue's filled slots as keys, None while there are none."""
    entries = queue.entries() if queue is not None else None
    return None if entries is None else Keys(embeddings=entries[0], labels=entries[1])


def contrastive_metrics(sums: MetricSums, loss: Tensor, correct: Tensor) -> None:
    """Adds the term's (B) losses and (B) hits."""
    sums.add("contrastive/loss", loss.sum(), len(loss))
    sums.add("contrastive/accuracy", correct.sum(), len(loss))


def _gather(engine: Engine, tensor: Tensor, sizes: list[int]) -> Tensor:
    """Rows of every rank, rank after rank; ``sizes`` rows of each, a stand-in's being none."""
    if engine.accelerator.num_processes == 1:
        return tensor
    own = tensor[: sizes[engine.accelerator.process_index]]
    padded = own.new_zeros(max(sizes), own.shape[1])
    padded[: len(own)] = own
    everyone: Any = engine.accelerator.gather(padded)
    parts = zip(everyone.split(max(sizes)), sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts])


def _sizes_of_ranks(engine: Engine, size: int) -> list[int]:
    if engine.accelerator.num_processes == 1:
        return [size]
    own = torch.tensor([size], device=engine.accelerator.device)
    gathered: Any = engine.accelerator.gather(own)
    return [int(n) for n in gathered.tolist()]


def _offsets(sizes: list[int], base: int) -> list[int]:
    return [base + sum(sizes[:index]) for index in range(len(sizes))]


def shifted(labels: Tensor, offset: int) -> Tensor:
    """(N, 3) labels with their groups numbered from ``offset`` on."""
    return torch.cat([labels[:, :1] + offset, labels[:, 1:]], dim=1)
