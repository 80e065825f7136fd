"""What a hostile or careless file gets: the rows 1 to 16, 59 and 61 of the fault matrix."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cpo_arabic.config import ConfigError, CPOConfig, load_config
from cpo_arabic.config.document import Source, parse, plain_scalar
from cpo_arabic.config.fields import all_fields
from cpo_arabic.config.secrets import line_without_secrets, without_secrets
from tests.config.helpers import load, problem, problems


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "+1e-6", ".000001"])
def test_row_1_numbers_are_numbers(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, f"training: {{learning_rate: {text}}}").config
    assert config.training.learning_rate == 1e-6


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "Yes", "NO", "y"])
def test_row_2_yes_and_no_are_not_booleans(tmp_path: Path, word: str) -> None:
    found = problem(tmp_path, f"cpo: {{use_queue: {word}}}")
    meant = word.lower() in ("yes", "on", "y")
    assert found.field == "cpo.use_queue"
    assert f"write {'true' if meant else 'false'}" in found.remedy


def test_row_2_no_is_text_where_text_belongs(tmp_path: Path) -> None:
    assert load(tmp_path, "logging: {run_name: no}").config.logging.run_name == "no"


def test_row_3_a_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    found = problem(tmp_path, "cpo:\n  beta: 0.1\n  margin: 0.1\n  beta: 0.2\n")
    assert (found.line, found.column) == (4, 3)
    assert "line 2" in found.rule


def test_row_3_a_duplicate_section_too(tmp_path: Path) -> None:
    assert "twice" in problem(tmp_path, "cpo: {}\ncpo: {}\n").rule


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", ".NaN", "1e400"])
def test_row_4_not_finite_is_refused(tmp_path: Path, text: str) -> None:
    assert "finite" in problem(tmp_path, f"cpo: {{beta: {text}}}").rule
    assert "finite" in problem(tmp_path, f"training: {{batch_size: {text}}}").rule


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("path", [p for p, field in all_fields().items() if float in field.kinds])
def test_row_4_in_every_number(tmp_path: Path, path: str, text: str) -> None:
    section, name = path.split(".")
    document = f"{section}: {{{name}: {text}}}"
    if path == "data.train_file":
        document = f"data: {{train_file: {{a.jsonl: {text}}}}}"
    assert problem(tmp_path, document).field == path


def test_row_4_nor_inside_options(tmp_path: Path) -> None:
    assert "finite" in problem(tmp_path, "cpo: {model_init_kwargs: {a: [1, {b: .nan}]}}").rule


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("010", "write 10"),
        ("-010", "write -10"),
        ("1:30", "sexagesimal"),
        ("1_000", "write 1000"),
        ('"12"', "write 12 without quotes"),
        ("١٢", "write the digits as 12"),
        ("12.0", "write 12"),
        ("1e1", "write 10"),
    ],
)
def test_row_5_old_notations_of_integers_are_refused(
    tmp_path: Path, text: str, remedy: str
) -> None:
    assert remedy in problem(tmp_path, f"training: {{batch_size: {text}}}").remedy


@pytest.mark.parametrize("text", ["0x10", "0o20", "+16"])
def test_row_5_notations_of_yaml_1_2_are_read(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"training: {{batch_size: {text}}}").config.training.batch_size == 16


@pytest.mark.parametrize("field", ["cpo.beta", "training.batch_size", "cpo.projection_dim"])
def test_row_6_a_boolean_is_no_number(tmp_path: Path, field: str) -> None:
    section, name = field.split(".")
    assert "boolean" in problem(tmp_path, f"{section}: {{{name}: true}}").rule


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("cpo: {temprature: 0.1}", "cpo.temperature"),
        ("cpo: {learning_rate: 0.1}", "training.learning_rate"),
        ("modle: {}", "model"),
        ("beta: 0.1", "cpo.beta"),
        ("cpo: {Beta: 0.1}", "cpo.beta"),
    ],
)
def test_row_7_unknown_names_get_the_closest(tmp_path: Path, text: str, meant: str) -> None:
    assert meant in problem(tmp_path, text).remedy


def test_row_7_a_name_like_none_lists_what_there_is(tmp_path: Path) -> None:
    assert "config show" in problem(tmp_path, "cpo: {zzzzzzzzzzzz: 1}").remedy
    assert "sections are" in problem(tmp_path, "zzzzzzzzzzzz: {}").remedy


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cpo.temprature=1", "cpo.temperature"),
        ("cpo=1", "names a section"),
        ("cpo.beta", "has no value"),
        ("cpo.beta.x=1", "holds no options"),
        ("cpo.model_init_kwargs.=1", "holds no options"),
        ("data.train_file.x=1", "holds no options"),
        ("=1", "section.field=value"),
        ("cp\u202eo.beta=1", "U+202E"),
    ],
)
def test_row_7_unknown_flags(tmp_path: Path, override: str, said: str) -> None:
    found = problem(tmp_path, "cpo: {}", [override])
    assert said in f"{found.rule} {found.remedy}"
    assert "--set" in found.source


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("CPO_ARABIC_CPO__TEMPRATURE", "CPO_ARABIC_CPO__TEMPERATURE"),
        ("CPO_ARABIC_BETA", "CPO_ARABIC_CPO__BETA"),
        ("CPO_ARABIC_CPO", "CPO_ARABIC_CPO__FIELD"),
        ("CPO_ARABIC_CPO__BETA__X", "CPO_ARABIC_CPO__BETA"),
        ("cpo_arabic_zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz", "two underscores"),
    ],
)
def test_row_7_unknown_variables(tmp_path: Path, variable: str, meant: str) -> None:
    found = problem(tmp_path, "cpo: {}", environ={variable: "1", "PATH": "/bin"})
    assert meant in found.remedy
    assert variable in found.source


def test_row_8_an_anchor_bomb_costs_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    started = time.process_time()
    assert "values, aliases expanded" in problem(tmp_path, "\n".join(lines)).rule
    assert time.process_time() - started < 1


def test_row_8_an_anchor_in_measure_is_read(tmp_path: Path) -> None:
    text = "cpo: {temperature: &t 0.07, contrastive_temperature: *t}"
    assert load(tmp_path, text).config.cpo.contrastive_temperature == 0.07


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpo: &a {model_init_kwargs: *a}", "refers to itself"),
        ("cpo: {beta: *nowhere}", "no anchor"),
        ("cpo: {model_init_kwargs: " + "[" * 500 + "]" * 500 + "}", "nested deeper"),
        ("cpo: {model_init_kwargs: " + "{a: " * 500 + "1" + "}" * 500 + "}", "nested deeper"),
        ("cpo: {beta: " + "9" * 5000 + "}", "5000 digits"),
        ("cpo: {beta: 0." + "9" * 5000 + "}", "is text"),
    ],
)
def test_row_9_self_reference_depth_and_length(tmp_path: Path, text: str, said: str) -> None:
    assert said in problem(tmp_path, text).rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("   \n\n", "is empty"),
        ("# nothing\n", "is empty"),
        ("---\n", "is empty"),
        ("null\n", "is empty"),
        ("- 1\n- 2\n", "a list"),
        ("hello", "plain text"),
        ("cpo: {}\n---\ncpo: {}\n", "second document"),
        ("cpo:\n  beta: 0.1\x00\n", "U+0000"),
        ("%YAML 1.1\n---\ncpo: {}\n", "directives"),
        ("cpo: {<<: {beta: 1}}", "merge keys"),
        ("? [a, b]\n: 1\n", "key must be text"),
        ("cpo: [1, 2]\n", "is no section"),
        ("cpo: 3\n", "is no section"),
        ("cpo:\n\tbeta: 1\n", "not valid YAML"),
        ("cpo: {beta: 1\n", "not valid YAML"),
        ("cpo: \x9c", "not valid YAML"),
        ("cpo: 'abc\n", "not valid YAML"),
    ],
)
def test_row_10_what_is_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    assert said in problem(tmp_path, text).rule


def test_row_10_a_section_with_everything_commented_out_is_empty(tmp_path: Path) -> None:
    assert load(tmp_path, "cpo:\n  # beta: 0.2\n").written == CPOConfig()


def test_row_11_bom_and_crlf_change_nothing(tmp_path: Path) -> None:
    text = 'cpo:\n  beta: 0.2\ndata:\n  train_file: "بيانات.jsonl"\n'
    plain = load(tmp_path, text)
    strange = load(tmp_path, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert strange.config == plain.config
    assert strange.provenance == plain.provenance


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"cpo: {beta: \xff}", "byte 0xff at offset 12"),
        (b"\xef\xbb\xbfcpo: \xc3", "byte 0xc3 at offset 8"),
        ("cpo: {}".encode("utf-16"), "UTF-16"),
        (b"x" * 300_000, "larger than 256 KiB"),
    ],
)
def test_row_12_other_encodings_name_the_byte(tmp_path: Path, data: bytes, said: str) -> None:
    assert said in problem(tmp_path, data).rule


@pytest.mark.parametrize(
    "text",
    [
        'data: {train_file: "a\\u202eb.jsonl"}',
        "data: {train_file: a\u202eb.jsonl}",
        "model: {name: a\u200bb}",
        'data: {train_file: ["a.jsonl", "b\\u2066.jsonl"]}',
        'data: {prompt_column: "a\\u0007"}',
        'cpo: {model_init_kwargs: {"a\\u202e": 1}}',
    ],
)
def test_row_13_hidden_characters_are_refused_and_escaped(tmp_path: Path, text: str) -> None:
    message = str(problem(tmp_path, text))
    assert "U+" in message
    assert not any(char in message for char in "\u202e\u200b\u2066\u0007")


def test_row_13_in_a_key(tmp_path: Path) -> None:
    message = str(problem(tmp_path, "cpo: {be\u202eta: 1}"))
    assert "\\u202e" in message and "\u202e" not in message


def test_row_13_in_the_path_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"U\+202E"):
        load_config(tmp_path / "a\u202e.yaml", environ={}, env_file=None)


def test_row_13_joiners_are_spelling_in_a_column(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {prompt_column: پرسش\u200cها}").config
    assert config.data.prompt_column == "پرسش\u200cها"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!x", "!!int", "!!float"])
def test_row_14_tags_are_refused(tmp_path: Path, tag: str) -> None:
    assert "tag" in problem(tmp_path, f'cpo: {{beta: {tag} "1"}}').rule


def test_row_15_a_directory_a_missing_file_and_a_pipe_are_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    started = time.monotonic()
    for path, said in (
        (tmp_path, "is a directory"),
        (tmp_path / "none.yaml", "does not exist"),
        (tmp_path / "nofolder" / "none.yaml", "does not exist"),
        (pipe, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(path, environ={}, env_file=None)
    assert time.monotonic() - started < 1


def test_row_15_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "prod.yaml").write_text("cpo: {}")
    with pytest.raises(ConfigError, match=r"did you mean .*prod\.yaml"):
        load_config(tmp_path / "prd.yaml", environ={}, env_file=None)


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".", "-x", "a b", "a\\b", "~x"])
def test_row_59_a_run_name_is_no_path(tmp_path: Path, name: str) -> None:
    assert "plain name" in problem(tmp_path, f"logging: {{run_name: '{name}'}}").rule


SECRET = "hf_" + "A1b2C3d4E5f6G7h8J9"


@pytest.mark.parametrize(
    "text",
    [
        f"model: {{name: {SECRET}}}",
        f"cpo: {{model_init_kwargs: {{token: {SECRET}}}}}",
        "cpo: {model_init_kwargs: {token: plainsecret}}",
        "cpo: {model_init_kwargs: {a: [{api_key: plainsecret}]}}",
        "data: {train_file: ['https://me:plainsecret@host/x.jsonl']}",
        "logging: {wandb_api_key: plainsecret}",
        "wandb_api_key: plainsecret",
        f"cpo: {{beta: {SECRET}}}",
        f"training: {{batch_size: {{a: {SECRET}}}}}",
    ],
)
def test_row_61_credentials_are_refused_and_never_echoed(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    shown = str(caught.value) + repr(caught.value.problems)
    assert SECRET not in shown and "plainsecret" not in shown


@pytest.mark.parametrize("name", ["LOGGING__WANDB_API_KEY", "CPO__BETA", "MODEL__NAME"])
def test_row_61_nor_from_a_variable(tmp_path: Path, name: str) -> None:
    found = problems(tmp_path, "cpo: {}", environ={f"CPO_ARABIC_{name}": SECRET})
    assert SECRET not in repr(found)


def test_row_61_nor_under_a_key_that_names_one(tmp_path: Path) -> None:
    override = "cpo.model_init_kwargs.api_key=plainsecret"
    assert "plainsecret" not in repr(problems(tmp_path, "cpo: {}", [override]))


@pytest.mark.parametrize(
    ("text", "rule", "remedy"),
    [
        ("cpo: {model_init_kwargs: 3}", "3 is a number, not a mapping", "mapping or null"),
        ("data: {padding: 3}", "not one of the choices", "max_length, longest, packed"),
        ("data: {train_file: {a: x}}", "{a: x} is not a path or a list", "weight"),
        ("data: {conversation_template: chatlm}", "is no template", "a path"),
        ("data: {train_file: []}", "[] names no file", "a path"),
        ("data: {train_file: true}", "true is a boolean, not text", "a path"),
        ("optimization: {lora_target_modules: [1]}", "[1] is not text or a list", "all-linear"),
        ("optimization: {quantization_bits: 5}", "5 is not one of the choices", "4, 8"),
        ("model: {name: 3}", "3 is a number, not text", 'in quotes if it is meant as text: "3"'),
        ("cpo: {beta: {a: 1}}", "is a mapping, not a number", "a number > 0"),
        ("cpo: {use_queue: {a: 1}}", "is a mapping, not true or false", "true or false"),
    ],
)
def test_a_value_of_another_kind_is_told_what_belongs_there(
    tmp_path: Path, text: str, rule: str, remedy: str
) -> None:
    found = problem(tmp_path, text)
    assert rule in found.rule and remedy in found.remedy


def test_row_61_a_value_is_hidden_by_its_key_or_by_its_shape() -> None:
    assert without_secrets("plain", "WANDB_API_KEY") == "[hidden]"
    assert without_secrets("plain", "cpo.model_init_kwargs.token") == "[hidden]"
    assert without_secrets("plain", "data.max_tokens_per_row") == "plain"
    assert without_secrets(f"a {SECRET} b") == "a [hidden] b"
    assert line_without_secrets("password: abc  # x").startswith("password: ****")


def test_row_61_numbers_about_tokens_are_no_credentials(tmp_path: Path) -> None:
    config = load(tmp_path, "cpo: {model_init_kwargs: {token: true, max_tokens: 3}}").config
    assert config.cpo.model_init_kwargs == {"token": True, "max_tokens": 3}


def test_plain_scalars_follow_the_core_schema() -> None:
    """A naive reader (YAML 1.1) gives False, 8, 90 and '1e-6' for the last four."""
    assert plain_scalar("Null") is None and plain_scalar("TRUE") is True
    assert [plain_scalar(text) for text in ("no", "010", "1:30", "1e-6")] == [
        "no",
        "010",
        "1:30",
        1e-6,
    ]


def test_empty_event_stream_is_an_empty_file() -> None:
    with pytest.raises(ConfigError, match="empty"):
        parse(Source("x", ""))
