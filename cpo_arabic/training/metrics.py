"""What is measured: sums that survive micro-batches and ranks, and the record they end in.

(G) groups  (K) completions of a group, column 0 the chosen one
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpo_arabic.errors import RunDirectoryError
from cpo_arabic.files import write_whole

Record = dict[str, Any]


class MetricSums:
    """Named sums with their counts, kept on the device until the means are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, total: Tensor, count: float) -> None:
        """Adds a sum over ``count`` items (groups, tokens or pairs)."""
        total = total.detach().to(_width(total.device))
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def empty(self) -> None:
        """Keeps the names and forgets what was added: the sums of a stand-in."""
        self._sums = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        self._counts = dict.fromkeys(self._counts, 0.0)

    def names(self) -> list[str]:
        """What was added, in order."""
        return list(self._sums)

    def means(
        self,
        reduce: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        names: list[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Name → mean over every rank.

        Args:
            reduce: sums a tensor over the ranks.
            names: the same on every rank; by default those added here.
            device: where a rank that added nothing makes its zeros.
        """
        names = self.names() if names is None else names
        if not names:
            return {}
        zero = torch.zeros((), device=device, dtype=_width(torch.device(device)))
        sums = torch.stack([self._sums.get(name, zero) for name in names])
        counts = torch.tensor([self._counts.get(n, 0.0) for n in names], dtype=sums.dtype)
        totals, sizes = reduce(torch.stack([sums, counts.to(sums.device)])).tolist()
        return {n: t / c for n, t, c in zip(names, totals, sizes, strict=True) if c > 0}


def _width(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else torch.float32


def reward_metrics(sums: MetricSums, rewards: Tensor, log_probs: Tensor, present: Tensor) -> None:
    """Adds the field's reward and log-probability metrics of a micro-batch.

    ``rewards/rejected`` and ``logps/rejected`` are means over every negative;
    ``rewards/accuracies`` is the share of (chosen, negative) pairs in the right order, a group
    counting once.

    Args:
        sums: where they go.
        rewards: (G, K) r_i, not divided by the temperature.
        log_probs: (G, K) summed log-probabilities in nats.
        present: (G, K) bool.
    """
    groups = len(rewards)
    negative = present[:, 1:]
    count = negative.sum(dim=1).clamp(min=1)

    def over_negatives(values: Tensor) -> Tensor:
        return torch.where(negative, values, values.new_zeros(())).sum(dim=1) / count

    chosen, rejected = rewards[:, 0], over_negatives(rewards[:, 1:])
    correct = (rewards[:, :1] > rewards[:, 1:]).to(rewards.dtype)
    sums.add("rewards/chosen", chosen.sum(), groups)
    sums.add("rewards/rejected", rejected.sum(), groups)
    sums.add("rewards/margins", (chosen - rejected).sum(), groups)
    sums.add("rewards/accuracies", over_negatives(correct).sum(), groups)
    sums.add("logps/chosen", log_probs[:, 0].sum(), groups)
    sums.add("logps/rejected", over_negatives(log_probs[:, 1:]).sum(), groups)


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, appended as it happens."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record.

        Raises:
            RunDirectoryError: the disk refuses it.
        """
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, ensure_ascii=False, allow_nan=True) + "\n")
        except OSError as error:
            raise RunDirectoryError(f"{self.path}: cannot be written: {error.strerror}") from error

    def read(self) -> list[Record]:
        """All records in order; a last line cut off by a crash is left out."""
        if not self.path.exists():
            return []
        return list(_parsed(self.path.read_text(encoding="utf-8").split("\n")))

    def held_out(self, step: int) -> dict[str, float]:
        """The held-out metrics measured at a step; none where there was no evaluation."""
        for record in reversed(self.read()):
            found = {key: value for key, value in record.items() if key.startswith("eval_")}
            if record["step"] == step and found:
                return found
        return {}

    def rewind(self, step: int) -> None:
        """Drops what was written after ``step``: a resumed run writes it again."""
        kept = [r for r in self.read() if int(r["step"]) <= step]
        write_whole(self.path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))


def _parsed(lines: Iterable[str]) -> Iterable[Record]:
    for line in lines:
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
