"""Findings."""

from __future__ import annotations

from cpo_arabic.config.findings import Finding
from cpo_arabic.config.root import CPOConfig


def findings(config: CPOConfig) -> list[Finding]:
    """What is legal but inert, risky or slow."""
    del config
    return []
