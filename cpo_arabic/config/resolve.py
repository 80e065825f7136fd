"""Unset values that follow others, as a visible step: the number, and what it follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpo_arabic.config.base import Section, following

if TYPE_CHECKING:
    from cpo_arabic.config.root import CPOConfig


@dataclass(frozen=True)
class Resolution:
    """The number an unset field takes, and the formula it comes from."""

    value: int
    follows: str


def resolutions(sections: Mapping[str, Section]) -> dict[str, Resolution]:
    """The value of every field that is unset and follows others, by dotted path."""
    formulas = {
        f"{name}.{field}": what
        for name, section in sections.items()
        for field, what in following(type(section)).items()
        if not section.is_set(field)
    }
    values = _numbers(sections)
    return {path: Resolution(values[path], what) for path, what in formulas.items()}


def _numbers(sections: Mapping[str, Section]) -> dict[str, int]:
    """Each following field's number; the order is that of dependence."""

    def given(path: str, otherwise: int) -> int:
        section, _, name = path.partition(".")
        value: Any = getattr(sections[section], name)
        return int(value) if sections[section].is_set(name) else otherwise

    longest = given("cpo.max_length", sections["model"].max_length)  # type: ignore[attr-defined]
    prompt = given("cpo.max_prompt_length", longest // 2)
    rank = sections["optimization"].lora_rank  # type: ignore[attr-defined]
    batch = sections["training"].batch_size  # type: ignore[attr-defined]
    return {
        "cpo.max_length": longest,
        "cpo.max_prompt_length": prompt,
        "cpo.max_target_length": given("cpo.max_target_length", longest - prompt),
        "optimization.lora_alpha": given("optimization.lora_alpha", 2 * rank),
        "training.eval_batch_size": given("training.eval_batch_size", batch),
    }


def resolved_copy(config: CPOConfig) -> CPOConfig:
    """A new configuration in which every unset value that follows others is its number."""
    changes: dict[str, dict[str, Any]] = {}
    for path, resolution in resolutions(config.sections()).items():
        section, _, name = path.partition(".")
        changes.setdefault(section, {})[name] = resolution.value
    return config.assembled(
        {name: _with(section, changes.get(name, {})) for name, section in config.sections().items()}
    )


def _with(section: Section, changes: dict[str, Any]) -> Section:
    # The rules decide whether the numbers fit, so they are set without being checked here.
    copied = section.model_copy(deep=True)
    copied.__dict__.update(changes)
    copied.model_fields_set.update(changes)
    return copied
