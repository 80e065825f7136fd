"""A finding: what is legal but inert, risky or slow, with the reason and a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpo_arabic.errors import Problem

Severity = Literal["warning", "advice"]


@dataclass(frozen=True)
class Finding:
    """One warning or piece of advice about a legal configuration."""

    severity: Severity
    field: str
    """Dotted path of the field it is about."""
    message: str
    """What is so, and why it matters."""
    remedy: str
    """What to write instead, or what to know."""
    code: str = ""
    """Stable name of the check."""
    place: str = ""
    """Where the value stands; empty for a default."""

    def as_problem(self) -> Problem:
        """The finding where it counts as an error."""
        return Problem(self.message, self.remedy, self.field, source=self.place)
