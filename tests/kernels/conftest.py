"""Which backends the tests of this folder run: all that this machine can."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(params=["tiled", pytest.param("triton", marks=NEEDS_TRITON)])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
