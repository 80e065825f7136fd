"""The generated pages are current, and hold what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from cpo_arabic.config.fields import all_fields

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "build_config_docs", ROOT / "scripts" / "build_config_docs.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current(builder: ModuleType) -> None:
    """`python scripts/build_config_docs.py` makes them so."""
    for path, text in builder.pages().items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_the_reference_has_every_field_once_in_its_section(builder: ModuleType) -> None:
    page = builder.reference_page()
    for field in all_fields().values():
        section = page.split(f"## `{field.section}`")[1].split("\n## ")[0]
        assert section.count(f"| `{field.name}` |") == 1
        assert page.split("## Every field is live")[1].count(f"| `{field.path}` | ") == 1


def test_each_mistake_is_told_with_a_remedy(builder: ModuleType) -> None:
    for title, text, words in builder.MISTAKES:
        told = builder.capture(text, words)
        assert "remedy: " in told, title
        assert "Traceback" not in told
