"""The verbs that look at configurations: ``validate-config`` and ``config …``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one value; repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("validate-config")(validate_config)


def validate_config(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Check a configuration and say what is wrong, risky or slow; nothing is trained."""
    from cpo_arabic.config import load_config

    load_config(config, overrides or [])
    print("ok")
