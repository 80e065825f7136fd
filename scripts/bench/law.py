"""Which law a step's time follows, fitted by least squares where P, C and K differ::

    tree  time = a + b·G·(P + K·C)
    rows  time = a + b·G·K·(P + C)

(G) groups  (P) prompt tokens  (K) completions of a group  (C) tokens of each
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

LAYOUTS = ("ours", "ours, a row per completion")
FITTED = ("prompt", "completion", "negatives")
TOKEN_CASES = (*FITTED, "groups")
"""Those whose times the laws predict; that of G, in which both agree, is not fitted."""


@dataclass(frozen=True)
class Point:
    """What may change."""

    prompt: int = 256
    completion: int = 64
    negatives: int = 3
    groups: int = 1
    vocab: int = 2000
    queue: int = 0

    @property
    def tree_tokens(self) -> int:
        """G·(P + K·C)."""
        return self.groups * (self.prompt + (self.negatives + 1) * self.completion)

    @property
    def row_tokens(self) -> int:
        """G·K·(P + C)."""
        return self.groups * (self.negatives + 1) * (self.prompt + self.completion)


@dataclass(frozen=True)
class Law:
    """time = intercept + slope·x; the share of variance it explains; its worst relative error."""

    intercept: float
    slope: float
    r_squared: float
    worst: float

    @staticmethod
    def fit(x: list[float], seconds: list[float]) -> Law:
        """Least squares."""
        slope, intercept = np.polyfit(x, seconds, 1)
        left = np.asarray(seconds) - (intercept + slope * np.asarray(x))
        r_squared, worst = 1 - left.var() / np.var(seconds), np.abs(left / seconds).max()
        return Law(float(intercept), float(slope), float(r_squared), float(worst))

    def at(self, x: float) -> float:
        """Seconds."""
        return self.intercept + self.slope * x


def laws(cases: list[dict[str, Any]], layout: str) -> dict[str, Law]:
    """``tree`` and ``rows`` over the points of the three cases in which they differ."""
    points, seconds = [], []
    for case in cases:
        if case["case"] in FITTED and layout in case.get("cpu_seconds", {}):
            points += [Point(**point) for point in case["points"]]
            seconds += case["cpu_seconds"][layout]
    if len(points) < 3:
        return {}
    return {
        "tree": Law.fit([point.tree_tokens for point in points], seconds),
        "rows": Law.fit([point.row_tokens for point in points], seconds),
    }
