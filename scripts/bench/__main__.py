"""Runs the parts, writes each case as it ends, and shows the table."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cpo_arabic.files import write_whole
from scripts.bench import cost, head, page, picture, profile, queue, step, table
from scripts.bench.cases import ROOT, Case
from scripts.bench.measure import TOLERANCE, Watch, WorkerError, hardware, matmul_rate

PARTS: dict[str, ModuleType] = {
    "step": step,
    "profile": profile,
    "head": head,
    "queue": queue,
    "cost": cost,
}
SILENCE = {"TRL_EXPERIMENTAL_SILENCE": "1", "KINETO_LOG_LEVEL": "99"}
RECORDED = ROOT / "docs" / "bench"


class Plan(NamedTuple):
    """What of a part is to be measured."""

    part: str
    cases: list[str]
    only: list[str]  # variants; all of a case if empty
    settings: Any

    def variants(self, case: str) -> list[str]:
        """The case's that are wanted."""
        known = PARTS[self.part].variants(case, self.settings)
        return [name for name in known if name in self.only or not self.only]

    def turns(self, case: str) -> int:
        """How many turns a case will take."""
        points = len(self.settings.points(case)) if self.part == "cost" else 1
        return len(self.variants(case)) * points * (1 + self.settings.repeats)

    def measure(self, case: str, watch: Watch) -> dict[str, Any]:
        """The case's record; one that fails says so."""
        try:
            found: dict[str, Any] = PARTS[self.part].measure(
                case, self.variants(case), self.settings, watch
            )
        except WorkerError as error:
            return {"case": case, "note": f"failed: {error}"}
        return found


def planned(
    part: str, quick: bool, changes: dict[str, int], cases: list[str], variants: list[str]
) -> Plan:
    """A part with those of the changes, cases and variants that it has."""
    module = PARTS[part]
    settings = module.QUICK if quick else module.Settings()
    own = {field.name for field in fields(settings)} & set(changes)
    settings = replace(settings, **{n: type(getattr(settings, n))(changes[n]) for n in own})
    return Plan(part, cases_of(part, cases), variants, settings)


def cases_of(part: str, wanted: list[str]) -> list[str]:
    """The part's cases, or those of it that are asked for; a step's may be any.

    Raises:
        BadParameter: one that no part has.
    """
    fixed = {case for each in (head, queue, cost) for case in each.CASES}
    if part not in ("step", "profile") or not wanted:
        return [case for case in PARTS[part].CASES if case in wanted or not wanted]
    try:
        return [Case.parse(name).name for name in wanted if name not in fixed]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def run(plans: list[Plan], about: dict[str, Any], output: Path, console: Console) -> None:
    """Measures; a part's file is written anew after each of its cases.

    Cases that are not asked for stay in it, if they were measured on this hardware with these
    settings.
    """
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        total = sum(plan.turns(case) for plan in plans for case in plan.cases)
        bar, ended = progress.add_task("", total=total), 0

        def watching(where: str) -> Watch:
            return lambda name: progress.update(bar, advance=1, description=f"{where}: {name}")

        for plan in plans:
            path = output / f"{plan.part}.json"
            fresh = {**about, "settings": vars(plan.settings), "cases": []}
            record = continued(path, fresh, plan.cases)
            if plan.part == "step":
                record["unsupported"] = step.unsupported()
            for case in plan.cases:
                found = plan.measure(case, watching(f"{plan.part} {case}"))
                record["cases"] = in_order(plan.part, [*record["cases"], found])
                text = json.dumps(record, indent=1, ensure_ascii=False)
                write_whole(path, text + "\n")
                console.print(f"{plan.part} {case}: {found.get('note', 'measured')}")
                ended += plan.turns(case)
                progress.update(bar, completed=ended)  # turns that a note stands for, too


def continued(path: Path, record: dict[str, Any], cases: list[str]) -> dict[str, Any]:
    """``record``, with all but ``cases`` of an earlier one if they can stand side by side."""
    if not path.exists():
        return record
    earlier = json.loads(path.read_text(encoding="utf-8"))
    kept = [case for case in earlier["cases"] if case["case"] not in cases]
    same = all(earlier.get(name) == record[name] for name in ("hardware", "quick", "settings"))
    return record | {"command": earlier["command"], "cases": kept} if kept and same else record


def in_order(part: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the part lists its cases; the others after them."""
    known = list(PARTS[part].CASES)
    return sorted(cases, key=lambda c: known.index(c["case"]) if c["case"] in known else len(known))


def main(
    parts: Annotated[
        list[str] | None, typer.Argument(help="step, profile, head, queue, cost; all")
    ] = None,
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
    os.environ |= {"OMP_NUM_THREADS": str(threads), **SILENCE}  # of the processes to come
    torch.set_num_threads(threads)
    plans = [planned(part, quick, changes, case or [], variant or []) for part in names]
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 190)
    about = {
        "command": " ".join(["python -m scripts.bench", *sys.argv[1:]]),
        "quick": quick,
        "hardware": hardware(threads),
        "matmul_gflops_per_second": matmul_rate() / 1e9,
        "tolerance": TOLERANCE,
    }
    console.print_json(json.dumps(about["hardware"]))
    run(plans, about, output, console)
    records = page.read(output)
    picture.draw(records, output)
    write_whole(output / "README.md", page.written(records))
    table.show(records, console)
    console.print(f"Written to {output}: JSON, pictures, README.md", style="dim")
    if not page.all_agree(records):
        raise typer.Exit(1)


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
