"""The page and the README's block, written from the records so that no number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.goals import TRL, Line, Records, fastest, is_quick, lines
from scripts.bench.law import LAYOUTS, Point, laws
from scripts.bench.table import mark

PEERS = ("step", "head", "queue")
MEASURED = (*PEERS, "profile", "cost")
PARTS = (*MEASURED, "data", "estimate")
STEP_TEXT = """\
A step is forward, loss, backward and AdamW (fused on both sides) from collated batches, in
float32, neither side clipping. Both sides compute the published CPO loss (`sigmoid`, beta 0.1,
cpo_alpha 1, no contrastive term) of the very same model, TRL on k pairs where a prompt has k
negatives.

- **case** `P,C,k`: one prompt of P random tokens, k + 1 completions of C, a random Qwen2 (hidden
  {hidden}, {layers} layers, vocabulary {vocab}). `demo,k,G`: G (32) rows of
  `demo/data/train.jsonl` with the first k negatives written for each, and the demo's model.
  `wmt24pp,1,G`: G WMT24++ pairs (English source; Arabic post-edit, and the translation before it),
  with the demo's model. `lora`: an adapter of rank 16 on every linear layer but the head; all
  else, the head included, is frozen.
- **tokens**: those of the data set's rows, each prompt and each completion once, no padding. The
  same number for every variant of a case.
- **× TRL**: times as fast as the fastest TRL variant of the case, in CPU seconds.
- **peak**: resident-set high-water mark of a step over the loaded model, in MiB. **working**: the
  same less gradients and Adam's moments, which every variant must hold.
- **× floor**: CPU seconds over what the matrix products that nobody can leave out would take at
  the machine's measured speed: each token once through the decoder's matrices, each completion
  token once through the head. 1.0 cannot be reached, since attention, norms and AdamW are work,
  too."""
TRL_TEXT = """\
`TRL, defaults` is CPOTrainer as it comes, but for bf16: gradient checkpointing on. The others
switch it off, and compile the model. What could make it faster and cannot be used here:"""
PROFILE_TEXT = """\
One profiled step, before (rows and all logits), with rows and the fused head, and after (trees,
too); the profiler's own cost is in it."""
HEAD_TEXT = """\
−log σ(0.1·(log π chosen − log π rejected)) from hidden states ({tokens} tokens, {dim} features)
and a head ({head_vocab} × {dim}), forward and backward; {pairs} pairs. `trained`: gradients of
both; `frozen`: of the hidden states alone. Peak memory is over what was in use before any call, so
that what a variant keeps between calls is in it. × floor: over 6 (trained) or 4 (frozen) products
of tokens, features and vocabulary."""
QUEUE_TEXT = """\
{queries} queries against one positive each and a queue of {queue} × {queue_dim}, forward and
backward to the queries. `plain` is MoCo's loss; `concentration 0.5` weights hard negatives, which
MoCo has no code for, so the eager definition stands beside it. The bfloat16 and int8 queues are
stored rounded: their errors are of that. × floor: over the two products with the queue, at the
speed of a large square product."""

COST_TEXT = """\
A random Qwen2 (hidden {hidden}, {layers} layers) around P {prompt}, C {completion}, k {negatives},
G {groups}, vocabulary {vocab}, one thing changed at a time; CPU seconds are medians. Two laws, each
fitted by least squares to the points in which P, C and K = k + 1 change; the lines over G are what
these fits predict. R², and the largest relative error at a point:"""
ESTIMATE_TEXT = """\
Peak memory of a step over the process before the model was loaded, and its seconds: predicted
before any weight is read, and then measured (hidden {hidden}, {layers} layers, vocabulary
{vocabulary}, the demo's rows). The aim is a ratio within {tolerance} of 1; what glibc keeps of
freed memory comes on top.
Weights are mapped from their file; what of them no step has read counts as measured."""
GOALS_TEXT = """\
Errors are ours, relative to float64. The last columns are the ratios that ours would have at its
floors, the physical limits: if it took no longer than its matrix products, and if a step held
nothing but gradients and Adam's moments, which TRL's holds, too."""
SUMMARY_TEXT = """\
Each peer in its fastest supported setting, the same work on both sides, loss and gradient checked
against float64; ratios of CPU seconds and of peak memory in one run, the goal in brackets.
Where the processor is not Intel's, our large float32 products run on oneDNN, the peers' on MKL,
where PyTorch sends them; on an Intel processor all run on MKL, and the ratios are smaller. A goal
below its floor (of memory: gradients and Adam's moments, over TRL's peak) is named with it.
{about}
Everything that was measured, with the physical floor of each figure, is in
[docs/bench](docs/bench/README.md). `make bench` measures it anew."""


