"""Loading a text as a configuration file, away from the machine's environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cpo_arabic.config import ConfigError, LoadedConfig, Problem, load_config


def load(
    folder: Path,
    text: str | bytes,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = None,
) -> LoadedConfig:
    """Load ``text`` from a file in ``folder``."""
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides, environ=environ or {}, env_file=env_file)


def problems(
    folder: Path,
    text: str | bytes,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> tuple[Problem, ...]:
    """The problems for which ``text`` is refused."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, overrides, environ)
    return caught.value.problems


def problem(
    folder: Path,
    text: str | bytes,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Problem:
    """The only problem for which ``text`` is refused."""
    found = problems(folder, text, overrides, environ)
    assert len(found) == 1, [str(one) for one in found]
    return found[0]
