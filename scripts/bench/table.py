"""The one table: every goal, and under it ours and the peers that did the same work."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.bench.goals import GOALS, Goal, Line, Records, case_of, is_quick, line
from scripts.bench.law import LAYOUTS, laws

COLUMNS = (
    "CPU s", "wall s", "peak MiB", "loss err", "grad err", "× floor",
    "ours faster", "goal", "our memory", "goal",
)  # fmt: skip


def show(records: Records, console: Console) -> None:
    """Print it; a row per variant, a goal in the row of the peer that it names."""
    quick = " (a quick look, on smaller shapes than the goals')" if is_quick(records) else ""
    table = Table(title=f"Ours beside its peers{quick}")
    table.add_column("case")
    table.add_column("variant", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for part, name in dict.fromkeys((goal.part, goal.case) for goal in GOALS):
        case = case_of(records, part, name)
        goals = [goal for goal in GOALS if (goal.part, goal.case) == (part, name)]
        label = goals[0].what if part != "step" else f"{goals[0].against.split(', k')[0]}\n{name}"
        if "note" in case:
            table.add_row(label, case["note"])
        for row in _rows(case, goals):
            table.add_row(label, *row)
            label = ""
        table.add_section()
    table.caption = "; ".join(
        f"{layout}: time ~ P + K·C has R² {found['tree'].r_squared:.3f}, "
        f"time ~ K·(P + C) {found['rows'].r_squared:.3f}"
        for layout in LAYOUTS
        if (found := laws(records.get("cost", {}).get("cases", []), layout))
    )
    console.print(table)


def _rows(case: dict[str, Any], goals: list[Goal]) -> list[tuple[str, ...]]:
    """Ours first, then the peers; our other settings are left to the page."""
    lines = {found.peer: found for goal in goals if (found := line(goal, case)).peer}
    extra = next((goal.extra_mib for goal in goals if goal.extra_mib), None)
    ours = case.get("variants", {}).get("ours", {})
    rows = []
    for name, v in case.get("variants", {}).items():
        if name.startswith("ours,"):
            continue
        if case["clock"] not in v:
            rows.append((name, v["note"]))
            continue
        own = name == "ours"
        ratios = _ratios(ours, v, case["clock"], lines.get(name)) if not own else ("", "", "", "")
        if own and extra:
            ratios = ("", "", "", f"≤ {extra:.0f} MiB {mark(v['peak_mib'] <= extra)}")
        rows.append((name, *_costs(v, case), *ratios))
    return rows


def _costs(v: dict[str, Any], case: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{v['cpu_seconds']:.3f}",
        f"{v['wall_seconds']:.3f}",
        "?" if v["peak_mib"] is None else f"{v['peak_mib']:.0f}",
        f"{v['loss_error']:.0e}",
        f"{v['gradient_error']:.0e}" + ("" if v["agrees"] else " ✗"),
        f"{v[case['clock']] / case['floor_seconds']:.2f}",
    )


def _ratios(
    ours: dict[str, Any], v: dict[str, Any], clock: str, found: Line | None
) -> tuple[str, ...]:
    if clock not in ours:
        return ("", "", "", "")
    known = ours["peak_mib"] is not None and v["peak_mib"]
    goal = found.goal if found else None
    return (
        f"{v[clock] / ours[clock]:.2f}×",
        f"≥ {goal.speed:.1f}× {mark(found.fast)}" if found and goal else "",
        f"{ours['peak_mib'] / v['peak_mib']:.2f}" if known else "",
        f"≤ {goal.memory:.2f} {mark(found.small)}" if found and goal and goal.memory else "",
    )


def mark(reached: bool | None) -> str:
    """A tick, a cross, or a question where there is no figure."""
    return "?" if reached is None else "✓" if reached else "✗"
