"""What every section shares: strict types, help text from docstrings, assignment that is checked.

A section refuses unknown names, booleans for numbers, NaN and infinity. An assignment is tried on a
copy first, together with the rules that join it to the other sections, so a refused one leaves the
object as it was. Errors are :class:`~cpo_arabic.errors.ConfigError` in Python as everywhere else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema

from cpo_arabic.config.problems import from_pydantic, unknown_field
from cpo_arabic.errors import ConfigError

if TYPE_CHECKING:
    # Only the type checker needs the private name; type(BaseModel) is the same class.
    from pydantic._internal._model_construction import ModelMetaclass as _ModelMetaclass

    from cpo_arabic.config.root import CPOConfig
else:
    _ModelMetaclass = type(BaseModel)


@dataclass(frozen=True)
class Follows:
    """Marks a field that takes its value from others while it is unset (left out, or ``null``)."""

    what: str
    """What it follows, as a formula over field paths."""

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Allow ``null`` in editors, which is how a file says "unset"."""
        schema = dict(handler(core))
        if "anyOf" in schema:
            return schema
        return {"anyOf": [schema, {"type": "null"}]}


@dataclass(frozen=True)
class Kind:
    """Marks a text field by what its text is: ``path``, ``name`` or ``column``."""

    name: str


class _Checked(_ModelMetaclass):
    """Makes ``Section(...)`` raise the package's own error and apply the rules between fields."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            made = super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise from_pydantic(error, self) from None
        made.check()
        return made


class Model(BaseModel, metaclass=_Checked):
    """Common base of the sections and of the whole configuration."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
        protected_namespaces=(),
    )

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Build from a mapping, with the same errors and rules as the constructor."""
        try:
            made = super().model_validate(obj, **options)
        except ValidationError as error:
            raise from_pydantic(error, cls) from None
        made.check()
        return made

    def check(self) -> None:
        """Raise :class:`ConfigError` when fields contradict each other."""
        raise NotImplementedError


class Section(Model):
    """One section of the configuration."""

    __slots__ = ("_owner",)
    model_config = ConfigDict(strict=True)
    section: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if v is not None or k not in following(cls)}

    def is_set(self, name: str) -> bool:
        """Whether the field was given a value, as opposed to its default or ``null``."""
        return name in self.model_fields_set

    def check(self) -> None:
        """Apply the rules whose fields are all in this section."""
        from cpo_arabic.config.rules import section_problems

        problems = section_problems(self)
        if problems:
            raise ConfigError(problems)

    # Hidden from type checkers, so that they still know the fields.
    if not TYPE_CHECKING:  # pragma: no branch

        def __setattr__(self, name: str, value: Any) -> None:
            fields = type(self).model_fields
            if name not in fields:
                raise ConfigError([unknown_field(f"{self.section}.{name}", value)])
            candidate = type(self).model_validate(
                {**{k: getattr(self, k) for k in self.model_fields_set}, name: value}
            )
            owner = getattr(self, "_owner", None)
            if owner is not None:
                owner.check_with(candidate)
            self.__dict__[name] = getattr(candidate, name)
            mark = (
                self.model_fields_set.add
                if candidate.is_set(name)
                else (self.model_fields_set.discard)
            )
            mark(name)

        def __delattr__(self, name: str) -> None:
            raise ConfigError(
                f"{self.section}.{name}: a field cannot be deleted; assign its default"
            )

    def adopt(self, owner: CPOConfig) -> None:
        """Note the configuration this section is part of, whose rules then guard assignments."""
        object.__setattr__(self, "_owner", owner)

    def replaced(self, changes: dict[str, Any]) -> Self:
        """A checked copy with other values."""
        kept = {name: copy.deepcopy(getattr(self, name)) for name in self.model_fields_set}
        return type(self).model_validate({**kept, **changes})


def following(cls: type[Section]) -> dict[str, str]:
    """The section's fields that follow others while unset, with what they follow."""
    cached: dict[str, str] | None = cls.__dict__.get("_following")
    if cached is None:
        cached = {
            name: mark.what
            for name, field in cls.model_fields.items()
            for mark in field.metadata
            if isinstance(mark, Follows)
        }
        type.__setattr__(cls, "_following", cached)
    return cached
