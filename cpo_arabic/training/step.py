"""The gradient of one optimizer step, over its micro-batches and ranks.

(G) groups  (K) completions of a group  (S) completions  (D) embedding size

Normalisers and contrastive negatives are those of the *global* batch, so N micro-batches give the
gradient of one. The contrastive term couples the micro-batches: with a momentum encoder its keys
are known before the step; without one, the loss's gradient is taken on detached embeddings and
handed to each micro-batch's own backward (GradCache, Gao et al. 2021, sec. 3.2).
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cpo_arabic.data.pack import PreferenceBatch
from cpo_arabic.modeling.encoder import EmbeddingQueue, MomentumEncoder
from cpo_arabic.modeling.policy import Policy, PolicyOutput, Reference, Wanted
from cpo_arabic.objective.contrastive import Keys, contrastive_loss, key_labels
from cpo_arabic.objective.preference import completion_scores, preference_loss
from cpo_arabic.objective.total import LossTerms, Normalisers, ObjectiveSettings, total_loss
from cpo_arabic.training.metrics import MetricSums, reward_metrics
from cpo_arabic.training.plan import Share


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
    tokens: int  # prompt and completion tokens of its rows, padding included


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


def group_table(completion_groups: Tensor) -> Tensor:
    """(S) groups in order → (G, K) completions of each group, −1 where there are fewer."""
    counts = torch.bincount(completion_groups)
    starts = counts.cumsum(0) - counts
    columns = torch.arange(int(counts.max()))
    return torch.where(columns < counts[:, None], starts[:, None] + columns, -1)


def prepare(batch: PreferenceBatch, device: torch.device) -> MicroBatch:
    """Derives the tables on the host and moves everything to the device."""
    table = group_table(batch.completion_groups)
    chosen = table[:, 0]
    groups = torch.arange(len(chosen))
    queries = torch.stack([groups, batch.prompt_keys, batch.completion_keys[chosen]], dim=1)
    keys = key_labels(batch.completion_groups, batch.prompt_keys, batch.completion_keys)
    return MicroBatch(
        batch=batch.to(device, non_blocking=True),
        table=table.to(device),
        query_labels=queries.to(device),
        key_labels=keys.to(device),
        chosen=chosen.to(device),
        groups=len(chosen),
        chosen_tokens=int(batch.completion_lengths[chosen].sum()),
        tokens=batch.input_ids.numel(),
    )


def accumulate(engine: Engine, share: Share, step: int) -> tuple[MetricSums, Keys | None]:
    """Adds the step's gradient to the policy's parameters.

    Args:
        engine: policy, objective and what keeps state over steps; nothing of it is changed but
            the gradients.
        share: this rank's micro-batches.
        step: 0-based optimizer step; seeds the dropout masks.

    Returns:
        The sums of the step's metrics, and the global batch's keys for the queue (None when the
        contrastive term is off).
    """
    micro = [prepare(batch, engine.accelerator.device) for batch in share.batches]
    normalisers = _global_sizes(engine, micro, share.counted)
    sums = MetricSums()
    seeds = [_seed(engine, step, index) for index in range(len(micro))]
    bank, first = _contrastive_bank(engine, micro, seeds, normalisers, share.counted, sums)
    for index, mb in enumerate(micro):
        last = index == len(micro) - 1
        with nullcontext() if last else engine.accelerator.no_sync(engine.policy):
            output = first if first is not None else engine.policy(
                mb.batch, wanted(engine, keys=bank is not None and bank.gradients is not None),
                seeds[index],
            )  # fmt: skip
            loss = _micro_loss(engine, mb, output, bank, index, normalisers, sums)
            if not share.counted:
                loss = loss * 0.0
            # Distributed backward averages over ranks; the parts must sum.
            engine.accelerator.backward(loss * engine.accelerator.num_processes)
    return sums, bank.keys if bank is not None else None


def wanted(engine: Engine, *, keys: bool) -> Wanted:
    """What the objective needs from a training forward: a weight of 0 asks for nothing."""
    objective = engine.objective
    return Wanted(
        log_probs=objective.preference_weight > 0 or objective.cpo_alpha > 0,
        only_chosen=objective.preference_weight == 0,
        queries=objective.contrastive_weight > 0,
        keys=keys,
    )


def log_prob_terms(
    objective: ObjectiveSettings,
    mb: MicroBatch,
    log_probs: Tensor,
    reference_log_probs: Tensor | None,
    sums: MetricSums,
    *,
    with_preference: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """The preference and behaviour-cloning sums of a micro-batch, and their metrics."""
    nll = -log_probs[mb.chosen].sum()
    sums.add("nll_loss", nll, mb.chosen_tokens)
    if not with_preference:
        return None, nll
    scores = completion_scores(
        log_probs,
        mb.batch.completion_lengths,
        alpha=objective.alpha,
        reference_log_probs=reference_log_probs,
    )
    present = mb.table >= 0
    place = mb.table.clamp(min=0)
    losses = preference_loss(
        scores[place],
        present,
        loss_type=objective.loss_type,
        beta=objective.beta,
        temperature=objective.temperature,
        gamma=objective.gamma,
        label_smoothing=objective.label_smoothing,
    )
    sums.add("preference_loss", losses.sum(), mb.groups)
    rewards = objective.beta * scores.detach()
    reward_metrics(sums, rewards[place], log_probs.detach()[place], present)
    return losses.sum(), nll


def _micro_loss(
    engine: Engine,
    mb: MicroBatch,
    output: PolicyOutput,
    bank: Bank | None,
    index: int,
    normalisers: Normalisers,
    sums: MetricSums,
) -> Tensor:
    objective = engine.objective
    preference = nll = contrastive = None
    if output.log_probs is not None:
        reference = None
        if engine.reference is not None and objective.preference_weight > 0:
            with engine.accelerator.autocast():
                reference = engine.reference.log_probs(mb.batch)
        preference, nll = log_prob_terms(
            objective, mb, output.log_probs, reference, sums,
            with_preference=objective.preference_weight > 0,
        )  # fmt: skip
    if bank is not None and bank.gradients is None:
        contrastive = _against_bank(engine, mb, output.queries, bank, index, sums)
    terms = LossTerms(
        preference=preference,
        nll=nll if objective.cpo_alpha > 0 else None,
        contrastive=contrastive,
    )
    if bank is None or bank.gradients is None:
        return total_loss(terms, objective, normalisers)
    surrogate = _surrogate(output, bank.gradients[index])
    if terms.preference is None and terms.nll is None:
        return surrogate
    return total_loss(terms, objective, normalisers) + surrogate


def _surrogate(output: PolicyOutput, gradients: tuple[Tensor, Tensor]) -> Tensor:
    """Its gradient for queries and keys is exactly the one that was computed for them."""
    assert output.queries is not None and output.keys is not None
    queries, keys = gradients
    return (output.queries * queries).sum() + (output.keys * keys).sum()


def _against_bank(
    engine: Engine,
    mb: MicroBatch,
    queries: Tensor | None,
    bank: Bank,
    index: int,
    sums: MetricSums,
) -> Tensor:
    assert queries is not None
    labels = _shifted(mb.query_labels, bank.group_offsets[index])
    output = contrastive_loss(
        queries,
        labels,
        mb.chosen + bank.key_offsets[index],
        bank.keys,
        engine.objective.contrastive,
        queue=queued(engine.queue),
    )
    _contrastive_metrics(sums, output.loss, output.correct)
    return output.loss.sum()


def _contrastive_bank(
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
            outputs = [
                _embeddings(engine, mb, s, queries=False)
                for mb, s in zip(micro, seeds, strict=True)
            ]
    elif len(micro) == 1:
        first = engine.policy(micro[0].batch, wanted(engine, keys=True), seeds[0])
        outputs = [first]
    else:
        with torch.no_grad():
            outputs = [
                _embeddings(engine, mb, s, queries=True) for mb, s in zip(micro, seeds, strict=True)
            ]
    key_parts = [output.keys.detach() for output in outputs if output.keys is not None]
    groups = [mb.groups for mb in micro]
    own_groups = sum(groups) if counted else 0
    group_base = _before_this_rank(engine, own_groups)
    group_offsets = _offsets(groups, group_base)
    labels = [_shifted(mb.key_labels, o) for mb, o in zip(micro, group_offsets, strict=True)]
    keys, key_base = _gather(engine, torch.cat(key_parts), counted)
    all_labels, _ = _gather(engine, torch.cat(labels), counted)
    key_offsets = _offsets([len(part) for part in key_parts], key_base)
    bank_keys = Keys(embeddings=keys, labels=all_labels)
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


def _embeddings(engine: Engine, mb: MicroBatch, seed: int, *, queries: bool) -> PolicyOutput:
    output = engine.bare(mb.batch, Wanted(queries=queries, keys=True), seed)
    assert isinstance(output, PolicyOutput)
    return output


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
        [_shifted(mb.query_labels, o) for mb, o in zip(micro, group_offsets, strict=True)]
    )
    positives = torch.cat([mb.chosen + o for mb, o in zip(micro, key_offsets, strict=True)])
    if not counted:
        positives = torch.zeros_like(positives)
    output = contrastive_loss(
        query_leaf,
        labels,
        positives,
        Keys(embeddings=key_leaf, labels=keys.labels),
        objective.contrastive,
        queue=queued(engine.queue),
    )
    if counted:
        _contrastive_metrics(sums, output.loss, output.correct)
    scale = objective.contrastive_weight * objective.contrastive.temperature / normalisers.groups
    total = output.loss.sum() * (scale if counted else 0.0)
    query_gradient, key_gradient = torch.autograd.grad(total, [query_leaf, key_leaf])
    key_gradient = engine.reduce(key_gradient)
    sizes = [len(mb.key_labels) for mb in micro]
    start = key_offsets[0] if counted else 0
    own_keys = key_gradient[start : start + sum(sizes)]
    if not counted:
        own_keys = key_gradient.new_zeros(sum(sizes), key_gradient.shape[1])
    by_batch = query_gradient.split([mb.groups for mb in micro])
    return list(zip(by_batch, own_keys.split(sizes), strict=True))


def queued(queue: EmbeddingQueue | None) -> Keys | None:
    """The queue's filled slots as keys, None while there are none."""
    entries = queue.entries() if queue is not None else None
    return None if entries is None else Keys(embeddings=entries[0], labels=entries[1])


