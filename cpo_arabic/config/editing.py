"""Changing values in a YAML text while every other character of it stays.

The position of each value is known, so an edit replaces those characters, or adds one line; order,
comments, indentation and line ends are never rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpo_arabic.config.characters import escaped
from cpo_arabic.config.document import Node, Source, parse
from cpo_arabic.config.flags import split_override
from cpo_arabic.config.settings import Origin, from_text
from cpo_arabic.config.sources import LoadedConfig, load_config
from cpo_arabic.config.textfile import read_text
from cpo_arabic.config.writing import write_text, yaml_value
from cpo_arabic.errors import ConfigError, Problem


def set_values(path: Path, assignments: Sequence[str]) -> LoadedConfig:
    """Write ``section.field=value`` assignments into a file, if the result is a legal one."""
    changes = [_change(assignment) for assignment in assignments]
    load_config(path, assignments, environ={}, env_file=None)
    name = escaped(str(path))
    mark = "\ufeff" if path.read_bytes().startswith(b"\xef\xbb\xbf") else ""
    before = read_text(path)
    after = edited(before, [(field, yaml_value(value)) for field, value in changes], name)
    _check_result(before, after, changes, name)
    write_text(path, mark + after)
    return load_config(path, environ={}, env_file=None)


def _change(assignment: str) -> tuple[str, Any]:
    field, text = split_override(assignment)
    if field.count(".") > 1:
        raise ConfigError(f"{field}: set the whole mapping, {field.rpartition('.')[0]}={{…}}")
    return field, from_text(field, text, Origin("flag", name=f"set {field}")).value


def _check_result(before: str, after: str, changes: Sequence[tuple[str, Any]], name: str) -> None:
    """Refuse an edit that would change anything else, whatever the layout of the file."""
    expected = parse(Source(name, before)).value()
    for path, value in changes:
        section, _, field = path.partition(".")
        expected[section] = {**(expected.get(section) or {}), field: value}
    try:
        same = parse(Source(name, after)).value() == expected
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(
            [
                Problem(
                    "the layout of this file cannot be edited safely",
                    "edit it by hand",
                    "",
                    None,
                    name,
                )
            ]
        )


def edited(text: str, changes: Sequence[tuple[str, str]], name: str) -> str:
    """The text with each ``(path, value as YAML)`` put in."""
    for path, value in changes:
        section, _, field = path.partition(".")
        text = _one(text, section, field, value, name)
    return text


def _one(text: str, section: str, field: str, value: str, name: str) -> str:
    root = parse(Source(name, text))
    home = _member(root, section)
    if home is None:
        return _new_section(text, root, f"{section}:", f"  {field}: {value}")
    if home.kind != "mapping":
        return _fill_empty(text, home, field, value)
    if home.anchored:
        raise _refused(home, section)
    old = _member(home, field)
    if old is not None:
        return _replaced(text, home, old, field, value)
    return _new_field(text, home, field, value)


def _member(mapping: Node, name: str) -> Node | None:
    return next((value for key, value in mapping.pairs() if key.text == name), None)


def _refused(node: Node, what: str) -> ConfigError:
    return ConfigError(
        [
            node.problem(
                f"{what} is written with an anchor or alias, which an edit would change elsewhere",
                "edit the file by hand, or write the values out",
            )
        ]
    )


def _replaced(text: str, home: Node, old: Node, field: str, value: str) -> str:
    if old.anchored:
        raise _refused(old, field)
    if old.start == old.end:  # `field:` with nothing after it
        key = next(key for key, node in home.pairs() if node is old)
        at = text.index(":", key.end) + 1
        return f"{text[:at]} {value}{text[at:]}"
    written = text[old.start : old.end]
    tail = written[len(written.rstrip()) :] if not old.flow else ""
    return text[: old.start] + value + tail + text[old.end :]


def _new_field(text: str, home: Node, field: str, value: str) -> str:
    if home.flow:
        at = home.end - 1
        before = text[:at].rstrip()
        comma = "" if before.endswith(("{", ",")) else ","
        space = "" if before.endswith("{") else " "
        return f"{before}{comma}{space}{field}: {value}{text[at:]}"
    first = home.items[0]
    start = text.rfind("\n", 0, first.start) + 1
    indent = text[start : first.start]
    last = home.items[-1]
    body_end = last.start + len(text[last.start : last.end].rstrip())
    return _insert_line(text, body_end, f"{indent}{field}: {value}")


def _insert_line(text: str, after: int, line: str) -> str:
    """Put a line below the one that holds the character before ``after``."""
    newline = _line_end(text)
    stop = text.find("\n", after)
    if stop < 0:
        return f"{text}{newline}{line}{newline}"
    return f"{text[: stop + 1]}{line}{newline}{text[stop + 1 :]}"


def _fill_empty(text: str, home: Node, field: str, value: str) -> str:
    """Give an empty section (`cpo:` with nothing below) its first field."""
    at = home.start
    if home.end > home.start:  # `cpo: null` or `cpo: ~`
        text = text[: home.start].rstrip(" ") + text[home.end :]
        at = len(text[: home.start].rstrip(" "))
    colon = text.rfind(":", 0, at + 1)
    return _insert_line(text, colon, f"  {field}: {value}")


def _new_section(text: str, root: Node, *lines: str) -> str:
    if root.flow:
        at = root.end - 1
        before = text[:at].rstrip()
        comma = "" if before.endswith(("{", ",")) else ", "
        section, field = (line.strip() for line in lines)
        return f"{before}{comma}{section} {{{field}}}{text[at:]}"
    newline = _line_end(text)
    body = text.rstrip("\r\n")
    if body.endswith(("\n...", "...")):
        raise ConfigError([Problem("the file ends with ...", "remove that line", source="")])
    return body + newline + newline + newline.join(lines) + newline


def _line_end(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"
