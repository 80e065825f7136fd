"""The preference losses, on plain reward tensors.

(G) groups  (K) completions of a group, column 0 the chosen one

Rewards are padded to (G, K); ``present`` is False where a group has fewer completions.
Every loss returns one value a group: the caller divides by the *global* number of groups.

    score   s_i = (log π(y_i|x) − log π_ref(y_i|x)) / n_i^alpha
    reward  r_i = beta · s_i,   compared at  z_i = r_i / temperature

References: CPO, Xu et al. 2024 (arXiv 2401.08417, eq. 3); DPO, Rafailov et al. 2023 (eq. 7);
conservative DPO for the smoothing, Mitchell 2023; SLiC-HF's hinge, Zhao et al. 2023;
IPO, Azar et al. 2023 (eq. 17); SimPO, Meng et al. 2024 (eq. 6); the length exponent,
Wu et al. 2016 (eq. 14); the listwise form is Plackett–Luce's first choice, Plackett 1975.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LossType = Literal["cpo", "sigmoid", "hinge", "ipo", "simpo"]


def completion_scores(
    log_probs: Tensor, lengths: Tensor, *, alpha: float, reference_log_probs: Tensor | None = None
) -> Tensor:
    """Length-normalised scores s_i.

    Args:
        log_probs: summed log-probabilities in nats, any shape.
        lengths: completion tokens of each, the final EOS included; same shape.
        alpha: length exponent; 1 gives the mean per token, 0 the sum.
        reference_log_probs: the same under the reference, or None where no reference is in use.
    """
    if reference_log_probs is not None:
        log_probs = log_probs - reference_log_probs
    return log_probs / lengths.to(log_probs.dtype).pow(alpha)


def preference_loss(
    scores: Tensor,
    present: Tensor,
    *,
    loss_type: LossType,
    beta: float,
    temperature: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """One loss a group, (G).

    Args:
        scores: s_i, (G, K); what stands in absent places is ignored.
        present: (G, K) bool, column 0 always True.
        loss_type: which loss; see the module's head.
        beta: reward scale.
        temperature: τ > 0, divides the rewards (``ipo`` compares scores and has no τ).
        gamma: SimPO's target reward margin, taken from the chosen logit; ``simpo`` only.
        label_smoothing: ε, the assumed share of flipped labels; ``sigmoid`` only.

    Raises:
        ValueError: an unknown ``loss_type``.
    """
    logits = beta * scores / temperature
    negative = present[:, 1:]
    match loss_type:
        case "cpo":
            return _listwise(logits, present)  # −log [ exp z_0 / Σ_i exp z_i ]
        case "simpo":
            shift = logits.new_zeros(logits.shape[1])
            shift[0] = gamma
            return _listwise(logits - shift, present)  # the same with z_0 − γ
        case "sigmoid":
            z = logits[:, :1] - logits[:, 1:]
            each = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
            return _mean_over(each, negative)  # −(1−ε) log σ(z) − ε log σ(−z)
        case "hinge":
            z = logits[:, :1] - logits[:, 1:]
            return _mean_over(F.relu(1 - z), negative)  # max(0, 1 − z)
        case "ipo":
            gap = scores[:, :1] - scores[:, 1:]
            return _mean_over((gap - 1 / (2 * beta)).square(), negative)  # (s_0 − s_i − 1/2β)²
        case _:
            raise ValueError(
                f"loss_type {loss_type!r} is not one of cpo, sigmoid, hinge, ipo, simpo"
            )


def _listwise(logits: Tensor, present: Tensor) -> Tensor:
    """softplus(LSE over the negatives − z_0): no cancellation when the chosen dominates."""
    negatives = logits[:, 1:].masked_fill(~present[:, 1:], -torch.inf)
    if negatives.shape[1] == 0:
        return torch.zeros_like(logits[:, 0])
    any_negative = present[:, 1:].any(dim=1)
    # A row of −inf alone has no gradient; give it a finite stand-in and drop it afterwards.
    safe = torch.where(any_negative[:, None], negatives, torch.zeros_like(negatives))
    loss = F.softplus(torch.logsumexp(safe, dim=1) - logits[:, 0])
    return torch.where(any_negative, loss, torch.zeros_like(loss))


def _mean_over(values: Tensor, present: Tensor) -> Tensor:
    """Mean of the present entries of each row; 0 for a row without any."""
    kept = torch.where(present, values, torch.zeros_like(values))
    return kept.sum(dim=1) / present.sum(dim=1).clamp(min=1).to(values.dtype)