def read(folder: Path) -> Records:
    """The records that are there."""
    paths = {part: folder / f"{part}.json" for part in PARTS}
    return {
        part: json.loads(path.read_text(encoding="utf-8"))
        for part, path in paths.items()
        if path.exists()
    }


def all_agree(records: Records) -> bool:
    """Ours computed what the definition in float64 says, wherever it was run."""
    return all(
        variant.get("agrees", True)
        for part in PEERS
        for case in records.get(part, {}).get("cases", [])
        for name, variant in case.get("variants", {}).items()
        if name.startswith("ours")
    )


def written(records: Records) -> str:
    """``docs/bench/README.md``."""
    parts = {
        "step": _step,
        "profile": _profile,
        "head": _head,
        "queue": _queue,
        "cost": _cost,
        "data": _data,
        "estimate": _estimate,
    }
    blocks = [
        "# Ours beside its peers",
        "Written by `make bench` from the JSON files beside it; nothing here is typed by hand.",
        _about(records),
        *(["**A quick look, on smaller shapes than the goals'.**"] if is_quick(records) else []),
        "## Goals",
        _goals(lines(records)),
        *(
            block
            for part, make in parts.items()
            if part in records
            for block in make(records[part])
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def summary(records: Records) -> str:
    """The README's block."""
    if not any(part in records for part in PEERS):
        return "No benchmark has been recorded yet."
    found = [
        (each.goal.against, each.goal.what, *_reached(each))
        if not each.note
        else (each.goal.against, each.goal.what, each.note, "")
        for each in lines(records)
        if each.note != "not run"
    ]
    heads = ("against", "work", "times as fast", "part of its memory")
    return f"{SUMMARY_TEXT.format(about=_about(records))}\n\n{_table(heads, found, left=2)}"


def _about(records: Records) -> str:
    """Command, hardware, versions and speed of the runs, once where they are the same."""
    texts = [
        f"Measured with `{record['command']}` on {_machine(record['hardware'])}, "
        f"matrix products at {record['matmul_gflops_per_second']:.0f} GFLOP/s."
        for part, record in records.items()
        if part in MEASURED
    ]
    return "\n".join(dict.fromkeys(texts))


def _machine(hardware: dict[str, Any]) -> str:
    packages = ("torch", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
    versions = ", ".join(f"{name} {hardware[name]}" for name in packages if hardware.get(name))
    threads = hardware.get("threads", 1)
    return (
        f"{hardware['processor']} ({hardware.get('capability', '?')}), "
        f"{threads} thread{'s' * (threads > 1)} of {hardware['cores']} cores, "
        f"Python {hardware['python']}, {versions}"
    )


def _reached(found: Line) -> tuple[str, str]:
    """Speed and memory, each with its goal."""
    goal = found.goal
    speed = (
        "–" if found.speed is None else f"{found.speed:.2f}× (≥ {goal.speed:g}) {mark(found.fast)}"
    )
    if goal.extra_mib is not None:
        known = "?" if found.peak_mib is None else f"{found.peak_mib:.0f} MiB"
        return speed, f"{known} (≤ {goal.extra_mib:g} MiB) {mark(found.small)}"
    memory = "–" if found.memory is None else f"{found.memory:.2f}"
    if goal.memory is not None:
        floor = f"; floor {found.memory_at_floor:.2f}" if found.out_of_reach else ""
        memory += f" (≤ {goal.memory:g}{floor}) {mark(found.small)}"
    return speed, memory


def _goals(found: list[Line]) -> str:
    """Every goal, what was reached, how exact it is and how far from the floor."""
    heads = (
        "against", "work", "its fastest", "times as fast", "part of its memory",
        "loss error", "gradient error", "× floor", "speed at the floor", "memory at the floor",
    )  # fmt: skip
    rows = []
    for each in found:
        if each.note:
            rows.append((each.goal.against, each.goal.what, each.note, *[""] * 7))
            continue
        rows.append(
            (
                each.goal.against,
                each.goal.what,
                each.peer or "not measured",
                *_reached(each),
                f"{each.loss_error:.0e}",
                f"{each.gradient_error:.0e}",
                f"{each.floors:.2f}" + _floor_goal(each),
                "–" if each.speed_at_floor is None else f"{each.speed_at_floor:.1f}×",
                "–" if each.memory_at_floor is None else f"{each.memory_at_floor:.2f}",
            )
        )
    return f"{_table(heads, rows, left=3)}\n\n{GOALS_TEXT}"


def _floor_goal(found: Line) -> str:
    limit = found.goal.floors
    if limit is None or found.floors is None:
        return ""
    return f" (≤ {limit:.1f}) {mark(found.floors <= limit)}"


def _step(record: dict[str, Any]) -> list[str]:
    missing = [f"- `{name}`: {reason}." for name, reason in record.get("unsupported", {}).items()]
    return [
        "## One optimizer step",
        "![speed and memory of a step](step.png)",
        STEP_TEXT.format(**record["settings"]),
        _variants(record, TRL, "× TRL", working=True),
        TRL_TEXT,
        "\n".join(missing) or "(TRL is not installed.)",
    ]


def _profile(record: dict[str, Any]) -> list[str]:
    blocks = [
        "## Where a step's time goes",
        "![seconds of a step by kind of work](profile.png)",
        PROFILE_TEXT,
    ]
    for case in record["cases"]:
        found = case.get("seconds")
        if not found:
            blocks.append(f"`{case['case']}`: {case.get('note', 'not measured')}.")
            continue
        rows = [
            (kind, *(f"{seconds[kind]:.3f}" for seconds in found.values()))
            for kind in next(iter(found.values()))
        ]
        rows.append(("all", *(f"{sum(seconds.values()):.3f}" for seconds in found.values())))
        blocks.append(_table((f"`{case['case']}`, wall seconds", *found), rows, left=1))
    return blocks


def _head(record: dict[str, Any]) -> list[str]:
    return [
        "## Head and loss alone",
        "![seconds and memory of the kernels](kernels.png)",
        HEAD_TEXT.format(**record["settings"]),
        _variants(record, ("ours",), "× ours"),
    ]


def _queue(record: dict[str, Any]) -> list[str]:
    return [
        "## Contrastive loss against a queue",
        QUEUE_TEXT.format(**record["settings"]),
        _variants(record, ("ours",), "× ours"),
    ]


def _variants(
    record: dict[str, Any], base: tuple[str, ...], ratio: str, *, working: bool = False
) -> str:
    """Every variant of every case; ``ratio`` is speed over the fastest of ``base``."""
    heads = ["case", "variant", "CPU s", "wall s", ratio, "peak"]
    heads += ["working"] * working + ["× floor", "loss error", "gradient error"]
    rows = []
    for case in record["cases"]:
        if "note" in case:
            rows.append((case["case"], case["note"], *[""] * (len(heads) - 2)))
            continue
        best, clock = fastest(case, base), case["clock"]
        for name, v in case["variants"].items():
            if clock not in v:
                rows.append((case["case"], name, v["note"], *[""] * (len(heads) - 3)))
                continue
            of_best = f"{case['variants'][best][clock] / v[clock]:.2f}" if best else "–"
            rows.append(
                (
                    case["case"],
                    name + (f" ({v['note']})" if "note" in v else ""),
                    f"{v['cpu_seconds']:.3f}",
                    f"{v['wall_seconds']:.3f}",
                    of_best,
                    _mib(v["peak_mib"]),
                    *([_mib(v["working_mib"])] if working else []),
                    f"{v[clock] / case['floor_seconds']:.2f}",
                    f"{v['loss_error']:.0e}",
                    f"{v['gradient_error']:.0e}" + ("" if v["agrees"] else " ✗"),
                )
            )
    return _table(heads, rows, left=2)


def _cost(record: dict[str, Any]) -> list[str]:
    cases = [case for case in record["cases"] if case.get("cpu_seconds")]
    rows = [
        (layout, *(f"{law.r_squared:.3f}, {law.worst:.0%}" for law in found.values()))
        for layout in LAYOUTS
        if (found := laws(cases, layout))
    ]
    values = vars(Point()) | record["settings"]
    return [
        "## What a step's time grows with",
        "![step time against each of the things it could grow with](cost.png)",
        COST_TEXT.format(**values),
        _table(("layout", "a + b·G·(P + K·C)", "a + b·G·K·(P + C)"), rows, left=1),
    ]


def _data(record: dict[str, Any]) -> list[str]:
    """What ``scripts/bench_data.py`` kept."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    processor, cores = record["hardware"]["processor"], record["hardware"]["cores"]
    blocks = [
        "## Preparing data",
        f"`{record['command']}`: {processor}, {cores} cores, {versions}.",
    ]
    if found := record.get("preparation"):
        speeds = found["rows_a_second_by_workers"]
        rows = [
            (
                workers,
                *(f"{median(speed[who]):,.0f}" for who in ("ours", "trl")),
                f"{speed['ratio']:.1f}×",
            )
            for workers, speed in speeds.items()
        ]
        heads = ("workers", "ours, rows a second", "TRL, rows a second", "times as fast")
        blocks += [
            f"{found['rows']:,} rows ({found['bytes'] / 1e6:.0f} MB) from file to token ids; "
            "medians of turns, ours with its memory-mapped cache written:",
            _table(heads, rows, left=1),
        ]
    if found := record.get("stream"):
        blocks.append(
            f"A file of {found['bytes'] / 1e9:.2f} GB ({found['rows']:,} rows) streamed in "
            f"{found['seconds']:.0f} s: resident memory "
            f"{found['peak_mib_before_the_first_row']:.0f} MiB before the first row, "
            f"{found['peak_mib']:.0f} MiB at the peak."
        )
    return blocks


def _estimate(record: dict[str, Any]) -> list[str]:
    """What ``scripts/bench_estimate.py`` kept."""
    rows = [
        (
            name,
            f"{c['predicted_mib']:.0f}",
            f"{c['measured_mib']:.0f}",
            f"{c['predicted_mib'] / c['measured_mib']:.2f}",
            f"{c['heap_mib']:.0f}",
            f"{c['predicted_seconds']:.2f}",
            f"{c['measured_seconds']:.2f}",
        )
        for name, c in record["cases"].items()
    ]
    heads = ("case", "predicted MiB", "measured", "ratio", "with glibc's heap")
    model = record["model"]
    text = ESTIMATE_TEXT.format(**model, tolerance=f"{record['tolerance']:.0%}")
    return [
        "## What `cpo-arabic estimate` predicts",
        f"{text}\nMeasured with `{record['command']}` on {_machine(record['hardware'])}.",
        _table((*heads, "predicted s", "CPU s"), rows, left=1),
    ]


def _mib(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _table(heads: Any, rows: Any, *, left: int) -> str:
    """A Markdown table whose first ``left`` columns are text."""
    rule = ["---"] * left + ["--:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))
