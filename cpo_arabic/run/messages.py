"""Which messages of a run reach whoever watches: ``logging.log_level``."""

from __future__ import annotations

from typing import Any

from cpo_arabic.config import CPOConfig
from cpo_arabic.config.advice import describe_objective
from cpo_arabic.config.fields import all_fields
from cpo_arabic.training.observer import Observer

SEVERITY = {"debug": 0, "info": 1, "warning": 2, "error": 3}


class Levelled:
    """Hands on what is at least as severe as the level; progress is no message and always passes.

    ``debug`` adds the recipe, ``info`` has the stages, evaluations and checkpoints, ``warning`` the
    warnings alone, ``error`` only what ends the run.
    """

    def __init__(self, observer: Observer, level: str) -> None:
        self._observer, self._least = observer, SEVERITY[level]

    def stage(self, text: str) -> None:
        """At ``info``."""
        if self._shows("info"):
            self._observer.stage(text)

    def warning(self, text: str) -> None:
        """At ``warning``."""
        if self._shows("warning"):
            self._observer.warning(text)

    def started(self, step: int, total_steps: int) -> None:
        """Progress."""
        self._observer.started(step, total_steps)

    def stepped(self, step: int, record: dict[str, Any] | None) -> None:
        """Progress."""
        self._observer.stepped(step, record)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """At ``info``."""
        if self._shows("info"):
            self._observer.evaluated(step, metrics)

    def saved(self, step: int, folder: str) -> None:
        """At ``info``."""
        if self._shows("info"):
            self._observer.saved(step, folder)

    def recipe(self, config: CPOConfig) -> None:
        """At ``debug``: the objective, and every value that is not the default."""
        if not self._shows("debug"):
            return
        self._observer.stage(f"objective: {describe_objective(config)}")
        for path, field in all_fields().items():
            value = config.get(path)
            if value != field.default and not field.takes_options:  # options may hold credentials
                self._observer.stage(f"{path}: {value}")

    def _shows(self, level: str) -> bool:
        return SEVERITY[level] >= self._least


def levelled(config: CPOConfig, observer: Observer) -> Levelled:
    """The observer, told what ``logging.log_level`` lets through; the recipe first."""
    made = Levelled(observer, config.logging.log_level)
    made.recipe(config)
    return made