def _contrastive_metrics(sums: MetricSums, loss: Tensor, correct: Tensor) -> None:
    sums.add("contrastive/loss", loss.sum(), len(loss))
    sums.add("contrastive/accuracy", correct.sum(), len(loss))


def _global_sizes(engine: Engine, micro: list[MicroBatch], counted: bool) -> Normalisers:
    groups = sum(mb.groups for mb in micro) if counted else 0
    tokens = sum(mb.chosen_tokens for mb in micro) if counted else 0
    if engine.accelerator.num_processes > 1:
        sizes = torch.tensor([groups, tokens], device=engine.accelerator.device)
        groups, tokens = (int(n) for n in engine.reduce(sizes).tolist())
    return Normalisers(groups=groups, chosen_tokens=tokens)


def _gather(engine: Engine, tensor: Tensor, counted: bool) -> tuple[Tensor, int]:
    """Rows of every rank, rank after rank, and where this rank's begin."""
    if engine.accelerator.num_processes == 1:
        return tensor, 0
    own = tensor if counted else tensor[:0]
    sizes = _sizes_of_ranks(engine, len(own))
    padded = own.new_zeros(max(sizes), own.shape[1])
    padded[: len(own)] = own
    everyone: Any = engine.accelerator.gather(padded)
    parts = [part[:n] for part, n in zip(everyone.split(max(sizes)), sizes, strict=True)]
    return torch.cat(parts), sum(sizes[: engine.accelerator.process_index])


def _before_this_rank(engine: Engine, size: int) -> int:
    if engine.accelerator.num_processes == 1:
        return 0
    return sum(_sizes_of_ranks(engine, size)[: engine.accelerator.process_index])


def _sizes_of_ranks(engine: Engine, size: int) -> list[int]:
    own = torch.tensor([size], device=engine.accelerator.device)
    gathered: Any = engine.accelerator.gather(own)
    return [int(n) for n in gathered.tolist()]


def _offsets(sizes: list[int], base: int) -> list[int]:
    return [base + sum(sizes[:index]) for index in range(len(sizes))]


def _shifted(labels: Tensor, offset: int) -> Tensor:
    return torch.cat([labels[:, :1] + offset, labels[:, 1:]], dim=1)


def _seed(engine: Engine, step: int, index: int) -> int:
    """31 bits from (seed, rank, step, micro-batch): a resumed run draws the same masks."""
    place = (engine.seed, engine.accelerator.process_index, step, index)
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest()) >> 1
