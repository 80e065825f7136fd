"""Writes the measured parts of the README from JSON files, so that no number is typed by hand.

make demo && python scripts/build_readme.py --demo runs/demo   # take over a demo run
python scripts/build_readme.py                                 # rewrite the README's blocks
python scripts/build_readme.py --check                         # exit 1 when they are stale
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DEMO, STEP = (ROOT / "docs" / name for name in ("demo.json", "bench/step.json"))
SHOWN = (
    ("reward accuracy", "eval_rewards/accuracies", ".3f"),
    ("reward margin", "eval_rewards/margins", "+.4f"),
    ("NLL of chosen, nats per token", "eval_nll_loss", ".3f"),
    ("loss as optimised", "eval_loss", ".3f"),
)


def demo_block(demo: dict[str, Any]) -> str:
    """Held-out metrics of the demo as a table."""
    before, after = demo["held_out_before"], demo["held_out_after"]
    rows = [f"| {t} | {before[k]:{f}} | {after[k]:{f}} |" for t, k, f in SHOWN]
    return "\n".join(
        [
            f"65 held-out rows, no prompt shared with training, after {demo['steps']} steps "
            f"({demo['hardware']}):",
            "",
            "| | before | after |",
            "|---|---|---|",
            *rows,
        ]
    )


def bench_block() -> str:
    """One optimizer step of ours beside TRL's, from ``bench/step.json``."""
    if not STEP.exists():
        return "No benchmark has been recorded yet."
    bench = json.loads(STEP.read_text(encoding="utf-8"))
    rows = []
    for case in bench["cases"]:
        against = case["ratios"]["ours, packed"]
        peer = min(against, key=lambda name, a=against: a[name]["cpu_speed"])  # the fastest
        found = against[peer]
        speed, memory = found["cpu_speed"], found["peak_memory"]
        rows.append(f"| {case['case']} | {peer} | {speed:.2f}× | {memory:.2f}× |")
    hardware = bench["hardware"]
    return "\n".join(
        [
            "One optimizer step of pairwise CPO, packed, full fine-tuning in float32, the same "
            "pairs, loss and gradient on both sides; ratios of processor time and peak memory in "
            f"one run (`python scripts/bench_step.py`; one thread of a shared 2-core "
            f"{hardware['processor']}, torch {hardware['torch']}, TRL {hardware['trl']}):",
            "",
            "| prompt, completion, negatives | fastest TRL | speed | memory |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def written(text: str) -> str:
    """The README with its blocks made anew."""
    blocks = {"bench": bench_block()}
    if DEMO.exists():
        blocks["demo"] = demo_block(json.loads(DEMO.read_text(encoding="utf-8")))
    for name, body in blocks.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, b=body: f"{m[1]}{b}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def take_over(run: Path) -> None:
    """Copies a demo run's summary and picture into the docs."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["hardware"] = f"{platform.machine()} CPU, torch {version('torch')}"
    kept = ("steps", "train_rows", "held_out_before", "held_out_after", "hardware")
    DEMO.write_text(json.dumps({k: summary[k] for k in kept}, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(run / "curves.png", ROOT / "docs" / "demo-curves.png")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="run directory of a demo to take over")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when stale")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        take_over(arguments.demo)
    old = README.read_text(encoding="utf-8")
    new = written(old)
    if arguments.check:
        sys.exit(0 if new == old else "README.md is stale: run python scripts/build_readme.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
