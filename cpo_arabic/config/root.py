"""The whole configuration: six sections and the rules that join them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator

from cpo_arabic.config.base import Model, Section
from cpo_arabic.config.cpo import CPOSpecificConfig
from cpo_arabic.config.data import CPODataConfig
from cpo_arabic.config.fields import SECTIONS, all_fields
from cpo_arabic.config.problems import unknown_field
from cpo_arabic.config.resolve import resolved_copy
from cpo_arabic.config.sections import (
    LoggingConfig,
    ModelConfig,
    OptimizationConfig,
    TrainingConfig,
)
from cpo_arabic.errors import ConfigError


class CPOConfig(Model):
    """Configuration of a run.

    ``CPOConfig()`` holds the documented defaults and reads nothing from outside.
    :meth:`from_yaml` is the settings loader: environment over ``.env`` over the file over defaults.
    """

    model: ModelConfig = Field(default_factory=ModelConfig)
    """Which model is trained, and how its weights are held in memory."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """Steps, batch sizes, AdamW, schedule, evaluation and checkpoints."""
    data: CPODataConfig = Field(default_factory=CPODataConfig)
    """Files, columns, text processing, padding, augmentation and mining."""
    cpo: CPOSpecificConfig = Field(default_factory=CPOSpecificConfig)
    """The losses and their weights, negatives, lengths and the reference model."""
    optimization: OptimizationConfig = Field(default_factory=OptimizationConfig)
    """LoRA, quantisation, gradient checkpointing and mixed precision."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Trackers and messages."""

    @field_validator("*", mode="before")
    @classmethod
    def _own_copy(cls, value: Any) -> Any:
        """Take a copy of a section, so that two configurations never share one."""
        return value.model_copy(deep=True) if isinstance(value, Section) else value

    @classmethod
    def from_yaml(cls, path: str | Path, *, environ: Mapping[str, str] | None = None) -> CPOConfig:
        """Load a file; ``CPO_ARABIC_SECTION__FIELD`` variables and ``.env`` override it.

        Values that follow others stay unset, so that the object can be edited and written back;
        :meth:`resolved` gives their numbers.
        """
        from cpo_arabic.config.sources import load_config

        return load_config(path, environ=environ).written

    def to_yaml(self, path: str | Path) -> None:
        """Write a file that loads to this very configuration; unset fields stand as comments."""
        from cpo_arabic.config.writing import write_yaml

        write_yaml(self, Path(path))

    def resolved(self) -> CPOConfig:
        """A copy in which every unset value that follows others is its number."""
        return resolved_copy(self)

    def updated(self, changes: Mapping[str, Any]) -> CPOConfig:
        """A checked copy with several fields changed at once, ``{"cpo.beta": 0.2, …}``."""
        by_section: dict[str, dict[str, Any]] = {}
        for path, value in changes.items():
            if path not in all_fields():
                raise ConfigError([unknown_field(path, value)])
            section, _, name = path.partition(".")
            by_section.setdefault(section, {})[name] = value
        made = self.assembled(
            {
                name: section.replaced(by_section[name]) if name in by_section else section
                for name, section in self.sections().items()
            }
        )
        made.check()
        return made

    def get(self, path: str) -> Any:
        """The value of a dotted path."""
        section, _, name = path.partition(".")
        return getattr(getattr(self, section), name)

    def is_set(self, path: str) -> bool:
        """Whether a dotted path was given a value, as opposed to its default or ``null``."""
        section, _, name = path.partition(".")
        given: bool = getattr(self, section).is_set(name)
        return given

    def sections(self) -> dict[str, Section]:
        """The six sections by name."""
        return {name: self.__dict__[name] for name in SECTIONS}

    @classmethod
    def assembled(cls, sections: Mapping[str, Section]) -> CPOConfig:
        """Put checked sections together without applying the rules between them."""
        copies: dict[str, Any] = {n: s.model_copy(deep=True) for n, s in sections.items()}
        made = cls.model_construct(
            _fields_set=set(sections),
            **copies,
        )
        return made

    def check(self) -> None:
        """Raise :class:`ConfigError` when fields contradict each other."""
        self._raise_problems(self)

    def check_with(self, section: Section) -> None:
        """Raise :class:`ConfigError` when the rules do not allow this section in this place."""
        self._raise_problems(self.assembled({**self.sections(), section.section: section}))

    def _raise_problems(self, config: CPOConfig) -> None:
        from cpo_arabic.config.rules import whole_problems

        problems = whole_problems(config)
        if problems:
            raise ConfigError(problems)

    def _adopt(self) -> None:
        for section in self.sections().values():
            section.adopt(self)

    def model_post_init(self, _context: Any, /) -> None:
        """Tie the sections to this object, so that their assignments obey its rules."""
        self._adopt()

    if not TYPE_CHECKING:  # pragma: no branch

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in SECTIONS:
                raise ConfigError([unknown_field(name, value)])
            candidate = type(self).model_validate({**self.sections(), name: value})
            self.__dict__[name] = candidate.__dict__[name]
            self._adopt()

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # sections are never shared

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        copied = super().__deepcopy__(memo)
        copied._adopt()
        return copied

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._adopt()
