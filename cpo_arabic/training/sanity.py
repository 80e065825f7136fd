"""A few steps on a few rows, before a long run: does anything learn?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from cpo_arabic.data.pack import PreferenceBatch
from cpo_arabic.errors import TrainingError
from cpo_arabic.training.engine import Engine
from cpo_arabic.training.evaluation import evaluate
from cpo_arabic.training.plan import Share
from cpo_arabic.training.step import accumulate

STEPS = 4


def check_learning(
    engine: Engine, batches: Callable[[], Iterable[PreferenceBatch]], *, learning_rate: float
) -> None:
    """Trains the rows for a few steps and puts every weight back.

    Args:
        engine: its queue and momentum encoder are left alone.
        batches: the rows, the same at every call.
        learning_rate: the run's peak.

    Raises:
        TrainingError: a parameter gets no gradient, a gradient is not finite, or the loss on these
            rows does not fall.
    """
    parameters = engine.bare.trainable()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    before = _loss(engine, batches)
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate)
    try:
        for step in range(STEPS):
            for batch in batches():
                share = Share(batches=[batch], rows=[batch.group_rows.tolist()], counted=True)
                accumulate(engine, share, step)
                _check_gradients(engine)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        after = _loss(engine, batches)
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        optimizer.zero_grad(set_to_none=True)
    if not after < before:
        raise TrainingError(
            f"sanity check: after {STEPS} passes over these rows the loss went from {before:.4f} "
            f"to {after:.4f}. Raise training.learning_rate (now {learning_rate:g}) or look at the "
            "rows; data.sanity_check: false skips this"
        )


def _check_gradients(engine: Engine) -> None:
    for name, parameter in engine.bare.trainable().items():
        if parameter.grad is None:
            raise TrainingError(f"sanity check: {name} is set to train but gets no gradient")
        if not math.isfinite(float(parameter.grad.abs().sum())):
            raise TrainingError(f"sanity check: the gradient of {name} is not finite")


def _loss(engine: Engine, batches: Callable[[], Iterable[PreferenceBatch]]) -> float:
    found = evaluate(
        engine.bare,
        batches(),
        engine.objective,
        accelerator=engine.accelerator,
        reference=engine.reference,
    )
    return found["eval_loss"]
