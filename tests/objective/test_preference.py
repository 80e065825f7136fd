"""The losses against published formulas, on numbers one can work by hand, and against a peer."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch

from cpo_arabic.objective.preference import completion_scores, preference_loss

LOG_PROBS = torch.tensor([[-10.0, -14.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[5.0, 4.0]], dtype=torch.float64)
PAIR = torch.ones(1, 2, dtype=torch.bool)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def scores(alpha: float, reference: torch.Tensor | None = None) -> torch.Tensor:
    return completion_scores(LOG_PROBS, LENGTHS, alpha=alpha, reference_log_probs=reference)


def test_alpha_one_compares_means_and_alpha_zero_sums() -> None:
    """−10/5 = −2 and −14/4 = −3.5 per token."""
    assert scores(1.0).tolist() == [[-2.0, -3.5]]
    assert scores(0.0).tolist() == [[-10.0, -14.0]]


def test_cpo_is_equation_3_of_its_paper() -> None:
    """β = 0.1, sums: −log σ(0.1·(−10 + 14)) = −log σ(0.4) = 0.513015…"""
    loss = preference_loss(scores(0.0), PAIR, loss_type="cpo", beta=0.1, temperature=1.0)
    assert loss.item() == pytest.approx(-log_sigmoid(0.4))
    assert loss.item() == pytest.approx(0.513015, abs=1e-6)


def test_simpo_takes_its_margin_from_the_chosen_logit() -> None:
    """β = 2, γ = 0.5, means: −log σ(2·(−2 + 3.5) − 0.5) = −log σ(2.5)."""
    loss = preference_loss(
        scores(1.0), PAIR, loss_type="simpo", beta=2.0, temperature=1.0, gamma=0.5
    )
    assert loss.item() == pytest.approx(-log_sigmoid(2.5))


def test_dpo_is_sigmoid_over_ratios_to_the_reference() -> None:
    """Ratios −10 + 11 = 1 and −14 + 13 = −1: −log σ(0.1·2)."""
    reference = torch.tensor([[-11.0, -13.0]], dtype=torch.float64)
    loss = preference_loss(
        scores(0.0, reference), PAIR, loss_type="sigmoid", beta=0.1, temperature=1.0
    )
    assert loss.item() == pytest.approx(-log_sigmoid(0.2))


def test_label_smoothing_weighs_both_signs() -> None:
    loss = preference_loss(
        scores(0.0), PAIR, loss_type="sigmoid", beta=0.1, temperature=1.0, label_smoothing=0.1
    )
    assert loss.item() == pytest.approx(-0.9 * log_sigmoid(0.4) - 0.1 * log_sigmoid(-0.4))


def test_ipo_pulls_the_gap_to_half_over_beta_and_has_no_temperature() -> None:
    """Means: gap 1.5, target 1/(2·0.5) = 1: (0.5)² = 0.25."""
    for temperature in (1.0, 0.1):
        loss = preference_loss(
            scores(1.0), PAIR, loss_type="ipo", beta=0.5, temperature=temperature
        )
        assert loss.item() == pytest.approx(0.25)


def test_hinge_is_flat_beyond_its_margin() -> None:
    loss = preference_loss(scores(0.0), PAIR, loss_type="hinge", beta=0.1, temperature=1.0)
    assert loss.item() == pytest.approx(1 - 0.4)
    loss = preference_loss(scores(0.0), PAIR, loss_type="hinge", beta=1.0, temperature=1.0)
    assert loss.item() == 0.0


def test_the_listwise_loss_is_a_softmax_over_the_group() -> None:
    """z = (0, −1, −2): −log(1 / (1 + e⁻¹ + e⁻²))."""
    z = torch.tensor([[0.0, -1.0, -2.0]], dtype=torch.float64)
    loss = preference_loss(
        z, torch.ones(1, 3, dtype=torch.bool), loss_type="cpo", beta=1.0, temperature=1.0
    )
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)))


@pytest.mark.parametrize("loss_type", ["cpo", "simpo", "sigmoid", "hinge", "ipo"])
def test_absent_completions_change_neither_loss_nor_gradient(loss_type: str) -> None:
    full = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    padded = torch.tensor([[-1.0, -2.0, 7.0]], dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True, True, False]])
    kwargs = {"loss_type": loss_type, "beta": 0.5, "temperature": 0.5, "gamma": 0.3}
    a = preference_loss(full, PAIR, **kwargs)  # type: ignore[arg-type]
    b = preference_loss(padded, present, **kwargs)  # type: ignore[arg-type]
    assert torch.allclose(a, b)
    (ga,), (gb,) = torch.autograd.grad(a.sum(), full), torch.autograd.grad(b.sum(), padded)
    assert torch.allclose(ga, gb[:, :2])
    assert gb[0, 2] == 0


@pytest.mark.parametrize("loss_type", ["cpo", "simpo", "sigmoid", "hinge", "ipo"])
def test_a_group_without_negatives_has_no_loss_and_a_finite_gradient(loss_type: str) -> None:
    lone = torch.tensor([[-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True, False]])
    loss = preference_loss(lone, present, loss_type=loss_type, beta=1.0, temperature=1.0)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss.sum(), lone)
    assert loss.item() == 0
    assert gradient.tolist() == [[0.0, 0.0]]


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="orpo"):
        preference_loss(scores(0.0), PAIR, loss_type="orpo", beta=1.0, temperature=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ours", "theirs", "smoothing"),
    [("cpo", "sigmoid", 0.0), ("sigmoid", "sigmoid", 0.1), ("simpo", "simpo", 0.0),
     ("hinge", "hinge", 0.0), ("ipo", "ipo", 0.0)],
)  # fmt: skip
def test_losses_agree_with_the_common_trainer(ours: str, theirs: str, smoothing: float) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    generator = torch.Generator().manual_seed(0)
    chosen, rejected = -50 * torch.rand(2, 64, generator=generator, dtype=torch.float64)
    beta, gamma = 0.3, 0.7
    trainer = SimpleNamespace(
        alpha=0.0, beta=beta, loss_type=theirs, simpo_gamma=gamma, label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    expected, _, _ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    loss = preference_loss(
        torch.stack([chosen, rejected], dim=1),
        torch.ones(64, 2, dtype=torch.bool),
        loss_type=ours,  # type: ignore[arg-type]
        beta=beta,
        temperature=1.0,
        gamma=gamma,
        label_smoothing=smoothing,
    )
    assert torch.allclose(loss, expected, rtol=1e-12)
