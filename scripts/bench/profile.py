"""Where a step's time goes: one profiled step by kind of work, before (TRL) and after (ours).

Wall seconds of the operators themselves, from ``torch.profiler``; its own cost makes them a little
longer than those of the step's table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from scripts.bench import step
from scripts.bench.cases import Case
from scripts.bench.measure import Turns, Watch

CASES = ("512,64,3",)
VARIANTS = ("TRL, not checkpointed", "ours, a row per completion", "ours")
KINDS = {
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("attention",),
    "AdamW": ("adam",),
    "copies and look-ups": (
        "copy", "clone", "cat", "expand", "gather", "scatter", "index", "embedding", "fill", "zero",
    ),
    "softmax and its backward": ("softmax", "logsumexp", "exp"),
}  # fmt: skip
"""Kind → what an operator's name contains; the first that fits has it."""
REST = "the rest: norms, activations, rotary positions, Python"


@dataclass(frozen=True)
class Settings(step.Settings):
    """The step's, one profiled turn."""

    repeats: int = 1


QUICK = Settings(**vars(step.QUICK))


class Profiled(Turns):
    """Turns of which every one is profiled."""

    def begin(self) -> None:
        """Wait, then profile."""
        super().begin()
        self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU])
        self._profiler.start()

    def stop(self) -> None:
        """Stop the profile, which is not the clock's business, after the clock."""
        super().stop()
        self._profiler.stop()

    def tell(self, **facts: Any) -> None:
        """With the seconds of each kind."""
        events = self._profiler.key_averages()
        times = {event.key: event.self_cpu_time_total / 1e6 for event in events}
        super().tell(**facts, kinds=by_kind(times, self._cost["wall_seconds"]))


def by_kind(times: dict[str, float], whole: float) -> dict[str, float]:
    """Operator → seconds, summed by kind; what is left of the whole is the rest."""
    found = dict.fromkeys(KINDS, 0.0)
    for name, seconds in times.items():
        kind = next((k for k, parts in KINDS.items() if any(p in name.lower() for p in parts)), "")
        if kind:
            found[kind] += seconds
    return found | {REST: max(whole - sum(found.values()), 0.0)}


def variants(_case: str, _: Settings) -> list[str]:
    """Peers first: before and after."""
    return list(VARIANTS)


def measure(name: str, wanted: list[str], settings: Settings, watch: Watch) -> dict[str, Any]:
    """Seconds by kind of each variant's last step.

    Raises:
        WorkerError: the truth could not be computed.
    """
    case = Case.parse(name)
    _, turns, notes = step.taken_turns(case, wanted, settings, watch, Profiled)
    seconds = {each: taken[-1]["kinds"] for each, taken in turns.items() if len(taken) > 1}
    return {"case": name, "seconds": seconds, "notes": notes}
