"""The table of all fields: path, default, accepted values in words, description.

Error messages, the reference page, ``--set`` and the environment all read this one table.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from cpo_arabic.config.base import Follows, Kind, Section
from cpo_arabic.config.cpo import CPOSpecificConfig
from cpo_arabic.config.data import CPODataConfig
from cpo_arabic.config.sections import (
    LoggingConfig,
    ModelConfig,
    OptimizationConfig,
    TrainingConfig,
)

SECTIONS: dict[str, type[Section]] = {
    cls.section: cls
    for cls in (
        ModelConfig,
        TrainingConfig,
        CPODataConfig,
        CPOSpecificConfig,
        OptimizationConfig,
        LoggingConfig,
    )
}


@dataclass(frozen=True)
class Field:
    """One field of the configuration."""

    section: str
    name: str
    default: Any
    description: str
    expected: str
    """What it accepts, in words: ``a number > 0 and ≤ 1000``."""
    follows: str | None
    """The formula it follows while unset."""
    nullable: bool
    kinds: frozenset[type]
    """The plain types it accepts: str, int, float, bool, list, dict."""
    text_kind: str | None
    """``path``, ``name`` or ``column`` where it holds such a text."""
    choices: tuple[Any, ...]
    bounds: tuple[Ge | Gt | Le | Lt, ...]

    @property
    def path(self) -> str:
        """Dotted path, ``cpo.temperature``."""
        return f"{self.section}.{self.name}"

    @property
    def takes_options(self) -> bool:
        """Whether it holds keyword arguments, which may be set one by one."""
        return self.kinds == {dict}

    @property
    def variable(self) -> str:
        """Environment variable that sets it."""
        return f"CPO_ARABIC_{self.section}__{self.name}".upper()


@cache
def all_fields() -> dict[str, Field]:
    """Every field by dotted path, in the order of the sections."""
    found = {}
    for section, cls in SECTIONS.items():
        for name, info in cls.model_fields.items():
            field = _field(section, name, info)
            found[field.path] = field
    return found


def closest(word: str, candidates: Iterator[str] | list[str]) -> list[str]:
    """At most three candidates that look like ``word``, ignoring case, best first."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = get_close_matches(word[:100].lower(), list(by_lower), n=3, cutoff=0.6)
    return [by_lower[match] for match in near]


def suggest_path(path: str) -> list[str]:
    """Known dotted paths close to an unknown one: the right name in another section comes first."""
    name = path.rpartition(".")[2]
    elsewhere = [known for known in all_fields() if known.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere[:3]
    near = closest(path, list(all_fields()))
    same_section = [
        f"{path.partition('.')[0]}.{match}"
        for match in closest(name, list(_names(path.partition(".")[0])))
    ]
    return list(dict.fromkeys([*same_section, *near]))[:3]


def did_you_mean(candidates: list[str]) -> str:
    """``did you mean a, b or c?``, or nothing."""
    if not candidates:
        return ""
    *most, last = candidates
    return f"did you mean {', '.join(most)} or {last}?" if most else f"did you mean {last}?"


def _names(section: str) -> Iterator[str]:
    cls = SECTIONS.get(section)
    yield from cls.model_fields if cls else ()


def _field(section: str, name: str, info: FieldInfo) -> Field:
    parts = list(_alternatives(info.annotation, tuple(info.metadata)))
    marks = [mark for _, metadata in parts for mark in metadata]
    return Field(
        section=section,
        name=name,
        default=info.default,
        description=info.description or "",
        expected=" or ".join(_words(kind, metadata) for kind, metadata in parts),
        follows=next((mark.what for mark in marks if isinstance(mark, Follows)), None),
        nullable=any(kind is type(None) for kind, _ in parts)
        or any(isinstance(mark, Follows) for mark in marks),
        kinds=frozenset(plain for kind, _ in parts for plain in _plain(kind)),
        text_kind=next((mark.name for mark in marks if isinstance(mark, Kind)), None),
        choices=tuple(
            choice for kind, _ in parts if get_origin(kind) is Literal for choice in get_args(kind)
        ),
        bounds=tuple(dict.fromkeys(mark for mark in marks if isinstance(mark, Ge | Gt | Le | Lt))),
    )


def _alternatives(
    annotation: Any, metadata: tuple[Any, ...]
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The members of a union, each with the constraints that hold for it."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        flat = [
            m for mark in marks for m in (mark.metadata if isinstance(mark, FieldInfo) else [mark])
        ]
        yield from _alternatives(inner, (*metadata, *flat))
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member, metadata)
    else:
        yield annotation, metadata


def _plain(kind: Any) -> set[type]:
    if get_origin(kind) is Literal:
        return {type(choice) for choice in get_args(kind)}
    return {get_origin(kind) or kind} - {type(None)}


def _words(kind: Any, metadata: tuple[Any, ...]) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    mark = next((m.name for m in metadata if isinstance(m, Kind)), None)
    words: dict[Any, str] = {
        bool: "true or false",
        int: "an integer" + _range(metadata),
        float: "a number" + _range(metadata),
        str: {"path": "a path", "name": "a name", "column": "a column name"}.get(
            mark or "", "text"
        ),
        list: "a list of them",
        dict: "a mapping" if get_args(kind)[1:] == (Any,) else "a mapping of path to weight",
        type(None): "null",
    }
    return words[origin]


def _range(metadata: tuple[Any, ...]) -> str:
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    limits = [
        f"{signs[type(mark)][0]} {getattr(mark, signs[type(mark)][1])}"
        for mark in metadata
        if type(mark) in signs
    ]
    return " " + " and ".join(limits) if limits else ""
