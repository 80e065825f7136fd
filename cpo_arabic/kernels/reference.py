"""The definitions of both kernels, in the plainest PyTorch that computes them.

They hold the whole [T, V] or [B, N + Q] matrix and let autograd differentiate. In float64 they
are the truth the kernels are tested against; in float32 and bfloat16 they are the error and the
cost the kernels have to beat. Equations and shape legends: :mod:`.logprob`, :mod:`.infonce`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_arabic.kernels.common import accumulation_dtype, without_autocast


def eager_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(T,) log-probability of each target; logits in the inputs' dtype, softmax in float32."""
    with without_autocast(hidden.device):
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        logits = hidden.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        logits = scale * logits
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_probs = torch.log_softmax(logits.to(accumulation_dtype(hidden)), dim=-1)
        return log_probs.gather(1, targets[:, None])[:, 0]


def excluded_pairs(query_labels: Tensor, labels: Tensor) -> Tensor:
    """(B, n) true where key j must not be a negative of query b.

    ``query_labels`` (B, 3) and ``labels`` (n, 3) hold [group, prompt, text]. A false negative has
    the text of the positive, or belongs to another group that asks the same prompt.
    """
    same_text = query_labels[:, 2:] == labels[:, 2]
    same_prompt = query_labels[:, 1:2] == labels[:, 1]
    other_group = query_labels[:, :1] != labels[:, 0]
    return same_text | (same_prompt & other_group)


def eager_infonce(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    queue: Tensor | None,
    queue_labels: Tensor | None,
    queue_scale: Tensor | None,
    temperature: float,
    margin: float,
    concentration: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, similarity of the hardest negative, similarity of the positive; (B,) each."""
    with without_autocast(queries.device):
        dtype = accumulation_dtype(queries)
        everything, labels = keys.to(dtype), key_labels
        if queue is not None and queue_labels is not None:
            stored = queue.detach().to(dtype)
            if queue_scale is not None:
                stored = stored * queue_scale.to(dtype)[:, None]
            everything, labels = torch.cat([everything, stored]), torch.cat([labels, queue_labels])

        similarity = queries.to(dtype) @ everything.T
        positive = similarity.gather(1, positives[:, None])[:, 0]
        excluded = excluded_pairs(query_labels, labels).scatter(1, positives[:, None], True)
        count = (~excluded).sum(1)
        alone = count == 0
        hardest = similarity.masked_fill(excluded, -math.inf).amax(1)

        def log_sum_exp(sharpness: float) -> Tensor:
            scores = (similarity * sharpness).masked_fill(excluded, -math.inf)
            return scores.masked_fill(alone[:, None], 0.0).logsumexp(1)

        negatives = log_sum_exp(1 / temperature + concentration)
        negatives = negatives - log_sum_exp(concentration) + count.clamp_min(1).to(dtype).log()
        gap = negatives - (positive - margin) / temperature
        loss = F.softplus(gap, threshold=50.0).masked_fill(alone, 0.0)
        return loss, hardest.detach(), positive.detach()
