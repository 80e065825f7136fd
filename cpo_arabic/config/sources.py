"""From all sources to one checked configuration, with the origin of every value.

Precedence, highest first: ``--set``, environment, ``.env``, the file, the files it extends (the
last named first), defaults. Each leaf is overridden by itself; its siblings stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cpo_arabic.config.base import Section
from cpo_arabic.config.environment import collect_dotenv, collect_environment
from cpo_arabic.config.fields import SECTIONS, all_fields
from cpo_arabic.config.files import collect_file
from cpo_arabic.config.findings import Finding
from cpo_arabic.config.flags import collect_overrides
from cpo_arabic.config.problems import as_written, details_by_name, field_problem
from cpo_arabic.config.resolve import resolutions
from cpo_arabic.config.root import CPOConfig
from cpo_arabic.config.rules import whole_problems
from cpo_arabic.config.settings import DEFAULT, Collected, Origin, Setting
from cpo_arabic.errors import ConfigError, Problem

BESIDE_CWD = Path(".env")


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration with the story of its values."""

    config: CPOConfig
    """Resolved: every unset value that follows others is its number."""
    written: CPOConfig
    """As the sources gave it, following values unset."""
    provenance: dict[str, Origin]
    """Where each value came from, by dotted path."""
    findings: tuple[Finding, ...]
    """Warnings and advice."""

    def placed(self, finding: Finding) -> Finding:
        """The finding with the place of the value it is about."""
        origin = self.provenance[finding.field]
        by_hand = origin.kind not in ("default", "resolved")
        return replace(finding, place=str(origin)) if by_hand else finding


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
    env_file: str | Path | None = BESIDE_CWD,
) -> LoadedConfig:
    """Load, check and resolve a configuration; raises :class:`ConfigError` with every problem.

    ``path`` None starts from the defaults. ``environ`` None means the process's environment;
    ``env_file`` is read where it exists, and None reads none.
    """
    collected = Collected()
    try:
        if path is not None:
            collect_file(Path(path), collected)
    except ConfigError as error:
        raise ConfigError([*collected.problems, *error.problems]) from None
    if env_file is not None and Path(env_file).exists():
        collect_dotenv(Path(env_file), collected)
    collect_environment(environ, collected)
    collect_overrides(overrides, collected)
    return _checked(collected)


def _checked(collected: Collected) -> LoadedConfig:
    problems = list(collected.problems)
    sections, bad = _sections(collected.settings, problems)
    written = CPOConfig.assembled(sections)
    for problem in whole_problems(written, without=bad):
        problems.append(_placed(problem, written, collected.settings))
    if problems:
        raise ConfigError(_in_order(problems))
    return _loaded(written, collected.settings)


def _loaded(written: CPOConfig, settings: Mapping[str, Setting]) -> LoadedConfig:
    from cpo_arabic.config.advice import findings

    provenance = dict.fromkeys(all_fields(), DEFAULT)
    provenance |= {path: setting.origin for path, setting in settings.items()}
    for path, resolution in resolutions(written.sections()).items():
        provenance[path] = Origin("resolved", name=resolution.follows)
    loaded = LoadedConfig(written.resolved(), written, provenance, ())
    return replace(loaded, findings=tuple(map(loaded.placed, findings(written))))


def _sections(
    settings: Mapping[str, Setting], problems: list[Problem]
) -> tuple[dict[str, Section], set[str]]:
    """Each section by itself; a bad value is reported and left at its default."""
    sections, bad = {}, set()
    for name, cls in SECTIONS.items():
        given = {
            path.partition(".")[2]: setting.value
            for path, setting in settings.items()
            if path.startswith(f"{name}.")
        }
        section, details = _validated(cls, given)
        for field, errors in details.items():
            setting = settings[f"{name}.{field}"]
            bad.add(setting.path)
            problem = field_problem(setting.path, errors, setting.written)
            problems.append(setting.locate(problem))
        sections[name] = section
    return sections, bad


def _validated(cls: type[Section], given: dict[str, Any]) -> tuple[Section, dict[str, Any]]:
    validator = cls.__pydantic_validator__
    try:
        section: Section = validator.validate_python(given)
        return section, {}
    except ValidationError as error:
        details = details_by_name(error)
    good = {name: value for name, value in given.items() if name not in details}
    rest: Section = validator.validate_python(good)
    return rest, details


def _placed(problem: Problem, config: CPOConfig, settings: Mapping[str, Setting]) -> Problem:
    """A broken rule, pointing at the value, with the other fields' values and places."""
    resolved = config.resolved()
    also = tuple(
        f"{path} = {as_written(resolved.get(path))} ({_origin(path, settings)})"
        for path in problem.also
        if path in settings or resolved.get(path) not in (None, False)
    )
    problem = replace(problem, also=also)
    setting = settings.get(problem.field)
    return setting.locate(problem) if setting else problem


def _origin(path: str, settings: Mapping[str, Setting]) -> str:
    return str(settings[path].origin) if path in settings else "default"


def _in_order(problems: list[Problem]) -> list[Problem]:
    """Problems of files by position, then those of variables and flags."""
    return sorted(problems, key=lambda p: (p.line is None, p.source, p.line or 0, p.column or 0))
