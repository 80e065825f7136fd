"""The picture of a run: what was optimised, and what held-out rows say of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANELS = (
    ("loss (as optimised)", "loss"),
    ("reward accuracy", "rewards/accuracies"),
    ("reward margin", "rewards/margins"),
    ("NLL of chosen (nats per token)", "nll_loss"),
)


def draw_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws training and held-out curves over the steps into a PNG file.

    Args:
        records: of ``metrics.jsonl``.
        path: the file to write.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, name) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for key, label, style in ((name, "train", "-"), (f"eval_{name}", "held out", "o-")):
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
