"""The configuration answers at once: nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "pyarrow")
QUICK = Path(__file__).parents[2] / "configs" / "quick.yaml"


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import cpo_arabic.config", (*HEAVY, "typer", "rich")),
        (
            f"from cpo_arabic.config import load_config; load_config({str(QUICK)!r})",
            (*HEAVY, "typer"),
        ),
        ("import cpo_arabic.cli", HEAVY),
        (
            "import sys; from cpo_arabic.cli import main; "
            f"sys.argv = ['cpo-arabic', 'validate-config', {str(QUICK)!r}]\n"
            "try: main()\nexcept SystemExit: pass",
            HEAVY,
        ),
    ],
)
def test_nothing_heavy_is_imported(code: str, banned: tuple[str, ...]) -> None:
    probe = f"{code}\nimport sys\nprint('found:', *[n for n in {banned!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "found:"
