"""The verbs that look at configurations: ``validate-config`` and ``config …``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpo_arabic.cli.data import run_check, show_check
from cpo_arabic.cli.options import EXIT_REFUSED, ConfigArgument, JsonOption, SetOption
from cpo_arabic.errors import ConfigError

if TYPE_CHECKING:
    from cpo_arabic.config import LoadedConfig

verbs = typer.Typer(
    name="config",
    help="Show, edit and start configuration files.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("validate-config")(validate_config)
    app.add_typer(verbs)


def validate_config(
    config: ConfigArgument,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Let warnings count: exit with 2 if there is one.")
    ] = False,
    data: Annotated[
        bool,
        typer.Option("--data", help="Read the data too and report on it, as data check does."),
    ] = False,
) -> None:
    """Check a configuration: errors, warnings and advice, and the objective in one line.

    Nothing is trained, downloaded or written. Exit status: 2 with an error, else 0.
    """
    from cpo_arabic.cli import show
    from cpo_arabic.config.advice import describe_objective, file_findings

    try:
        loaded = _load(config, overrides)
        missing = [loaded.placed(finding) for finding in file_findings(loaded.written)]
        if data and missing:
            raise ConfigError([finding.as_problem() for finding in missing])
    except ConfigError as error:
        if not as_json:
            raise
        show.print_json(show.error_as_data(error))
        raise typer.Exit(EXIT_REFUSED) from None
    findings = [*missing, *loaded.findings]
    refused = strict and any(finding.severity == "warning" for finding in findings)
    objective = describe_objective(loaded.config)
    report, bad_row = run_check(loaded.config) if data else (None, False)
    if as_json:
        verdict = show.verdict_as_data(objective, findings, not refused)
        show.print_json(verdict if report is None else verdict | {"data": report.as_data()})
    else:
        show.show_verdict(show.safe(str(config)), objective, findings, strict)
        if report is not None:
            show_check(report, show.stdout())
    if refused or bad_row:
        raise typer.Exit(EXIT_REFUSED)


@verbs.command("show")
def show_config(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file; none shows the defaults.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the resolved configuration with where each value came from."""
    from cpo_arabic.cli import show

    loaded = _load(config, overrides)
    if as_json:
        show.print_json(show.values_as_data(loaded))
    else:
        show.show_values(loaded)


@verbs.command("set")
def set_values(
    config: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file to change.")],
    assignments: Annotated[
        list[str], typer.Argument(metavar="SECTION.FIELD=VALUE…", help="Values to write into it.")
    ],
) -> None:
    """Change values in a file and keep its comments and order; an illegal result is refused."""
    from cpo_arabic.cli import show
    from cpo_arabic.config.editing import set_values as edit

    loaded = edit(config, assignments)
    fields = {assignment.partition("=")[0].strip() for assignment in assignments}
    show.show_findings([f for f in loaded.findings if f.field in fields], show.stdout())
    print(f"wrote {show.safe(str(config))}")


@verbs.command("schema")
def schema() -> None:
    """Print the JSON Schema of a configuration file, for editors."""
    from cpo_arabic.cli import show
    from cpo_arabic.config.schema import json_schema

    show.print_json(json_schema())


@verbs.command("init")
def init(
    name: Annotated[
        str | None, typer.Argument(metavar="[TEMPLATE]", help="Which file; none lists them.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; TEMPLATE.yaml here by default."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented file to start from, and the editor's schema beside it."""
    from cpo_arabic.cli import show
    from cpo_arabic.config import templates

    if name is None:
        width = max(map(len, templates.templates()))
        for one in templates.templates().values():
            print(f"{one.name:<{width}}  {one.summary}")
        return
    chosen = templates.template(name)
    target = output or Path(f"{chosen.name}.yaml")
    for path in templates.write_start(chosen, target, force=force):
        print(f"wrote {show.safe(str(path))}")
    print(f"next: cpo-arabic validate-config {show.safe(str(target))}")


def _load(config: Path | None, overrides: list[str] | None) -> LoadedConfig:
    from cpo_arabic.config import load_config

    return load_config(config, overrides or [])
