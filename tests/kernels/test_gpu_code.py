"""The Triton kernels become machine code of a GPU, and one that fits into its registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"_absorb_kernel", "_differentiate_kernel", "_mask_kernel", "_exponentials_kernel"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_keeps_its_tiles_in_registers(
    capability: int, tmp_path: Path
) -> None:
    """What spills is read and written again through memory, for each key and query."""
    file = tmp_path / "codes.json"
    program = [sys.executable, "-m", "tests.kernels.gpu_code", str(capability), str(file)]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        program, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {code["kernel"] for code in found} == KERNELS
    for code in found:
        assert code["stack"] == 0, code
        assert code["shared"] <= 48 << 10, code  # what any GPU gives without being asked
