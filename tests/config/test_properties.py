"""Whatever a file, the environment and the flags hold: a configuration, or our own error.

Thousands of generated inputs; nothing but ConfigError may come out, its message is printable, and
what loads survives the round trip.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cpo_arabic.config import ConfigError, CPOConfig, load_config
from cpo_arabic.config.characters import escaped
from cpo_arabic.config.fields import SECTIONS, all_fields
from cpo_arabic.config.writing import as_yaml

FOLDER = Path(tempfile.mkdtemp(prefix="cpo-arabic-properties-"))
PATHS = list(all_fields())


def budget(examples: int) -> settings:
    """So many examples, the same ones every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70_000),
    st.integers(),
    st.floats(),
    st.sampled_from(["yes", "010", "1:30", "1e-6", "cpo", "~", "", "hf_" + "a" * 20]),
    st.text(max_size=12),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def likely(draw: st.DrawFn, path: str) -> Any:
    """A value that the field may well accept."""
    field = all_fields()[path]
    options: list[st.SearchStrategy[Any]] = [st.just(field.default)]
    if field.choices:
        options.append(st.sampled_from(field.choices))
    if bool in field.kinds:
        options.append(st.booleans())
    if int in field.kinds and not field.choices:
        options.append(st.integers(1, 4000))
    if float in field.kinds:
        options.append(st.floats(0, 2))
    if str in field.kinds and not field.choices:
        options.append(st.text("abج _./", min_size=1, max_size=6))
    return draw(st.one_of(options))


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Sections with known fields, sometimes unknown ones."""
    made: dict[str, Any] = {}
    for path in draw(st.lists(st.sampled_from(PATHS), max_size=8, unique=True)):
        section, name = path.split(".")
        made.setdefault(section, {})[name] = draw(st.one_of(likely(path), likely(path), values))
    if draw(st.integers(0, 9)) == 0:
        made[draw(st.sampled_from([*SECTIONS, "cpoo", "extends", ""]))] = draw(values)
    return made


def texts(path: str) -> st.SearchStrategy[str]:
    return st.one_of(
        likely(path).map(lambda value: json.dumps(value, ensure_ascii=False)),
        st.text(max_size=15).filter(lambda text: "\x00" not in text),
    )


@st.composite
def assignments(draw: st.DrawFn) -> list[tuple[str, str]]:
    chosen = draw(st.lists(st.sampled_from(PATHS), max_size=4))
    return [(path, draw(texts(path))) for path in chosen]


def judge(text: bytes, environ: dict[str, str], overrides: list[str]) -> CPOConfig | None:
    """Load; the configuration, or None where our own error came out, in printable form."""
    path = FOLDER / "run.yaml"
    path.write_bytes(text)
    try:
        loaded = load_config(path, overrides, environ=environ, env_file=None)
    except ConfigError as error:
        assert error.problems
        assert escaped(str(error).replace("\n", "")) == str(error).replace("\n", ""), repr(
            str(error)
        )
        return None
    assert loaded.config == loaded.config.resolved()
    assert set(loaded.provenance) == set(PATHS)
    return loaded.written


@budget(1000)
@given(documents(), assignments(), assignments(), st.booleans())
def test_structured_input_gives_a_configuration_or_our_error(
    document: dict[str, Any],
    variables: list[tuple[str, str]],
    flags: list[tuple[str, str]],
    ascii_only: bool,
) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    environ = {"CPO_ARABIC_" + path.replace(".", "__").upper(): value for path, value in variables}
    config = judge(text, environ, [f"{path}={value}" for path, value in flags])
    if config is not None:
        again = judge(as_yaml(config).encode(), {}, [])
        assert again is not None and again == config


PIECES = [
    "cpo:", "model:", "data:", "\n", "\n  ", " ", "beta: ", "0.1", "1e-6", "{", "}", "[", "]", ",",
    ": ", "- ", "&a", "*a", "!!str", "!x", "'", '"', "#", "|", ">", "?", "<<", "---", "...",
    "%YAML 1.2", "\t", "\ufeff", "\u202e", "\x85", "\u2028", "نص", "extends: ", "run.yaml", "null",
    "~", "\\u0000", "9" * 50, ".nan", "0x1F", "@", "`",
]  # fmt: skip


@budget(600)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
@example("? ")
@example("cpo: {? }")
@example("- - - :")
def test_yaml_shaped_noise_gives_a_configuration_or_our_error(text: str) -> None:
    judge(text.encode(), {}, [])


@budget(600)
@given(
    st.binary(max_size=60),
    st.dictionaries(
        st.text(max_size=10).map("CPO_ARABIC_".__add__), st.text(max_size=8), max_size=2
    ),
    st.lists(st.text(max_size=20), max_size=2),
)
def test_any_bytes_variables_and_flags_give_a_configuration_or_our_error(
    data: bytes, environ: dict[str, str], overrides: list[str]
) -> None:
    judge(data, environ, overrides)
    judge(b"cpo: {}", environ, overrides)
