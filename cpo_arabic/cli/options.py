"""Arguments and options that several verbs share, and the exit status of a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_REFUSED = 2

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="Override one value, over file and environment. Repeatable.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print data for programs.")]
