"""What each level of ``logging.log_level`` lets through."""

from __future__ import annotations

from typing import Any

import pytest

from cpo_arabic.config import CPOConfig
from cpo_arabic.run.messages import levelled


class Listener:
    def __init__(self) -> None:
        self.told: list[str] = []

    def stage(self, text: str) -> None:
        self.told.append(text)

    def warning(self, text: str) -> None:
        self.told.append("warning")

    def started(self, step: int, total_steps: int) -> None:
        self.told.append("started")

    def stepped(self, step: int, record: dict[str, Any] | None) -> None:
        self.told.append("stepped")

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.told.append("evaluated")

    def saved(self, step: int, folder: str) -> None:
        self.told.append("saved")


def told(level: str) -> list[str]:
    listener = Listener()
    changes = {
        "logging.log_level": level,
        "cpo.beta": 0.2,
        "cpo.model_init_kwargs": {"token_like": "not to be shown"},
    }
    observer = levelled(CPOConfig().updated(changes), listener)
    observer.stage("stage")
    observer.warning("warning")
    observer.started(0, 1)
    observer.stepped(1, None)
    observer.evaluated(1, {})
    observer.saved(1, "x")
    return listener.told


EVERYTHING = ["stage", "warning", "started", "stepped", "evaluated", "saved"]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("info", EVERYTHING),
        ("warning", ["warning", "started", "stepped"]),
        ("error", ["started", "stepped"]),
    ],
)
def test_what_is_less_severe_than_the_level_is_kept_back(level: str, shown: list[str]) -> None:
    assert told(level) == shown


def test_debug_adds_the_recipe_without_what_may_be_secret() -> None:
    recipe = told("debug")[: -len(EVERYTHING)]
    assert told("debug")[-len(EVERYTHING) :] == EVERYTHING
    assert recipe[0].startswith("objective: ")
    assert "cpo.beta: 0.2" in recipe
    assert not any("not to be shown" in line for line in recipe)
