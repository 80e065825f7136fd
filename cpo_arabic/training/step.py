"""The gradient of one optimizer step, over its micro-batches and ranks.

(G) groups  (K) completions of a group  (S) completions

Normalisers and contrastive negatives are those of the *global* batch, so N micro-batches give the
gradient of one.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

import torch
from torch import Tensor

from cpo_arabic.modeling.policy import PolicyOutput
from cpo_arabic.objective.contrastive import Keys, contrastive_loss
from cpo_arabic.objective.preference import completion_scores, preference_loss
from cpo_arabic.objective.total import LossTerms, Normalisers, ObjectiveSettings, total_loss
from cpo_arabic.training.bank import Bank, build_bank, contrastive_metrics, queued, shifted
from cpo_arabic.training.engine import Engine, MicroBatch, prepare, wanted
from cpo_arabic.training.metrics import MetricSums, reward_metrics
from cpo_arabic.training.plan import Share


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
    bank, first = build_bank(engine, micro, seeds, normalisers, share.counted, sums)
    for index, mb in enumerate(micro):
        tokens = torch.full((), float(mb.tokens), device=engine.accelerator.device)
        sums.add("fill_ratio", tokens, mb.positions)
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
    if not share.counted:
        sums.empty()
    return sums, bank.keys if bank is not None else None


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
    labels = shifted(mb.query_labels, bank.group_offsets[index])
    output = contrastive_loss(
        queries,
        labels,
        mb.chosen + bank.key_offsets[index],
        bank.keys,
        engine.objective.contrastive,
        queue=queued(engine.queue),
    )
    contrastive_metrics(sums, output.loss, output.correct)
    return output.loss.sum()


def _global_sizes(engine: Engine, micro: list[MicroBatch], counted: bool) -> Normalisers:
    groups = sum(mb.groups for mb in micro) if counted else 0
    tokens = sum(mb.chosen_tokens for mb in micro) if counted else 0
    if engine.accelerator.num_processes > 1:
        sizes = torch.tensor([groups, tokens], device=engine.accelerator.device)
        groups, tokens = (int(n) for n in engine.reduce(sizes).tolist())
    return Normalisers(groups=groups, chosen_tokens=tokens)


def _seed(engine: Engine, step: int, index: int) -> int:
    """31 bits from (seed, rank, step, micro-batch): a resumed run draws the same masks."""
    place = (engine.seed, engine.accelerator.process_index, step, index)
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest()) >> 1
