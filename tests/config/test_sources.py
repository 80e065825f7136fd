"""One test per edge of the precedence: --set over environment over .env over file over defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpo_arabic.config import ConfigError, CPOConfig, Origin, load_config
from tests.config.helpers import load, problem, problems

FILE = "cpo:\n  beta: 0.2\n  margin: 0.3\n"
VARIABLE = {"CPO_ARABIC_CPO__BETA": "0.3"}


@pytest.fixture
def dotenv(tmp_path: Path) -> Path:
    path = tmp_path / "some.env"
    path.write_text("# a comment\nOTHER=1\nexport CPO_ARABIC_CPO__BETA='0.25'\n")
    return path


def test_file_over_default(tmp_path: Path) -> None:
    loaded = load(tmp_path, FILE)
    assert (loaded.config.cpo.beta, loaded.config.cpo.temperature) == (0.2, 0.1)
    assert loaded.provenance["cpo.temperature"] == Origin("default")
    origin = loaded.provenance["cpo.beta"]
    assert (origin.kind, origin.line, origin.column) == ("file", 2, 9)
    assert str(origin).endswith("run.yaml:2:9")


def test_dotenv_over_file(tmp_path: Path, dotenv: Path) -> None:
    loaded = load(tmp_path, FILE, env_file=dotenv)
    assert loaded.config.cpo.beta == 0.25
    assert str(loaded.provenance["cpo.beta"]) == f"CPO_ARABIC_CPO__BETA in {dotenv}:3"


def test_environment_over_dotenv(tmp_path: Path, dotenv: Path) -> None:
    loaded = load(tmp_path, FILE, environ=VARIABLE, env_file=dotenv)
    assert loaded.config.cpo.beta == 0.3
    assert str(loaded.provenance["cpo.beta"]) == "environment variable CPO_ARABIC_CPO__BETA"


def test_environment_over_file(tmp_path: Path) -> None:
    assert load(tmp_path, FILE, environ=VARIABLE).config.cpo.beta == 0.3


def test_flag_over_environment(tmp_path: Path, dotenv: Path) -> None:
    loaded = load(tmp_path, FILE, ["cpo.beta=0.4"], VARIABLE, dotenv)
    assert loaded.config.cpo.beta == 0.4
    assert str(loaded.provenance["cpo.beta"]) == "--set cpo.beta"


def test_later_flag_over_earlier(tmp_path: Path) -> None:
    assert load(tmp_path, FILE, ["cpo.beta=0.4", "cpo.beta=0.5"]).config.cpo.beta == 0.5


def test_an_overridden_leaf_keeps_its_siblings(tmp_path: Path) -> None:
    loaded = load(tmp_path, FILE, ["cpo.beta=0.4"], {"CPO_ARABIC_CPO__ALPHA": "0"})
    cpo = loaded.config.cpo
    assert (cpo.beta, cpo.margin, cpo.alpha) == (0.4, 0.3, 0.0)


def test_an_overridden_option_keeps_its_siblings(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "cpo: {model_init_kwargs: {a: 1, b: 2}}",
        ["cpo.model_init_kwargs.b=3"],
        {"CPO_ARABIC_CPO__MODEL_INIT_KWARGS__C": "[4]"},
    )
    assert loaded.config.cpo.model_init_kwargs == {"a": 1, "b": 3, "c": [4]}


def test_an_option_needs_no_siblings(tmp_path: Path) -> None:
    loaded = load(tmp_path, "cpo: {}", ["cpo.model_init_kwargs.b=text"])
    assert loaded.config.cpo.model_init_kwargs == {"b": "text"}


def test_the_process_environment_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPO_ARABIC_CPO__BETA", "0.7")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("CPO_ARABIC_CPO__BETA=0.6\nCPO_ARABIC_CPO__MARGIN=0.5\n")
    loaded = load_config(None)
    assert (loaded.config.cpo.beta, loaded.config.cpo.margin) == (0.7, 0.5)
    assert load_config(None, environ={}, env_file=None).written == CPOConfig()


def test_variables_are_read_in_any_case(tmp_path: Path) -> None:
    assert load(tmp_path, FILE, environ={"cpo_arabic_cpo__beta": "0.9"}).config.cpo.beta == 0.9


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("logging.run_name", "123", "123"),
        ("logging.run_name", "null", None),
        ("logging.run_name", '"null"', "null"),
        ("data.train_file", "a: b.jsonl", "a: b.jsonl"),
        ("data.train_file", "[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("data.train_file", "{a.jsonl: 2}", {"a.jsonl": 2.0}),
        ("model.name", "yes", "yes"),
        ("cpo.projection_dim", "null", None),
        ("cpo.projection_dim", "12", 12),
        ("optimization.quantization_bits", "8", 8),
        ("optimization.lora_target_modules", "[q_proj]", ["q_proj"]),
    ],
)
def test_text_of_flags_and_variables_is_read_for_its_field(
    tmp_path: Path, field: str, text: str, value: object
) -> None:
    variable = "CPO_ARABIC_" + field.replace(".", "__").upper()
    assert load(tmp_path, FILE, [f"{field}={text}"]).config.get(field) == value
    assert load(tmp_path, FILE, environ={variable: text}).config.get(field) == value


@pytest.mark.parametrize("text", ["", "[1", "yes", "{a: 1}"])
def test_bad_text_of_a_variable_names_the_variable(tmp_path: Path, text: str) -> None:
    found = problem(tmp_path, FILE, environ={"CPO_ARABIC_CPO__BETA": text})
    assert "CPO_ARABIC_CPO__BETA" in found.source
    assert found.line is None and found.excerpt is None


def test_a_broken_line_of_ours_in_dotenv_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("OTHER='broken' too\nCPO_ARABIC_CPO__BETA='1\n")
    with pytest.raises(ConfigError, match=r"x\.env:2.*cannot be read"):
        load(tmp_path, FILE, env_file=path)


def test_an_unknown_variable_in_dotenv_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("\nCPO_ARABIC_CPO__BTA=1\n")
    with pytest.raises(ConfigError, match=r"CPO_ARABIC_CPO__BTA in .*x\.env:2"):
        load(tmp_path, FILE, env_file=path)


def test_dotenv_is_taken_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No variable of the machine is put in, and a line of others is no business of ours."""
    monkeypatch.setenv("PLACE", "elsewhere")
    path = tmp_path / "x.env"
    path.write_text("OTHER='broken\nCPO_ARABIC_LOGGING__RUN_NAME=x\n")
    assert load(tmp_path, FILE, env_file=path).config.logging.run_name == "x"
    path.write_text("CPO_ARABIC_DATA__TRAIN_FILE=${PLACE}/a.jsonl\n")
    assert load(tmp_path, FILE, env_file=path).config.data.train_file == "${PLACE}/a.jsonl"
    assert not caplog.records


