"""What a run tells whoever watches it. The command line draws it; the loop never prints."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Told of everything worth showing; on the main process only."""

    def stage(self, text: str) -> None:
        """A long piece of work begins."""

    def warning(self, text: str) -> None:
        """Something the user should know; the run goes on."""

    def started(self, step: int, total_steps: int) -> None:
        """The loop begins at ``step``."""

    def stepped(self, step: int, record: dict[str, Any] | None) -> None:
        """A step is done; ``record`` holds its metrics at logging steps."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out metrics at ``step``."""

    def saved(self, step: int, folder: str) -> None:
        """A checkpoint is on disk."""


class SilentObserver:
    """Watches and says nothing."""

    def stage(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...

    def started(self, step: int, total_steps: int) -> None: ...

    def stepped(self, step: int, record: dict[str, Any] | None) -> None: ...

    def evaluated(self, step: int, metrics: dict[str, float]) -> None: ...

    def saved(self, step: int, folder: str) -> None: ...
