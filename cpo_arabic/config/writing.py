"""Writing a configuration as a YAML file that loads to the same configuration.

Only fields that were set are live lines. Unset ones stand as comments with their default, and unset
ones that follow others as ``null``, so that "unset" survives the round trip.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_arabic.config.characters import escape
from cpo_arabic.config.document import plain_scalar
from cpo_arabic.config.fields import SECTIONS, Field, all_fields
from cpo_arabic.config.problems import as_written
from cpo_arabic.errors import ConfigError, Problem

if TYPE_CHECKING:
    from cpo_arabic.config.root import CPOConfig

_PLAIN_TEXT = re.compile(r"[\w./+~][\w./+~@ -]*(?<! )")
_HEADER = (
    "# Configuration of cpo-arabic. Lines in comments are defaults; null follows another value.\n"
)


def as_yaml(config: CPOConfig) -> str:
    """The text of a file that loads to this configuration."""
    lines = [_HEADER]
    for section in SECTIONS:
        lines.append(f"\n{section}:\n")
        lines += [
            _line(field, config) for field in all_fields().values() if field.section == section
        ]
    return "".join(lines)


def yaml_value(value: Any) -> str:
    """One value on one line, in YAML's flow style where it has members."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k)}: {yaml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(yaml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def write_yaml(config: CPOConfig, path: Path) -> None:
    """Write the file in one step: it is either the old one or the whole new one."""
    write_text(path, as_yaml(config))


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step; raises :class:`ConfigError` where that is not possible."""
    target = path.resolve() if path.is_symlink() else path
    temporary = None
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:60]}.")
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ConfigError(
            [
                Problem(
                    rule=f"cannot be written: {error.strerror}",
                    remedy="check that its folder exists and is writable",
                    source=as_written(str(path)),
                )
            ]
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _line(field: Field, config: CPOConfig) -> str:
    value = config.get(field.path)
    if config.is_set(field.path):
        return f"  {field.name}: {yaml_value(value)}\n"
    if field.follows:
        return f"  {field.name}: null  # follows {field.follows}\n"
    return f"  # {field.name}: {yaml_value(value)}\n"


def _text(text: str) -> str:
    """A text as a plain scalar where YAML reads it back as the same text, else in quotes."""
    if _PLAIN_TEXT.fullmatch(text) and isinstance(plain_scalar(text), str):
        return text
    return "".join(
        char if char.isprintable() else escape(char)
        for char in json.dumps(text, ensure_ascii=False)
    )