def test_a_repeated_variable_in_dotenv_is_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("CPO_ARABIC_CPO__BETA=0.5\nCPO_ARABIC_CPO__BETA=0.6\n")
    loaded = load(tmp_path, FILE, env_file=path)
    assert loaded.config.cpo.beta == 0.6
    assert str(loaded.provenance["cpo.beta"]).endswith("x.env:2")


def test_a_folder_for_dotenv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        load(tmp_path, FILE, env_file=tmp_path)


def test_a_missing_dotenv_is_none(tmp_path: Path) -> None:
    assert load(tmp_path, FILE, env_file=tmp_path / "none").config.cpo.beta == 0.2


# extends


def test_a_file_builds_on_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("cpo: {beta: 0.5, alpha: 0}\n")
    loaded = load(tmp_path, "extends: base.yaml\n" + FILE)
    assert (loaded.config.cpo.beta, loaded.config.cpo.alpha) == (0.2, 0.0)
    assert str(loaded.provenance["cpo.alpha"]).endswith("base.yaml:1:25")
    assert str(loaded.provenance["cpo.beta"]).endswith("run.yaml:3:9")


def test_of_several_bases_the_last_wins_wherever_the_line_stands(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("cpo: {alpha: 0, cpo_alpha: 0.1}\n")
    (tmp_path / "b.yaml").write_text("cpo: {cpo_alpha: 0.2}\n")
    loaded = load(tmp_path, FILE + "extends: [a.yaml, b.yaml]\n")
    assert (loaded.config.cpo.alpha, loaded.config.cpo.cpo_alpha) == (0.0, 0.2)
    assert loaded.config.cpo.beta == 0.2


def test_a_problem_in_the_base_points_into_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("cpo: {alpha: -1}\n")
    found = problem(tmp_path, "extends: base.yaml\n")
    assert found.source.endswith("base.yaml") and (found.line, found.column) == (1, 14)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: run.yaml", "builds on itself"),
        ("extends: none.yaml", "does not exist"),
        ("extends: .", "is a directory"),
        ("extends: 3", "is no path"),
        ("extends: [{a: 1}]", "is no path"),
        ("extends: null", "is no path"),
        ("extendz: a.yaml", "there is no such section"),
    ],
)
def test_bases_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    found = problem(tmp_path, text)
    assert said in found.rule
    assert found.line == 1


