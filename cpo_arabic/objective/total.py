"""What is optimised: the weighted terms, over global normalisers.

    L = preference_weight·L_pref + cpo_alpha·L_nll + contrastive_weight·τ_c·L_con

A term whose weight is 0 is not computed. L_pref and L_con are means over the groups, L_nll a mean
over the chosen tokens, of the *global* batch: all ranks and micro-batches of one optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpo_arabic.objective.contrastive import ContrastiveSettings
from cpo_arabic.objective.preference import LossType


@dataclass(frozen=True)
class ObjectiveSettings:
    """Every constant of the objective, named as in the configuration."""

    loss_type: LossType
    beta: float
    temperature: float
    alpha: float
    gamma: float
    label_smoothing: float
    preference_weight: float
    cpo_alpha: float
    contrastive_weight: float
    contrastive: ContrastiveSettings


@dataclass(frozen=True)
class Normalisers:
    """Sizes of the global batch."""

    groups: int
    chosen_tokens: int


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's share of each unscaled term, summed over its groups or chosen tokens."""

    preference: Tensor | None
    nll: Tensor | None
    contrastive: Tensor | None


def total_loss(terms: LossTerms, settings: ObjectiveSettings, normalisers: Normalisers) -> Tensor:
    """The micro-batch's part of L: the parts of all micro-batches and ranks sum to L.

    Raises:
        ValueError: no term is given.
    """
    shares = {
        "preference": (terms.preference, normalisers.groups),
        "nll": (terms.nll, normalisers.chosen_tokens),
        "contrastive": (terms.contrastive, normalisers.groups),
    }
    weights = term_weights(settings)
    parts = [
        weights[name] * term / size for name, (term, size) in shares.items() if term is not None
    ]
    if not parts:
        raise ValueError("every term of the objective is turned off")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def term_weights(settings: ObjectiveSettings) -> dict[str, float]:
    """Term → its factor in L."""
    return {
        "preference": settings.preference_weight,
        "nll": settings.cpo_alpha,
        "contrastive": settings.contrastive_weight * settings.contrastive.temperature,
    }
