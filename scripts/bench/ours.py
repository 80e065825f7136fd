"""Our step as the training loop takes it, over one fixed batch."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from cpo_arabic.data.pack import Padding, TokenizedGroup, collate
from cpo_arabic.modeling.encoder import EmbeddingQueue, EmbeddingSettings
from cpo_arabic.modeling.policy import Policy
from cpo_arabic.objective.contrastive import ContrastiveSettings
from cpo_arabic.objective.total import ObjectiveSettings
from cpo_arabic.training.engine import Engine
from cpo_arabic.training.metrics import MetricSums
from cpo_arabic.training.plan import Share
from cpo_arabic.training.step import accumulate
from cpo_arabic.training.trainer import OptimizerSettings, build_optimizer


def pairwise_cpo(
    beta: float, cpo_alpha: float, *, contrastive_weight: float = 0.0
) -> ObjectiveSettings:
    """The published CPO loss (Xu et al. 2024), with InfoNCE beside it if it has a weight."""
    return ObjectiveSettings(
        loss_type="sigmoid",
        beta=beta,
        temperature=1.0,
        alpha=0.0,
        gamma=0.0,
        label_smoothing=0.0,
        preference_weight=1.0,
        cpo_alpha=cpo_alpha,
        contrastive_weight=contrastive_weight,
        contrastive=ContrastiveSettings(temperature=0.07, margin=0.0, concentration=0.0),
    )


class OurStep:
    """Forward, loss and backward, then AdamW, at a learning rate of 0.

    Args:
        model: the causal language model, on its device.
        groups: the batch's rows.
        objective: what is computed.
        padding: packed trees, or a row per completion.
        pad_id: token of the padding.
        compiled: ``torch.compile`` the decoder.
        queue: earlier keys of the contrastive term.
    """

    def __init__(
        self,
        model: Any,
        groups: list[TokenizedGroup],
        objective: ObjectiveSettings,
        *,
        padding: Padding,
        pad_id: int,
        compiled: bool = False,
        queue: EmbeddingQueue | None = None,
    ) -> None:
        self.batch = collate(
            groups,
            padding=padding,
            pad_id=pad_id,
            max_length=0,  # of a layout that is not measured
            max_tokens_per_row=None,
        )
        self._share = Share([self.batch], rows=[[group.row for group in groups]], counted=True)
        policy = Policy(model, None, EmbeddingSettings(dropout=0.0, normalize=True))
        if compiled:
            policy.decoder.compile(dynamic=True)
        self.optimizer = build_optimizer(policy, OptimizerSettings(0.0, 0.0, 0.9, 0.999, 1e-8))
        accelerator = Accelerator(cpu=model.device.type == "cpu")
        self._engine = Engine(
            accelerator=accelerator,
            policy=accelerator.prepare(policy),
            objective=objective,
            reference=None,
            momentum=None,
            queue=queue,
            seed=0,
        )

    def accumulate(self) -> MetricSums:
        """The gradient into the model; the sums of the step's metrics."""
        return accumulate(self._engine, self._share, 0)[0]

    def update(self) -> None:
        """AdamW, and no gradients left."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
