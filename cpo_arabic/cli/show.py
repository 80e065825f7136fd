"""How results and errors look on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cpo_arabic.errors import ConfigError, CPOArabicError


def stdout() -> Console:
    """The console of results."""
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    """The console of errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def show_error(error: CPOArabicError, console: Console | None = None) -> None:
    """Print an error of the package, each problem of a configuration by itself."""
    console = console or stderr()
    if isinstance(error, ConfigError):
        for problem in error.problems:
            console.print(Text(f"error: {problem}"))
        return
    console.print(Text(f"error: {error}"))
