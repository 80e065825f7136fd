"""From pydantic's verdict on a value to a problem a person can act on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cpo_arabic.config.characters import shortened
from cpo_arabic.config.secrets import line_without_secrets, without_secrets
from cpo_arabic.errors import ConfigError, Problem

if TYPE_CHECKING:
    from cpo_arabic.config.fields import Field

_BOOLEAN_WORDS = {"yes", "no", "on", "off", "y", "n"}


def from_pydantic(error: ValidationError, cls: Any) -> ConfigError:
    """The package's error for a failed construction in Python."""
    section = getattr(cls, "section", None)
    problems = []
    for path, details in _by_field(error, (section,) if section else ()).items():
        problems.append(field_problem(path, details))
    return ConfigError(problems)


def field_problem(path: str, details: list[ErrorDetails], written: str | None = None) -> Problem:
    """One problem for all that pydantic has to say about one field."""
    from cpo_arabic.config.fields import all_fields

    field = all_fields().get(path)
    given = details[0]["input"]
    if details[0]["type"] == "extra_forbidden":
        return unknown_field(path, given)
    if field is None:
        return Problem(
            rule=f"{as_written(given)} is no section",
            remedy="give a mapping of field names to values",
            field=path,
            value=as_written(given),
        )
    deep = [detail for detail in details if len(detail["loc"]) > len(details[0]["loc"])]
    return _value_problem(field, deep or details, written)


def _value_problem(field: Field, details: list[ErrorDetails], written: str | None) -> Problem:
    said = next((d for d in details if d["type"] == "value_error"), None)
    given = (said or details[0])["input"]
    shown = as_written(given) if written is None or isinstance(given, dict | list) else written
    rule = f"{shown} {_verdict(field, given, said)}"
    remedy = _hint(field, given) or f"write {field.expected}{_default(field)}"
    return Problem(rule=rule, remedy=remedy, field=field.path, value=shown)


def unknown_field(path: str, value: Any = None) -> Problem:
    """The problem of a name that no section has."""
    from cpo_arabic.config.fields import did_you_mean, suggest_path

    return Problem(
        rule="there is no such field",
        remedy=did_you_mean(suggest_path(path)) or "`cpo-arabic config show` lists all fields",
        field=shortened(path),
        value=None if value is None else as_written(value, key=path),
    )


def details_by_name(error: ValidationError) -> dict[str, list[ErrorDetails]]:
    """Pydantic's errors of one section, by field name."""
    grouped: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
    return grouped


def as_written(value: Any, key: str = "") -> str:
    """A Python value as YAML would show it, shortened, without credentials."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = f"a {type(value).__name__}"
    if isinstance(value, str) and (not text.strip() or text != text.strip()):
        text = json.dumps(text, ensure_ascii=False)
    return shortened(line_without_secrets(without_secrets(text, key)))


def _by_field(error: ValidationError, prefix: tuple[str, ...]) -> dict[str, list[ErrorDetails]]:
    grouped: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        loc = (*prefix, *(str(part) for part in detail["loc"]))
        grouped.setdefault(".".join(loc[:2]), []).append(detail)
    return grouped


def _verdict(field: Field, given: Any, said: ErrorDetails | None) -> str:
    """What is wrong with the value, to be read after it."""
    if said is not None:
        return str(said["ctx"]["error"])
    if isinstance(given, float) and not math.isfinite(given):
        return "is not a finite number"
    if isinstance(given, bool) and bool not in field.kinds:
        return f"is a boolean, not {_article(field)}"
    if given is None:
        return "is not allowed here: this field has no unset state"
    if isinstance(given, int | float) and not isinstance(given, bool):
        return _number_verdict(field, given)
    if field.choices:
        return "is not one of the choices"
    if len(field.kinds) > 1:
        return f"is not {field.expected}"
    return f"is {_type_words(given)}, not {_article(field)}"


def _number_verdict(field: Field, given: float) -> str:
    if field.choices:
        return "is not one of the choices"
    if len(field.kinds) > 1:
        return f"is not {field.expected}"
    if field.kinds & {int, float}:
        if isinstance(given, float) and float not in field.kinds:
            return "is not an integer"
        return "is out of range"
    return f"is a number, not {_article(field)}"


def _hint(field: Field, given: Any) -> str:
    """The remedy for the well-known slips of YAML, if this is one."""
    return next(_hints(field, given), "")


def _hints(field: Field, given: Any) -> Iterator[str]:
    from cpo_arabic.config.fields import closest, did_you_mean

    if isinstance(given, str) and field.choices and str in field.kinds:
        near = did_you_mean(closest(given, [str(choice) for choice in field.choices]))
        choices = ", ".join(str(choice) for choice in field.choices)
        yield f"write one of {choices}" + (f"; {near}" if near else "")
    elif field.name.endswith("_percentage") and type(given) in (int, float) and 1 <= given <= 100:
        yield f"it is a fraction in [0, 1): for {given:g} % write {given / 100:g}"
    elif isinstance(given, str):
        yield from _text_hints(field, given.strip())
    elif field.kinds == {str} and not field.choices and isinstance(given, bool | int | float):
        yield f'put it in quotes if it is meant as text: "{as_written(given)}"'
    elif (
        isinstance(given, float)
        and given.is_integer()
        and int in field.kinds
        and float not in field.kinds
        and abs(given) < 1e15
    ):
        yield f"write {int(given)}"


def _text_hints(field: Field, text: str) -> Iterator[str]:
    if bool in field.kinds and text.lower() in _BOOLEAN_WORDS:
        yes = text.lower() in ("yes", "on", "y")
        yield f"write {'true' if yes else 'false'}; in YAML 1.2 {text} is plain text"
    if not field.kinds & {int, float} or len(text) > 40:
        return
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        yield f"write {int(text)}, without the leading zero"
    elif re.fullmatch(r"[-+]?[0-9]+(:[0-9]+)+", text):
        yield "write one plain number; sexagesimal numbers are not read"
    elif re.fullmatch(r"[-+]?[0-9][0-9_]*[0-9]", text) and "_" in text:
        yield f"write {text.replace('_', '')} without underscores"
    elif re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        yield f"write {text} without quotes"
    elif text.translate(_ARABIC_DIGITS).isascii() and not text.isascii():
        yield f"write the digits as {text.translate(_ARABIC_DIGITS)}"


_ARABIC_DIGITS = {0x660 + i: str(i) for i in range(10)} | {0x6F0 + i: str(i) for i in range(10)}
_ARABIC_DIGITS |= {0x66B: "."}


def _article(field: Field) -> str:
    """The kind of value that a field takes, as in "not a number"."""
    names = {bool: "true or false", float: "a number", int: "an integer", str: "text"}
    return next((names[kind] for kind in names if kind in field.kinds), "a mapping")


def _type_words(value: Any) -> str:
    names = {str: "text", dict: "a mapping", list: "a list"}
    return next((word for kind, word in names.items() if isinstance(value, kind)), "no plain value")


def _default(field: Field) -> str:
    if field.default is None:
        return ""
    return f" (default: {as_written(field.default)})"
