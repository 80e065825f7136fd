"""The command line: ``cpo-arabic VERB``. The only place that prints, exits or catches our errors.

Each module of this room adds its verbs with ``register(app)``. Modules that pull in the
machine-learning stack are imported inside the verbs, so that ``--help`` and ``validate-config``
answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cpo_arabic import __version__
from cpo_arabic.cli import config as config_verbs
from cpo_arabic.cli import data as data_verbs
from cpo_arabic.cli import estimate as estimate_verbs
from cpo_arabic.cli import train as train_verbs
from cpo_arabic.cli.options import EXIT_REFUSED
from cpo_arabic.errors import CPOArabicError

app = typer.Typer(
    name="cpo-arabic",
    help=(
        "Fine-tune Qwen-family models for Arabic by Contrastive Preference Optimization.\n\n"
        "One YAML file describes a run:\n\n"
        "\b\n"
        "  cpo-arabic config init quick -o my.yaml   a commented file to start from\n"
        "  cpo-arabic validate-config my.yaml        what is wrong, risky or slow\n"
        "  cpo-arabic train my.yaml                  train\n\n"
        "Any value can be overridden: --set cpo.beta=0.2 wins over the variable "
        "CPO_ARABIC_CPO__BETA=0.2, which wins over .env, which wins over the file."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cpo-arabic {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


train_verbs.register(app)
config_verbs.register(app)
data_verbs.register(app)
estimate_verbs.register(app)


def main() -> None:
    """Run the command line; the package's errors become a message and exit status 2."""
    from cpo_arabic.cli.show import show_error

    try:
        app()
    except CPOArabicError as error:
        show_error(error)
        sys.exit(EXIT_REFUSED)
