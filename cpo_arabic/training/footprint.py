"""Memory and work of an optimizer step as a row of stretches: plain arithmetic on bytes and FLOPs.

A stretch is a part of a step, such as the forward of one layer. It needs some bytes on its way and
leaves some behind, so the step's peak is found by walking along; layers that are alike are one
stretch with a count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stretch:
    """Part of a step; bytes are counted from its beginning.

    ``gradients`` are those of the parameters, among the other bytes. ``work`` are FLOPs in matrix
    products and attention, ``traffic`` the bytes that all other operations read and write.
    """

    name: str
    repeats: int = 1
    peak: int = 0
    peak_gradients: int = 0
    left: int = 0
    left_gradients: int = 0
    work: float = 0.0
    traffic: float = 0.0


@dataclass(frozen=True)
class Moment:
    """When a step needs most: bytes over what is there before and after it."""

    name: str
    gradients: int
    saved: int  # kept for the backward pass
    passing: int  # of the operations at hand

    @property
    def total(self) -> int:
        """All of them."""
        return self.gradients + self.saved + self.passing


def highest(stretches: Sequence[Stretch]) -> Moment:
    """The moment at which the stretches, one after another, need most."""
    level = gradients = 0
    best = Moment("", 0, 0, 0)
    for each in stretches:
        before = each.repeats - 1 if each.left > 0 else 0  # else its first repetition is highest
        start, held = level + before * each.left, gradients + before * each.left_gradients
        if start + each.peak > best.total:
            passing = each.peak - each.peak_gradients
            best = Moment(each.name, held + each.peak_gradients, start - held, passing)
        level += each.repeats * each.left
        gradients += each.repeats * each.left_gradients
    return best


def work_of(stretches: Sequence[Stretch]) -> tuple[float, float]:
    """FLOPs, and bytes read and written, of all of them."""
    return (
        sum(each.repeats * each.work for each in stretches),
        sum(each.repeats * each.traffic for each in stretches),
    )


def head_work(
    rows: int, hidden: int, vocabulary: int, *, trained: bool, lodged: int = 0, budget: int = 0
) -> float:
    """FLOPs of the log-probability kernel for ``rows`` tokens, forward and backward.

    Args:
        rows: predicted tokens.
        hidden: features of a state.
        vocabulary: rows of the head.
        trained: whether the head needs a gradient, or only the states.
        lodged: rows whose logits wait in the memory of a trained head's gradient.
        budget: bytes of other rows' float32 logits that are kept rather than computed again.
    """
    kept = min(1.0, (lodged + budget / (4 * vocabulary)) / max(rows, 1))
    factor = 8 - 2 * kept if trained else 4
    return factor * hidden * vocabulary * rows
