"""Measure what ``cpo-arabic validate-config`` costs: CPU and wall time of whole processes.

    python scripts/bench_validate.py [CONFIG …]

Every run is a fresh interpreter, as for a user. Prints the median and the worst of the runs, and
exits with 1 when the median CPU time is over half a second.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 9
LIMIT_S = 0.5
ROOT = Path(__file__).resolve().parents[1]


def measure(config: Path) -> tuple[float, float]:
    """CPU seconds (user and system, children included) and wall seconds of one run."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "cpo_arabic.cli", "validate-config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        check=False,
    )
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode not in (0, 2):
        raise SystemExit(f"{config}: exit status {done.returncode}")
    cpu = after.children_user - before.children_user
    return cpu + after.children_system - before.children_system, wall


def main() -> int:
    """Measure each file and print one line for it."""
    configs = [Path(word) for word in sys.argv[1:]] or [ROOT / "configs" / "research.yaml"]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    worst = 0.0
    for config in configs:
        measure(config)  # fills the file cache and the byte-code cache
        cpu, wall = zip(*(measure(config) for _ in range(RUNS)), strict=True)
        worst = max(worst, statistics.median(cpu))
        print(
            f"{config.name}: CPU median {statistics.median(cpu):.2f} s, worst {max(cpu):.2f} s; "
            f"wall median {statistics.median(wall):.2f} s ({RUNS} runs, limit {LIMIT_S} s CPU)"
        )
    return int(worst > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
