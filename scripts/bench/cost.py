"""What our step's time grows with: one thing changed at a time around a base point.

Both layouts take turns: packed trees, in which a group is P + K·C tokens, and a row per completion,
K·(P + C).

(G) groups  (P) prompt tokens  (K) completions of a group  (C) tokens of each
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import normalize

from cpo_arabic.data.pack import Padding
from cpo_arabic.modeling.encoder import EmbeddingQueue
from scripts.bench.cases import Case, Shape
from scripts.bench.law import LAYOUTS, TOKEN_CASES, Point
from scripts.bench.measure import Job, Turns, Watch, take_turns
from scripts.bench.ours import OurStep, pairwise_cpo

PADDING: tuple[Padding, ...] = ("packed", "longest")
CASES = (*TOKEN_CASES, "vocab", "queue")


VALUES = {
    "prompt": (64, 128, 256, 512, 1024),
    "completion": (16, 32, 64, 128, 256),
    "negatives": (1, 3, 7, 15),
    "groups": (1, 2, 4, 6),
    "vocab": (2000, 16_000, 32_000, 64_000),
    "queue": (8192, 32_768, 65_536, 131_072),
}


@dataclass(frozen=True)
class Settings:
    """Of the random model and the run; only every ``thin``-th value is measured."""

    hidden: int = 256
    layers: int = 4
    repeats: int = 5
    threads: int = 1
    thin: int = 1

    def points(self, case: str) -> list[Point]:
        """The base point with each of the case's values."""
        return [replace(Point(), **{case: value}) for value in VALUES[case][:: self.thin]]


QUICK = Settings(repeats=2, thin=2)


def variants(_case: str, _: Settings) -> list[str]:
    """Both layouts."""
    return list(LAYOUTS)


def measure(name: str, wanted: list[str], settings: Settings, watch: Watch) -> dict[str, Any]:
    """CPU seconds of a step at each of the case's points, in each layout."""
    points = settings.points(name)
    paddings = dict(zip(LAYOUTS, PADDING, strict=True))
    jobs = {each: Job(work, (name, paddings[each], settings)) for each in wanted}
    rounds = len(points) * (1 + settings.repeats)
    taken, died = take_turns(jobs, rounds - 1, settings.threads, watch)
    warm = len(points)
    seconds = {
        each: [
            statistics.median(turn["cpu_seconds"] for turn in turns[warm + place :: warm])
            for place in range(warm)
        ]
        for each, turns in taken.items()
        if len(turns) == rounds
    }
    return {
        "case": name,
        "points": [vars(point) for point in points],
        "cpu_seconds": seconds,
        "notes": died,
    }


def work(pipe: Any, case: str, padding: Padding, settings: Settings) -> None:
    """A layout in its own process: the case's points in turn, again and again."""
    turns, points = Turns(pipe), settings.points(case)
    steps = [our_step(point, padding, settings) for point in points]
    for _ in range(1 + settings.repeats):
        for step in steps:
            turns.begin()
            step.accumulate()
            step.update()
            turns.stop()
            turns.tell()


def our_step(point: Point, padding: Padding, settings: Settings) -> OurStep:
    """The step at a point; with a queue, InfoNCE is part of it."""
    shape = Shape(settings.hidden, settings.layers, point.vocab)
    case = Case.parse(f"{point.prompt},{point.completion},{point.negatives},{point.groups}")
    queue = None
    if point.queue:
        queue = EmbeddingQueue(point.queue)
        index = torch.arange(point.queue) + 10_000
        keys = normalize(torch.randn(point.queue, settings.hidden), dim=1)
        queue.push(keys, torch.stack([index, index, index], 1))
    return OurStep(
        case.model(shape),
        case.draw(shape),
        pairwise_cpo(0.1, 1.0, contrastive_weight=float(point.queue > 0)),
        padding=padding,
        pad_id=0,
        queue=queue,
    )
