"""Runs the parts, writes each case as it ends, and shows the table."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cpo_arabic.files import write_whole
from scripts.bench import cost, head, page, picture, queue, step, table
from scripts.bench.cases import ROOT, Case
from scripts.bench.measure import TOLERANCE, Watch, WorkerError, hardware, matmul_rate

PARTS: dict[str, ModuleType] = {"step": step, "head": head, "queue": queue, "cost": cost}
RECORDED = ROOT / "docs" / "bench"


def settings_of(part: ModuleType, quick: bool, changes: dict[str, int]) -> Any:
    """A part's settings, with those of the changes that it has."""
    chosen = part.QUICK if quick else part.Settings()
    own = {field.name for field in fields(chosen)} & set(changes)
    return replace(chosen, **{name: type(getattr(chosen, name))(changes[name]) for name in own})


def cases_of(part: str, wanted: list[str]) -> list[str]:
    """The part's cases, or those of it that are asked for; a step's may be any.

    Raises:
        BadParameter: one that no part has.
    """
    fixed = {case for each in (head, queue, cost) for case in each.CASES}
    if part != "step" or not wanted:
        return [case for case in PARTS[part].CASES if case in wanted or not wanted]
    try:
        return [Case.parse(name).name for name in wanted if name not in fixed]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def turns_of(part: str, name: str, variants: list[str], settings: Any) -> int:
    """How many turns a case will take, for the progress bar."""
    points = len(settings.points(name)) if part == "cost" else 1
    return len(variants) * points * (1 + settings.repeats)


def run(
    part: str,
    cases: list[str],
    variants: list[str],
    settings: Any,
    about: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
    watch: Callable[[str], Watch],
) -> dict[str, Any]:
    """A part's record, given to ``keep`` after every case; a case that fails says so."""
    record = {**about, "settings": vars(settings), "cases": []}
    if part == "step":
        record["unsupported"] = step.unsupported()
    for name in cases:
        try:
            found = PARTS[part].measure(name, variants, settings, watch(f"{part} {name}"))
        except WorkerError as error:
            found = {"case": name, "note": f"failed: {error}"}
        record["cases"].append(found)
        keep(record)
    return record


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="step, head, queue, cost; all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="smaller shapes, fewer repeats")] = False,
    output: Annotated[Path, typer.Option(help="folder of the records")] = RECORDED,
    case: Annotated[list[str] | None, typer.Option(help="only these")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="only these")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="a setting: hidden=64, repeats=9, …")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, envvar="OMP_NUM_THREADS")] = 1,
) -> None:
    """Ours beside its peers: speed, peak memory and correctness."""
    names = parts or list(PARTS)
    if unknown := set(names) - set(PARTS):
        raise typer.BadParameter(f"{sorted(unknown)} is not among: {', '.join(PARTS)}")
    changes = _changes(change or [], names) | {"threads": threads}
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}  # of workers
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 190)
    about = {
        "command": command(),
        "hardware": hardware(threads),
        "matmul_gflops_per_second": matmul_rate() / 1e9,
        "tolerance": TOLERANCE,
    }
    console.print_json(json.dumps(about["hardware"]))
    plans = []
    for part in names:
        settings = settings_of(PARTS[part], quick, changes)
        known = PARTS[part].variants(settings)
        chosen = [name for name in known if not variant or name in variant]
        plans.append((part, cases_of(part, case or []), chosen, settings))
    total = sum(turns_of(p, name, v, s) for p, cases, v, s in plans for name in cases)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total)

        def watch(where: str) -> Watch:
            return lambda name: progress.update(bar, advance=1, description=f"{where}: {name}")

        for part, cases, chosen, settings in plans:

            def keep(record: dict[str, Any], part: str = part) -> None:
                text = json.dumps(record, indent=1, ensure_ascii=False)
                write_whole(output / f"{part}.json", text + "\n")

            run(part, cases, chosen, settings, about, keep, watch)
    records = page.read(output)
    picture.draw(records, output)
    write_whole(output / "README.md", page.written(records))
    table.show(records, console)
    console.print(f"Written to {output}: JSON, pictures, README.md", style="dim")
    if not page.all_agree(records):
        raise typer.Exit(1)


def command() -> str:
    """As it can be given again."""
    return " ".join(["python -m scripts.bench", *sys.argv[1:]])


def _changes(texts: list[str], names: list[str]) -> dict[str, int]:
    known = {field.name for name in names for field in fields(PARTS[name].Settings)}
    changes = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or not value.isdecimal():
            raise typer.BadParameter(
                f"{text!r}: NAME=NUMBER with one of {', '.join(sorted(known))}"
            )
        changes[name] = int(value)
    return changes


if __name__ == "__main__":
    typer.run(main)
