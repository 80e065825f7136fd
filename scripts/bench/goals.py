"""What was to be reached, and what the records say of it.

A peer is its fastest variant of those that a goal names; its speed and its memory are of that one.
Speed is a ratio of CPU seconds (wall seconds on a GPU), memory one of peaks. What was not measured
has no figure, only a note.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRL = ("TRL, defaults", "TRL, not checkpointed", "TRL, compiled")
LIGER = ("Liger, compiled, a pair a chunk", "Liger, compiled, one chunk")
CCE = ("CCE, torch_compile",)
MOCO = ("MoCo, with its clone",)


@dataclass(frozen=True)
class Goal:
    """Ours against a peer in a case: at least ``speed`` times as fast, within the memory."""

    against: str
    what: str
    part: str
    case: str
    peers: tuple[str, ...]
    speed: float
    memory: float | None = None  # largest part of the peer's peak
    extra_mib: float | None = None  # largest peak of ours
    floors: float | None = None  # longest time over the floor


GOALS = (
    Goal("TRL", "P 512, C 64, k 1", "step", "512,64,1", TRL, 3.5, memory=0.4),
    Goal("TRL, k pairs", "P 512, C 64, k 3", "step", "512,64,3", TRL, 7.0),
    Goal("TRL, k pairs", "P 256, C 256, k 3", "step", "256,256,3", TRL, 3.5),
    Goal("TRL, LoRA", "P 512, C 64, k 1", "step", "512,64,1,lora", TRL, 3.5, memory=0.4),
    Goal("TRL, LoRA, k pairs", "P 512, C 64, k 3", "step", "512,64,3,lora", TRL, 7.0),
    Goal("TRL, Arabic rows", "demo, k 1", "step", "demo,1", TRL, 2.0),
    Goal("TRL, Arabic rows, k pairs", "demo, k 3", "step", "demo,3,16", TRL, 2.0),
    Goal("TRL, Arabic rows", "WMT24++, k 1", "step", "wmt24pp,1,16", TRL, 2.0),
    Goal("Liger fused CPO, compiled", "trained head", "head", "trained", LIGER, 1.4, memory=0.5),
    Goal("Liger fused CPO, compiled", "frozen head", "head", "frozen", LIGER, 1.4, memory=0.5),
    Goal("CCE, torch_compile", "trained head", "head", "trained", CCE, 1.0, memory=0.7),
    Goal("CCE, torch_compile", "frozen head", "head", "frozen", CCE, 1.0, memory=0.7),
    Goal("MoCo's InfoNCE, eager", "queue", "queue", "plain", MOCO, 2.5, extra_mib=10.0),
    Goal(
        "TRL on a GPU, k pairs", "0.5 B, bf16, P 512, C 256, k 3", "step", "512,256,3,gpu",
        TRL, 4.0, floors=1 / 0.45,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A goal and what was reached; ``note`` instead of figures where there are none."""

    goal: Goal
    note: str = ""
    peer: str = ""
    speed: float | None = None
    memory: float | None = None
    peak_mib: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    floors: float | None = None
    speed_at_floor: float | None = None
    memory_at_floor: float | None = None  # gradients and moments over the peer's peak

    @property
    def fast(self) -> bool:
        """The speed's goal is reached."""
        return self.speed is not None and self.speed >= self.goal.speed

    @property
    def small(self) -> bool | None:
        """The memory's goal is reached; None where there is no such goal or no figure."""
        if self.goal.memory is not None and self.memory is not None:
            return self.memory <= self.goal.memory
        if self.goal.extra_mib is not None and self.peak_mib is not None:
            return self.peak_mib <= self.goal.extra_mib
        return None

    @property
    def out_of_reach(self) -> bool:
        """The memory's goal is less than what a step must hold."""
        goal, floor = self.goal.memory, self.memory_at_floor
        return goal is not None and floor is not None and floor > goal


Records = dict[str, dict[str, Any]]
"""Part → its JSON file."""


def is_quick(records: Records) -> bool:
    """Some of it was measured on smaller shapes than those that the goals are for."""
    return any(record.get("quick", False) for record in records.values())


def lines(records: Records) -> list[Line]:
    """Every goal beside what was reached."""
    return [line(goal, case_of(records, goal.part, goal.case)) for goal in GOALS]


def case_of(records: Records, part: str, name: str) -> dict[str, Any]:
    """A case's record; only a note where it was not run."""
    cases = records.get(part, {}).get("cases", [])
    return next((case for case in cases if case["case"] == name), {"note": "not run"})


def line(goal: Goal, case: dict[str, Any]) -> Line:
    """What a case's record says of a goal."""
    if "note" in case:
        return Line(goal, note=case["note"])
    variants, clock = case["variants"], case["clock"]
    ours, peer = variants.get("ours", {}), fastest(case, goal.peers)
    if clock not in ours:
        return Line(goal, note=ours.get("note", "not run"))
    own = {key: ours[key] for key in ("peak_mib", "loss_error", "gradient_error")}
    floors = ours[clock] / case["floor_seconds"]
    if peer is None:
        notes = [variants[name]["note"] for name in goal.peers if "note" in variants.get(name, {})]
        return Line(goal, note=notes[0] if notes else "not run", floors=floors, **own)
    other = variants[peer]
    both = ours["peak_mib"] is not None and other["peak_mib"]
    state = case.get("state_mib")
    return Line(
        goal,
        peer=peer,
        speed=other[clock] / ours[clock],
        memory=ours["peak_mib"] / other["peak_mib"] if both else None,
        floors=floors,
        speed_at_floor=other[clock] / case["floor_seconds"],
        memory_at_floor=state / other["peak_mib"] if both and state is not None else None,
        **own,
    )


def fastest(case: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The one of ``names`` that took least time, if any was measured."""
    clock, variants = case["clock"], case["variants"]
    measured = [name for name in names if clock in variants.get(name, {})]
    return min(measured, key=lambda name: variants[name][clock]) if measured else None