def test_a_circle_of_two_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: run.yaml\n")
    assert "builds on itself" in problem(tmp_path, "extends: a.yaml\n").rule


def test_a_long_chain_is_refused(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index}.yaml").write_text(f"extends: {index + 1}.yaml\n")
    assert "16 deep" in problem(tmp_path, "extends: 0.yaml\n").rule


def test_a_base_that_is_no_configuration_is_reported_with_what_came_before(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("[1]")
    rules = [found.rule for found in problems(tmp_path, "extends: [3, a.yaml]\n")]
    assert "is no path" in rules[0] and "a list" in rules[1]


# all at once


def test_all_problems_come_in_one_pass_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "cpo:\n  temprature: 1\n  beta: -1\n  reference_free: true\n  force_use_ref_model: true\n"
        "trainig: {}\n"
    )
    found = problems(tmp_path, text, ["cpo.x=1"], {"CPO_ARABIC_Q": "1"})
    assert [one.line for one in found] == [2, 3, 4, 6, None, None]


def test_a_rule_is_not_checked_on_a_value_that_is_wrong_already(tmp_path: Path) -> None:
    text = "cpo: {max_length: -4, max_prompt_length: 3000}\n"
    assert [one.field for one in problems(tmp_path, text)] == ["cpo.max_length"]


def test_a_rule_names_both_fields_with_values_and_places(tmp_path: Path) -> None:
    found = problem(
        tmp_path, "model:\n  max_length: 512\n", environ={"CPO_ARABIC_CPO__MAX_LENGTH": "1024"}
    )
    assert "1024" in found.rule and "512" in found.rule
    assert found.source == "environment variable CPO_ARABIC_CPO__MAX_LENGTH"
    assert "model.max_length = 512" in found.also[0] and "run.yaml:2:15" in found.also[0]


def test_the_caret_stands_under_the_value(tmp_path: Path) -> None:
    found = problem(tmp_path, "# نص\ncpo:\n  beta: -0.5  # bad\n")
    line, carets = found.caret_lines()
    assert line[carets.index("^") : carets.rindex("^") + 1] == "-0.5"
    assert str(found).count("remedy") == 1


# resolution


def test_unset_values_that_follow_others_are_numbers_with_their_formula(tmp_path: Path) -> None:
    loaded = load(tmp_path, "model: {max_length: 600}\ncpo: {max_prompt_length: 400}\n")
    config, origins = loaded.config, loaded.provenance
    assert (config.cpo.max_length, config.cpo.max_target_length) == (600, 200)
    assert config.optimization.lora_alpha == 32
    assert config.training.eval_batch_size == 4
    assert str(origins["cpo.max_length"]) == "follows model.max_length"
    assert origins["cpo.max_target_length"].kind == "resolved"
    assert origins["cpo.max_prompt_length"].kind == "file"


def test_null_is_unset_for_a_value_that_follows(tmp_path: Path) -> None:
    loaded = load(tmp_path, "model: {max_length: 600}\ncpo: {max_length: null}\n")
    assert loaded.config.cpo.max_length == 600
    assert loaded.written.cpo.max_length == 2048 and not loaded.written.is_set("cpo.max_length")
    assert loaded.provenance["cpo.max_length"].kind == "resolved"


def test_null_is_refused_where_nothing_is_followed(tmp_path: Path) -> None:
    assert "no unset state" in problem(tmp_path, "model: {max_length: null}").rule


def test_resolving_twice_changes_nothing() -> None:
    once = CPOConfig().resolved()
    assert once.resolved() == once
    assert once.cpo.max_prompt_length == 1024
