"""The types that several sections share: paths, names, columns, and plain options."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from cpo_arabic.config.base import Kind
from cpo_arabic.config.characters import hidden_character


def _clean(text: str) -> str:
    found = hidden_character(text)
    if found:
        raise ValueError(f"holds the invisible or control character {found}")
    return text


def _clean_column(text: str) -> str:
    found = hidden_character(text, allow_joiners=True)
    if found:
        raise ValueError(f"holds the control character {found}")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank")
    return text


def _plain_data(value: Any) -> Any:
    """Refuse what a file could not hold: other objects, NaN, infinity, keys that are no text."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"has the key {key!r}, which is not text")
            _clean(key)
            _plain_data(item)
    elif isinstance(value, list):
        for item in value:
            _plain_data(item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("holds a number that is not finite")
    elif isinstance(value, str):
        _clean(value)
    elif not isinstance(value, int | float | None):
        raise ValueError(f"holds a {type(value).__name__}, which a YAML file cannot express")
    return value


PathText = Annotated[str, AfterValidator(_clean), AfterValidator(_not_blank), Kind("path")]
"""A path in the file system, relative to the working directory."""

Name = Annotated[str, AfterValidator(_clean), AfterValidator(_not_blank), Kind("name")]
"""The name of a model, data set, project or the like."""

Column = Annotated[str, AfterValidator(_clean_column), AfterValidator(_not_blank), Kind("column")]
"""The name of a column (a key) of the data."""

Options = Annotated[dict[str, Any], AfterValidator(_plain_data)]
"""Keyword arguments handed on to a library."""

Weight = Annotated[float, Field(gt=0)]
"""A share of a mixture."""
