"""Every error a user of cpo-arabic can cause or meet.

::

    CPOArabicError
    ├── ConfigError          a value, key, variable or flag of the configuration (one or many)
    ├── DataError            a file, row or column of the preference data
    ├── ModelError           a model, tokenizer or adapter that cannot be loaded or does not fit
    ├── RunDirectoryError    an output directory that is used, read-only or outside its place
    ├── CheckpointError      a checkpoint that is missing, damaged or of another run
    └── TrainingError        a run that cannot go on (non-finite numbers, no memory)

The message is complete by itself: what, where, the value, the rule, the remedy. The command line
shows it without a traceback and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class CPOArabicError(Exception):
    """Base of all errors that are reported to the user by message alone."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration, as plain data."""

    rule: str
    """What is wrong, as a sentence that holds the value and the rule it breaks."""
    remedy: str = ""
    """What to write instead."""
    field: str = ""
    """Dotted path of the field, ``cpo.temperature``; empty where the whole file is meant."""
    value: str | None = None
    """The value as it was written, cut to a readable length; credentials are never echoed."""
    source: str = ""
    """The file, variable or flag that holds the value; empty for Python."""
    line: int | None = None
    """Line in the file, counted from 1."""
    column: int | None = None
    """Column in the line, counted from 1."""
    excerpt: str | None = None
    """That line of the file."""
    width: int = 1
    """How many columns the value takes: the length of the caret line."""
    also: tuple[str, ...] = ()
    """The other fields of the rule, each with its value and place."""

    @property
    def place(self) -> str:
        """``file:line:column``, the name of the variable or flag, or nothing."""
        if self.line is None:
            return self.source
        return f"{self.source}:{self.line}:{self.column}"

    @property
    def sentence(self) -> str:
        """The rule, led by the field where it does not begin with it."""
        if not self.field or self.rule.startswith(self.field):
            return self.rule
        return f"{self.field}: {self.rule}"

    def __str__(self) -> str:
        head = f"{self.place}: {self.sentence}" if self.place else self.sentence
        return "\n".join([head, *self.caret_lines(), *self._notes()])

    def caret_lines(self) -> list[str]:
        """The line of the file with the value underlined, as a compiler shows it."""
        if self.excerpt is None or self.line is None or self.column is None:
            return []
        gutter = f"{self.line:>5} | "
        carets = " " * (self.column - 1) + "^" * max(1, self.width)
        return [gutter + self.excerpt, " " * (len(gutter) - 2) + "| " + carets]

    def _notes(self) -> list[str]:
        notes = [f"      with: {other}" for other in self.also]
        return [*notes, f"    remedy: {self.remedy}"] if self.remedy else notes


class ConfigError(CPOArabicError, ValueError):
    """The configuration cannot be used; :attr:`problems` holds all that is wrong with it."""

    def __init__(self, problems: str | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (
            (Problem(problems),) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class DataError(CPOArabicError, ValueError):
    """The preference data cannot be used."""


class ModelError(CPOArabicError, ValueError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit the configuration."""


class RunDirectoryError(CPOArabicError, OSError):
    """The output directory cannot be used."""


class CheckpointError(CPOArabicError, ValueError):
    """A checkpoint cannot be resumed from."""


class TrainingError(CPOArabicError, RuntimeError):
    """Training cannot go on."""
