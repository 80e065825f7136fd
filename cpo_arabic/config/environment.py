"""``CPO_ARABIC_SECTION__FIELD`` variables and the ``.env`` file. Nothing else reads either."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import parse_stream

from cpo_arabic.config.characters import escaped, shortened
from cpo_arabic.config.fields import SECTIONS, all_fields, closest, did_you_mean
from cpo_arabic.config.settings import Collected, Origin, from_text
from cpo_arabic.config.textfile import read_text
from cpo_arabic.errors import ConfigError, Problem

PREFIX = "CPO_ARABIC_"


def collect_dotenv(path: Path, collected: Collected) -> None:
    """Add the settings of a ``.env`` file; lines that are not ours are left alone."""
    for binding in parse_stream(io.StringIO(read_text(path))):
        text = binding.original.string
        line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
        if binding.error:
            if PREFIX in text.upper():
                collected.problems.append(
                    Problem(
                        rule="this line cannot be read",
                        remedy=f"write {PREFIX}SECTION__FIELD=value",
                        source=f"{escaped(str(path))}:{line}",
                    )
                )
        elif binding.key is not None and binding.key.upper().startswith(PREFIX):
            origin = Origin(
                "dotenv", file=escaped(str(path)), line=line, name=shortened(binding.key)
            )
            _collect(binding.key, binding.value or "", origin, collected)


def collect_environment(environ: Mapping[str, str] | None, collected: Collected) -> None:
    """Add the settings of the environment."""
    for name, text in (os.environ if environ is None else environ).items():
        if name.upper().startswith(PREFIX):
            _collect(name, text, Origin("environment", name=shortened(name)), collected)


def _collect(name: str, text: str, origin: Origin, collected: Collected) -> None:
    path = _path(name)
    if path is None:
        collected.problems.append(_unknown(name, origin))
        return
    try:
        collected.add(from_text(path, text, origin))
    except ConfigError as error:
        collected.problems.extend(error.problems)


def _path(name: str) -> str | None:
    section, _, rest = name[len(PREFIX) :].lower().partition("__")
    field, _, option = rest.partition("__")
    path = f"{section}.{field}"
    known = all_fields().get(path)
    if known is None or (option and not known.takes_options):
        return None
    return f"{path}.{option}" if option else path


def _unknown(name: str, origin: Origin) -> Problem:
    section = name[len(PREFIX) :].lower().strip("_")
    if section in SECTIONS:
        rule, remedy = "names a section, not a field", f"set {PREFIX}{section.upper()}__FIELD"
    else:
        near = closest(name.upper(), [field.variable for field in all_fields().values()])
        rule = "names no field"
        remedy = did_you_mean(near) or f"the form is {PREFIX}SECTION__FIELD, two underscores"
    return Problem(rule=rule, remedy=remedy, source=str(origin))
