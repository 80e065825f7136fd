"""The objective in one line: what the run will minimise, with the numbers put in."""

from __future__ import annotations

from cpo_arabic.config.rules import Settled

_LOSS_NAMES = {
    "cpo": "CPO listwise",
    "sigmoid": "sigmoid (DPO form)",
    "hinge": "hinge (SLiC form)",
    "ipo": "IPO squared",
    "simpo": "SimPO listwise",
}


def objective_statement(c: Settled) -> str:
    """``minimise 1·CPO listwise(k = 3, …) + 1·NLL(chosen) + 1.2·0.02·InfoNCE(…)``."""
    terms = [term for term in (_preference(c), _cloning(c), _contrast(c)) if term]
    return "minimise " + " + ".join(terms)


def _preference(c: Settled) -> str:
    if not c.cpo.preference_weight:
        return ""
    inner = [f"k = {c.cpo.num_negatives}", _scale(c), _scores(c)]
    if c.cpo.loss_type == "simpo":
        inner.append(f"γ = {c.cpo.cpo_gamma:g}")
    if c.cpo.label_smoothing:
        inner.append(f"label smoothing ε = {c.cpo.label_smoothing:g}")
    inner.append(_reference(c))
    return f"{c.cpo.preference_weight:g}·{_LOSS_NAMES[c.cpo.loss_type]}({', '.join(inner)})"


def _scale(c: Settled) -> str:
    if c.cpo.loss_type == "ipo":
        return f"target 1/(2β) = {1 / (2 * c.cpo.beta):g}"
    return f"β/τ = {c.cpo.beta:g}/{c.cpo.temperature:g}"


def _scores(c: Settled) -> str:
    names = {1.0: "mean log-probs", 0.0: "summed log-probs"}
    return names.get(c.cpo.alpha, f"log-probs / tokens^{c.cpo.alpha:g}")


def _reference(c: Settled) -> str:
    if not c.reference_in_use:
        return "no reference"
    return f"reference = {c.cpo.reference_model_name or 'starting model'}"


def _cloning(c: Settled) -> str:
    return f"{c.cpo.cpo_alpha:g}·NLL(chosen)" if c.cpo.cpo_alpha else ""


def _contrast(c: Settled) -> str:
    if not c.cpo.contrastive_weight:
        return ""
    inner = [f"margin {c.cpo.margin:g}"]
    if c.cpo.cpo_beta:
        inner.append(f"hard-negative β_h = {c.cpo.cpo_beta:g}")
    inner.append("cosine" if c.cpo.normalize_embeddings else "dot product")
    if c.cpo.projection_dim:
        inner.append(f"projection to {c.cpo.projection_dim}")
    if c.cpo.use_momentum:
        inner.append(f"momentum {c.cpo.momentum_beta:g}")
    if c.cpo.use_queue:
        inner.append(f"queue of {c.cpo.queue_size}")
    weight = f"{c.cpo.contrastive_weight:g}·{c.cpo.contrastive_temperature:g}"
    return f"{weight}·InfoNCE({', '.join(inner)})"
