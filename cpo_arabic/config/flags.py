"""``--set section.field=value``."""

from __future__ import annotations

from collections.abc import Sequence

from cpo_arabic.config.characters import hidden_character, shortened
from cpo_arabic.config.fields import SECTIONS, all_fields, did_you_mean, suggest_path
from cpo_arabic.config.settings import Collected, Origin, from_text
from cpo_arabic.errors import ConfigError, Problem


def collect_overrides(overrides: Sequence[str], collected: Collected) -> None:
    """Add the settings of ``--set`` flags, a later one over an earlier one."""
    for override in overrides:
        try:
            path, text = split_override(override)
            collected.add(from_text(path, text, Origin("flag", name=f"--set {shortened(path)}")))
        except ConfigError as error:
            collected.problems.extend(error.problems)


def split_override(override: str) -> tuple[str, str]:
    """The known path and the text of ``path=value``; raises :class:`ConfigError`."""
    path, equals, text = override.partition("=")
    path = path.strip()
    source = f"--set {shortened(path)}"
    if not equals:
        raise _refused("has no value", "write --set section.field=value", source)
    hidden = hidden_character(path)
    if hidden:
        raise _refused(f"the path holds the invisible character {hidden}", "retype it", source)
    if path in SECTIONS:
        raise _refused("names a section, not a field", f"write --set {path}.FIELD=value", source)
    parts = path.split(".")
    known = all_fields().get(".".join(parts[:2]))
    if known is None:
        near = did_you_mean(suggest_path(path))
        raise _refused("there is no such field", near or "the form is section.field=value", source)
    if len(parts) > 2 and not (known.takes_options and all(parts)):
        raise _refused(f"{known.path} holds no options", f"write --set {known.path}=value", source)
    return path, text


def _refused(rule: str, remedy: str, source: str) -> ConfigError:
    return ConfigError([Problem(rule=rule, remedy=remedy, source=source)])
