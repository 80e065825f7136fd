"""``cpo-arabic estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cpo_arabic.cli.options import ConfigArgument, JsonOption, SetOption
from cpo_arabic.cli.show import print_json, safe, show_findings, stderr, stdout
from cpo_arabic.cli.train import quiet_libraries

if TYPE_CHECKING:
    from cpo_arabic.run.estimate import Lever, Report
    from cpo_arabic.run.workload import Shape

MIB = 2**20
HEAP = (
    "This is what tensors hold. The C library's heap may keep more, most of all under gradient "
    "checkpointing; MALLOC_MMAP_THRESHOLD_=4194304 THP_MEM_ALLOC_ENABLE=1 before the command "
    "makes it give that back, for some time."
)


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("estimate")(estimate)


def estimate(
    config: ConfigArgument,
    overrides: SetOption = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="P,C,k",
            help="Prompt tokens, completion tokens, negatives, in place of the training data.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict peak memory and time of a step, before any weight is loaded.

    The step is gone through on tensors without storage, with the largest micro-batch of the
    training data. Every legal change that would save memory is gone through as well.
    """
    from cpo_arabic.config import load_config

    loaded = load_config(config, overrides or [])
    with quiet_libraries():
        from cpo_arabic.run.estimate import estimate as run
        from cpo_arabic.run.workload import Shape

        groups = None if shape is None else _parsed(shape, Shape)
        report = run(loaded.written, groups)
    if as_json:
        print_json(_as_data(report))
        return
    show_findings([f for f in loaded.findings if f.severity == "warning"], stderr())
    _show(report)


def _parsed(text: str, shape: type[Shape]) -> Shape:
    try:
        prompt, completion, negatives = (int(part) for part in text.split(","))
    except ValueError:
        prompt = completion = negatives = 0
    if min(prompt, completion, negatives) < 1:
        raise typer.BadParameter(f"{text!r} is not three whole numbers from 1, such as 512,64,3")
    return shape(prompt, completion, negatives)


def _show(report: Report) -> None:
    console, found, work = stdout(), report.estimate, report.estimate.workload
    table = Table(title=f"Peak {_bytes(found.peak)}, at: {found.moment}", title_justify="left")
    table.add_column("")
    table.add_column("memory", justify="right")
    table.add_column("share", justify="right")
    for name, size in found.items.items():
        table.add_row(name, _bytes(size), f"{size / found.peak:.0%}")
    console.print(table)
    tokens = work.tokens * work.micro_batches
    facts = {
        "parameters": f"{found.parameters:,}, of which {found.trainable:,} train",
        "batches": f"{work.source}; a row is {work.tokens / work.positions:.0%} full",
        "step": f"{_seconds(found.step_seconds)}, {tokens:,.0f} tokens in {work.micro_batches} "
        "micro-batches",
    }
    if work.steps is not None:
        whole = _seconds(work.steps * found.step_seconds)
        facts["run"] = f"{whole} for {work.steps} steps, without evaluation and saving"
    for name, fact in facts.items():
        console.print(Text.assemble((f"{name:<12}", "bold"), safe(fact)))
    _show_levers(report)
    _show_verdict(report)


def _show_levers(report: Report) -> None:
    now, console = report.estimate, stdout()
    saving = [lever for lever in report.levers if lever.estimate.peak < now.peak]
    if not saving:
        console.print(Text("No other setting would need less memory.", style="cyan"))
        return
    table = Table(title="Levers", title_justify="left")
    table.add_column("change", no_wrap=True)
    for head in ("peak", "saves", "a step takes"):
        table.add_column(head, justify="right")
    for lever in saving:
        there = lever.estimate
        saved = f"{_bytes(now.peak - there.peak)} ({1 - there.peak / now.peak:.0%})"
        table.add_row(_change(lever, "\n"), _bytes(there.peak), saved, _seconds(there.step_seconds))
    console.print(table)
    best = saving[0]
    most = now.peak - best.estimate.peak
    line = f"{_change(best)} saves most: {_bytes(most)} ({most / now.peak:.0%})"
    console.print(Text(line, style="bold cyan"))


def _show_verdict(report: Report) -> None:
    peak, machine = report.estimate.peak, report.machine
    if machine.free is None:
        line, style = f"How much memory {machine.device} has free is not known here.", "yellow"
    elif peak <= machine.free:
        line, style = f"It fits: {_bytes(machine.free)} are free ({machine.device}).", "bold green"
    else:
        line = f"It does not fit: {_bytes(machine.free)} are free ({machine.device})."
        style = "bold red"
    stdout().print(Text(line, style=style))
    if machine.kind == "cpu":
        stdout().print(Text(HEAP, style="dim"))


def _change(lever: Lever, between: str = ", ") -> str:
    return between.join(
        f"{path}: {str(value).lower() if isinstance(value, bool) else value}"
        for path, value in lever.changes.items()
    )


def _bytes(size: int) -> str:
    return f"{size / MIB:,.0f} MiB" if size < 1024 * MIB else f"{size / 1024 / MIB:,.1f} GiB"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _as_data(report: Report) -> dict[str, Any]:
    found, work, machine = report.estimate, report.estimate.workload, report.machine
    return {
        "peak_bytes": found.peak,
        "peak_at": found.moment,
        "items": found.items,
        "parameters": found.parameters,
        "trainable_parameters": found.trainable,
        "step_seconds": found.step_seconds,
        "steps": work.steps,
        "run_seconds": None if work.steps is None else work.steps * found.step_seconds,
        "data": {
            "source": work.source,
            "micro_batches": work.micro_batches,
            "tokens_per_step": work.tokens * work.micro_batches,
            "fill": work.tokens / work.positions,
            "largest_micro_batch": list(work.largest.input_ids.shape),
        },
        "machine": {
            "device": machine.device,
            "free_bytes": machine.free,
            "flops_per_second": machine.work_rate,
            "bytes_per_second": machine.traffic_rate,
        },
        "fits": None if machine.free is None else found.peak <= machine.free,
        "levers": [
            {
                "changes": lever.changes,
                "peak_bytes": lever.estimate.peak,
                "saved_bytes": found.peak - lever.estimate.peak,
                "step_seconds": lever.estimate.step_seconds,
            }
            for lever in report.levers
        ],
    }
