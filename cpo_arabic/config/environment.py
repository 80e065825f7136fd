"""``CPO_ARABIC_SECTION__FIELD`` variables and the ``.env`` file. Nothing else reads either."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import Binding, parse_stream
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    SettingsConfigDict,
)

from cpo_arabic.config.characters import escaped, shortened
from cpo_arabic.config.fields import SECTIONS, all_fields, closest, did_you_mean
from cpo_arabic.config.settings import Collected, Origin, from_text
from cpo_arabic.config.textfile import read_text
from cpo_arabic.errors import ConfigError, Problem

PREFIX = "CPO_ARABIC_"
NESTED = "__"


class _Variables(BaseSettings):
    """How variables are named. Names stay as written, so that messages can show them."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=NESTED, case_sensitive=True
    )


class _DotEnv(DotEnvSettingsSource):
    """A ``.env`` file with its lines; ``${NAME}`` stands for itself, whatever the machine has."""

    def __init__(self, path: Path, text: str) -> None:
        self.text = text
        self.lines: dict[str, int] = {}
        self.broken: list[int] = []
        super().__init__(_Variables, env_file=path.absolute())

    def _read_env_file(self, file_path: Path) -> Mapping[str, str | None]:  # noqa: ARG002
        found: dict[str, str | None] = {}
        for binding in parse_stream(io.StringIO(self.text)):
            if binding.error and PREFIX in binding.original.string.upper():
                self.broken.append(_line(binding))
            elif binding.key is not None:
                self.lines[binding.key] = _line(binding)
                found[binding.key] = binding.value
        return found


def _line(binding: Binding) -> int:
    text = binding.original.string
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def collect_dotenv(path: Path, collected: Collected) -> None:
    """Add the settings of a ``.env`` file; lines that are not ours are left alone."""
    source, file = _DotEnv(path, read_text(path)), escaped(str(path))
    for line in source.broken:
        collected.problems.append(
            Problem(
                rule="this line cannot be read",
                remedy=f"write {PREFIX}SECTION__FIELD=value",
                source=f"{file}:{line}",
            )
        )
    for name, text in source.env_vars.items():
        origin = Origin("dotenv", file=file, line=source.lines[name], name=shortened(name))
        _collect(name, text or "", origin, collected)


def collect_environment(environ: Mapping[str, str] | None, collected: Collected) -> None:
    """Add the settings of the environment."""
    variables = EnvSettingsSource(_Variables).env_vars if environ is None else environ
    for name, text in variables.items():
        _collect(name, text or "", Origin("environment", name=shortened(name)), collected)


def _collect(name: str, text: str, origin: Origin, collected: Collected) -> None:
    if not name.upper().startswith(PREFIX):
        return
    path = _path(name)
    if path is None:
        collected.problems.append(_unknown(name, origin))
        return
    try:
        collected.add(from_text(path, text, origin))
    except ConfigError as error:
        collected.problems.extend(error.problems)


def _path(name: str) -> str | None:
    section, _, rest = name[len(PREFIX) :].lower().partition(NESTED)
    field, _, option = rest.partition(NESTED)
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
