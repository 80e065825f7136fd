"""The pictures of the records: what each part measured, drawn from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpo_arabic.files import whole
from scripts.bench import step
from scripts.bench.goals import GOALS, TRL, Records, fastest
from scripts.bench.law import LAYOUTS, TOKEN_CASES, Law, Point, laws

LABELS = {
    "prompt": "prompt tokens P",
    "completion": "completion tokens C",
    "negatives": "negatives k",
    "groups": "packed groups G",
    "vocab": "vocabulary V",
    "queue": "queued keys Q",
}


def draw(records: Records, folder: Path) -> None:
    """``step.png``, ``profile.png``, ``kernels.png`` and ``cost.png``, where their parts are."""
    if any("variants" in case for case in records.get("step", {}).get("cases", [])):
        _save(_step(records["step"]), folder / "step.png")
    if any(case.get("seconds") for case in records.get("profile", {}).get("cases", [])):
        _save(_profile(records["profile"]), folder / "profile.png")
    kernels = [
        (part, case)
        for part in ("head", "queue")
        for case in records.get(part, {}).get("cases", [])
        if "variants" in case
    ]
    if kernels:
        _save(_kernels(kernels), folder / "kernels.png")
    if cases := [c for c in records.get("cost", {}).get("cases", []) if c.get("cpu_seconds")]:
        _save(_cost(cases), folder / "cost.png")


def _save(figure: Figure, path: Path) -> None:
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def _step(record: dict[str, Any]) -> Figure:
    """Speed and memory against TRL's fastest variant of each case, a panel each."""
    cases = [c for c in record["cases"] if "variants" in c and fastest(c, TRL)]
    names = [n for n in step.VARIANTS if any("peak_mib" in c["variants"].get(n, {}) for c in cases)]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(17, 4.8), layout="constrained")
    width = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        places, faster, part = [], [], []
        for place, case in enumerate(cases):
            best = case["variants"][fastest(case, TRL)]
            v, clock = case["variants"].get(name, {}), case["clock"]
            if clock in v:
                places.append(place + (number - (len(names) - 1) / 2) * width)
                faster.append(best[clock] / v[clock])
                part.append(v["peak_mib"] / best["peak_mib"] if v["peak_mib"] else 0.0)
        colour = plt.get_cmap("Greens" if name in step.OURS else "Greys")(0.85 - 0.12 * number)
        for axes, values, form in ((speed, faster, "%.1f"), (memory, part, "%.2f")):
            axes.bar_label(
                axes.bar(places, values, width, label=name, color=colour), fmt=form, fontsize=6
            )
    goals = {goal.case: goal for goal in GOALS if goal.part == "step"}
    for place, case in enumerate(cases):
        goal, ends = goals.get(case["case"]), (place - 0.4, place + 0.4)
        if goal:
            speed.plot(ends, (goal.speed,) * 2, color="tab:red", lw=1, ls="--")
        if goal and goal.memory:
            memory.plot(ends, (goal.memory,) * 2, color="tab:red", lw=1, ls="--")
    speed.plot([], [], color="tab:red", lw=1, ls="--", label="goal")
    speed.set_title("Speed (higher is better; TRL's fastest = 1)")
    memory.set_title("Peak memory over the loaded model (lower is better; TRL's fastest = 1)")
    for axes in (speed, memory):
        axes.set_xticks(range(len(cases)), [case["case"] for case in cases], fontsize=8)
        axes.set_xlabel("case: prompt, completion, negatives; or rows, negatives")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    return figure


def _profile(record: dict[str, Any]) -> Figure:
    """Seconds of each kind of work, one above the other, a bar per variant."""
    cases = [case for case in record["cases"] if case.get("seconds")]
    figure, panels = plt.subplots(
        1, len(cases), figsize=(6.5 * len(cases), 4.2), layout="constrained", squeeze=False
    )
    for axes, case in zip(panels.flat, cases, strict=True):
        names = list(case["seconds"])
        foot = [0.0] * len(names)
        for kind in case["seconds"][names[0]]:
            parts = [case["seconds"][name][kind] for name in names]
            axes.bar(names, parts, 0.6, bottom=foot, label=kind)
            foot = [low + part for low, part in zip(foot, parts, strict=True)]
        axes.set_title(case["case"])
        axes.set_ylabel("seconds of one profiled step")
        axes.spines[["top", "right"]].set_visible(False)
    panels.flat[-1].legend(frameon=False, fontsize=8)
    return figure


def _kernels(cases: list[tuple[str, dict[str, Any]]]) -> Figure:
    """Seconds and peak memory of each case's variants; the floor is a line."""
    figure, panels = plt.subplots(
        2, len(cases), figsize=(4.6 * len(cases), 7), layout="constrained", squeeze=False
    )
    for (part, case), (speed, memory) in zip(cases, panels.T, strict=True):
        measured = {n: v for n, v in case["variants"].items() if "cpu_seconds" in v}
        names = list(measured)[::-1]
        colours = ["tab:green" if name.startswith("ours") else "0.6" for name in names]
        for axes, key, form in ((speed, "cpu_seconds", "%.3f"), (memory, "peak_mib", "%.0f")):
            values = [measured[name][key] or 0.0 for name in names]
            axes.bar_label(axes.barh(names, values, color=colours), fmt=form, fontsize=7, padding=2)
            axes.margins(x=0.18)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        speed.axvline(case["floor_seconds"], color="tab:red", lw=1, ls="--")
        speed.set_title(f"{part}, {case['case']}", fontsize=9)
        speed.set_xlabel("CPU seconds (dashed: its matrix products alone)", fontsize=8)
        memory.set_xlabel("peak MiB over the inputs", fontsize=8)
    return figure


def _cost(cases: list[dict[str, Any]]) -> Figure:
    """A panel for each thing that was changed: measured points, and the fitted laws as lines."""
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axes, case in zip(panels.flat, cases, strict=False):
        points = [Point(**point) for point in case["points"]]
        styles = zip(LAYOUTS, ("tree", "rows"), ("tab:green", "0.5"), strict=True)
        for layout, law, colour in styles:
            if layout in case["cpu_seconds"]:
                _points(axes, case, layout, colour)
                _law(axes, cases, case, points, layout, law, colour)
        axes.set_xlabel(LABELS[case["case"]])
        axes.set_ylabel("CPU seconds a step")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels.flat[0].legend(frameon=False, fontsize=8)
    return figure


def _points(axes: Axes, case: dict[str, Any], layout: str, colour: str) -> None:
    x = [point[case["case"]] for point in case["points"]]
    axes.plot(x, case["cpu_seconds"][layout], "o", color=colour, label=f"{layout}, measured")


def _law(
    axes: Axes,
    cases: list[dict[str, Any]],
    case: dict[str, Any],
    points: list[Point],
    layout: str,
    law: str,
    colour: str,
) -> None:
    """Of the tokens where they change, else a line of its own."""
    x = [getattr(point, case["case"]) for point in points]
    if case["case"] in TOKEN_CASES:
        fitted = laws(cases, layout).get(law)
        tokens = [
            getattr(point, f"{'tree' if law == 'tree' else 'row'}_tokens") for point in points
        ]
        label = "a + b·G(P + KC)" if law == "tree" else "a + b·GK(P + C)"
    else:
        fitted, tokens, label = Law.fit(x, case["cpu_seconds"][layout]), x, "a line"
    if fitted:
        axes.plot(x, [fitted.at(n) for n in tokens], "-", color=colour, lw=1, label=label)
