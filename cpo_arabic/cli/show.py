"""How results and errors look on a terminal.

Arabic stays in logical order: the terminal shapes and orders it. Control and bidirectional
characters are escaped before anything is echoed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from cpo_arabic.errors import ConfigError, CPOArabicError, Problem

if TYPE_CHECKING:
    from cpo_arabic.config import CPOConfig, Finding, LoadedConfig

_STYLES = {"error": "bold red", "warning": "bold yellow", "advice": "bold cyan"}


def stdout() -> Console:
    """The console of results."""
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    """The console of errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def show_error(error: CPOArabicError, console: Console | None = None) -> None:
    """Print an error of the package, each problem of a configuration by itself."""
    console = console or stderr()
    if not isinstance(error, ConfigError):
        lines = "\n".join(map(safe, str(error).splitlines()))
        console.print(Text.assemble(("error: ", _STYLES["error"]), lines))
        return
    for problem in error.problems:
        show_problem(problem, console)
    count = len(error.problems)
    console.print(
        Text(f"{count} problem{'s' if count > 1 else ''}; nothing was started or written")
    )


def show_problem(problem: Problem, console: Console) -> None:
    """Print one problem as a compiler does: sentence, place, line with carets, remedy."""
    console.print(Text.assemble(("error: ", _STYLES["error"]), (problem.sentence, "bold")))
    if problem.place:
        console.print(Text(f"  --> {problem.place}", style="blue"))
    for number, line in enumerate(problem.caret_lines()):
        console.print(Text(line, style="" if number == 0 else "red"))
    for other in problem.also:
        console.print(Text(f"  with: {other}"))
    if problem.remedy:
        console.print(Text.assemble(("  remedy: ", "green"), problem.remedy))
    console.print()


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print warnings and advice apart."""
    for severity, title in (("warning", "Warnings"), ("advice", "Advice")):
        chosen = [finding for finding in findings if finding.severity == severity]
        if not chosen:
            continue
        console.print(Text(title, style=_STYLES[severity]))
        for finding in chosen:
            place = f" ({finding.place})" if finding.place else ""
            console.print(Text(f"  • {finding.message}{place}"))
            console.print(Text.assemble(("    remedy: ", "green"), finding.remedy))
        console.print()


def show_verdict(name: str, objective: str, findings: Sequence[Finding], strict: bool) -> None:
    """Print what validate-config found in a legal configuration."""
    console = stdout()
    show_findings(findings, console)
    console.print(Text.assemble(("Objective: ", "bold"), objective))
    warnings = sum(finding.severity == "warning" for finding in findings)
    counts = f"{warnings} warning{'' if warnings == 1 else 's'}, {len(findings) - warnings} advice"
    if strict and warnings:
        console.print(Text.assemble((f"{name} is refused by --strict", "bold red"), f": {counts}"))
        return
    console.print(Text.assemble((f"{name} is valid", "bold green"), f" ({counts})"))


def show_values(loaded: LoadedConfig) -> None:
    """Print every value with where it came from, set ones in bold."""
    from rich.table import Table

    from cpo_arabic.config.fields import SECTIONS, all_fields
    from cpo_arabic.config.writing import yaml_value

    console = stdout()
    for section in SECTIONS:
        table = Table(title=section, title_justify="left", title_style="bold", box=None)
        table.add_column("field", no_wrap=True)
        table.add_column("value", overflow="fold")
        table.add_column("from", overflow="fold")
        for field in (one for one in all_fields().values() if one.section == section):
            origin = loaded.provenance[field.path]
            style = "dim" if origin.kind == "default" else "bold"
            value = safe(yaml_value(loaded.config.get(field.path)))
            table.add_row(Text(f"  {field.name}", style), Text(value, style), Text(str(origin)))
        console.print(table)
        console.print()


def print_json(value: Any) -> None:
    """Print data for programs."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def error_as_data(error: ConfigError) -> dict[str, Any]:
    """An error as data."""
    return {
        "valid": False,
        "errors": [asdict(problem) | {"place": problem.place} for problem in error.problems],
        "warnings": [],
        "advice": [],
    }


def verdict_as_data(objective: str, findings: Sequence[Finding], valid: bool) -> dict[str, Any]:
    """The verdict on a legal configuration as data."""
    return {
        "valid": valid,
        "errors": [],
        "warnings": [asdict(f) for f in findings if f.severity == "warning"],
        "advice": [asdict(f) for f in findings if f.severity == "advice"],
        "objective": objective,
    }


def values_as_data(loaded: LoadedConfig) -> dict[str, Any]:
    """Every value with the written one and its origin, as data."""
    return {
        path: {"value": loaded.config.get(path), "written": _written(loaded.written, path)}
        | {"origin": asdict(origin)}
        for path, origin in loaded.provenance.items()
    }


def _written(config: CPOConfig, path: str) -> Any:
    return config.get(path) if config.is_set(path) else None


def safe(text: str) -> str:
    """Text that cannot play tricks on a terminal."""
    from cpo_arabic.config.characters import escaped

    return escaped(text)
