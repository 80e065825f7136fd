"""Writes what was measured into the pages, from JSON files, so that no number is typed by hand:
the README's blocks and docs/bench/README.md.

make demo && python scripts/build_readme.py --demo runs/demo   # take over a demo run
python scripts/build_readme.py                                 # rewrite the blocks and the page
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
sys.path.insert(0, str(ROOT))  # this file is run by its path

from scripts.bench import page  # noqa: E402

README, DEMO, BENCH = (ROOT / name for name in ("README.md", "docs/demo.json", "docs/bench"))
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


def written(text: str) -> str:
    """The README with its blocks made anew."""
    blocks = {"bench": page.summary(page.read(BENCH))}
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
    pages = {
        README: written(README.read_text(encoding="utf-8")),
        BENCH / "README.md": page.written(page.read(BENCH)),
    }
    stale = [path for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    if arguments.check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"{names}: stale; run python scripts/build_readme.py")
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")


if __name__ == "__main__":
    main()
