"""Held-out metrics and samples.

(G) groups  (S) completions
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cpo_arabic.data.pack import PreferenceBatch
from cpo_arabic.modeling.policy import Policy, Reference, Wanted, causal_lm
from cpo_arabic.objective.contrastive import Keys, contrastive_loss
from cpo_arabic.objective.total import LossTerms, Normalisers, ObjectiveSettings, total_loss
from cpo_arabic.training.engine import prepare
from cpo_arabic.training.metrics import MetricSums
from cpo_arabic.training.step import log_prob_terms


@torch.no_grad()
def evaluate(
    policy: Policy,
    batches: Iterable[PreferenceBatch],
    objective: ObjectiveSettings,
    *,
    accelerator: Accelerator,
    reference: Reference | None,
) -> dict[str, float]:
    """Means over the held-out groups, named ``eval_…``.

    Log-probabilities and rewards are always measured, whatever the weights; the contrastive term
    only where it is on, within each batch and without the queue, since it is a property of the
    batch. ``eval_loss`` is the weighted total.

    Args:
        policy: evaluated without dropout; its mode is restored.
        batches: this rank's share of the held-out batches.
        objective: constants and weights.
        accelerator: precision and sums over ranks.
        reference: where one is in use.
    """
    was_training = policy.training
    policy.eval()
    sums = MetricSums()
    started = time.perf_counter()
    contrastive = objective.contrastive_weight > 0
    for batch in batches:
        mb = prepare(batch, accelerator.device)
        output = policy(mb.batch, Wanted(log_probs=True, queries=contrastive, keys=contrastive))
        reference_log_probs = None
        if reference is not None:
            with accelerator.autocast():
                reference_log_probs = reference.log_probs(mb.batch)
        preference, nll = log_prob_terms(objective, mb, output.log_probs, reference_log_probs, sums)
        contrast = None
        if contrastive:
            found = contrastive_loss(
                output.queries,
                mb.query_labels,
                mb.chosen,
                Keys(embeddings=output.keys, labels=mb.key_labels),
                objective.contrastive,
            )
            contrast = found.loss.sum()
            sums.add("contrastive/loss", contrast, mb.groups)
            sums.add("contrastive/accuracy", found.correct.sum(), mb.groups)
        own = Normalisers(groups=mb.groups, chosen_tokens=mb.chosen_tokens)
        terms = LossTerms(preference=preference, nll=nll, contrastive=contrast)
        sums.add("loss", total_loss(terms, objective, own) * mb.groups, mb.groups)
    policy.train(was_training)
    # A rank may have had no batch: all must reduce the same names.
    everyone: list[list[str]] = gather_object([sums.names()])
    means = sums.means(
        lambda x: accelerator.reduce(x, reduction="sum"),
        names=max(everyone, key=len),
        device=accelerator.device,
    )
    means["runtime"] = time.perf_counter() - started
    return {f"eval_{name}": value for name, value in means.items()}


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt with the answers it is compared with."""

    row: int
    prompt_ids: list[int]
    prompt: str
    chosen: str
    rejected: str


@torch.no_grad()
def generate_samples(
    policy: Policy,
    prompts: list[SamplePrompt],
    tokenizer: Any,
    *,
    accelerator: Accelerator,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Greedy completions of fixed prompts, each beside its chosen and rejected answer."""
    was_training = policy.training
    policy.eval()
    model = causal_lm(policy.model)
    samples = []
    for prompt in prompts:
        ids = torch.tensor([prompt.prompt_ids], device=accelerator.device)
        with accelerator.autocast():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
            )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append(
            {
                "row": prompt.row,
                "prompt": prompt.prompt,
                "completion": text,
                "chosen": prompt.chosen,
                "rejected": prompt.rejected,
            }
        )
    policy.train(was_training)
    return samples
