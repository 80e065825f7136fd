"""Python objects: construction, checked assignment, copies, and the round trip through a file."""

from __future__ import annotations

import copy
import math
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from cpo_arabic.config import (
    ConfigError,
    CPOConfig,
    CPOSpecificConfig,
    OptimizationConfig,
    TrainingConfig,
)
from cpo_arabic.config.base import Model
from cpo_arabic.config.writing import as_yaml, write_text, yaml_value
from tests.config.helpers import load


def same(one: CPOConfig, other: CPOConfig) -> bool:
    """Equal values, and the same fields set."""
    return one == other and all(
        one.sections()[name].model_fields_set == section.model_fields_set
        for name, section in other.sections().items()
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", -1.0),
        ("beta", True),
        ("beta", "0.1"),
        ("beta", math.nan),
        ("beta", math.inf),
        ("beta", None),
        ("num_negatives", 1.0),
        ("num_negatives", 0),
        ("loss_type", "dpo"),
        ("use_queue", 1),
        ("model_init_kwargs", {"a": object()}),
        ("model_init_kwargs", {1: 1}),
        ("model_init_kwargs", {"a": {1: 1}}),
        ("model_init_kwargs", {"token": 3.5, "a": ("x",)}),
        ("model_init_kwargs", [1]),
        ("reference_model_name", ""),
        ("reference_model_name", 3),
        ("max_length", 4096),
        ("max_prompt_length", 2048),
        ("max_target_length", 2048),
        ("precompute_ref_log_probs", True),
        ("nonsense", 1),
    ],
)
def test_a_refused_assignment_leaves_the_object_as_it_was(field: str, value: Any) -> None:
    config = CPOConfig()
    before = pickle.loads(pickle.dumps(config))
    with pytest.raises(ConfigError):
        setattr(config.cpo, field, value)
    assert same(config, before)


def test_an_assignment_counts_as_set_and_null_unsets() -> None:
    config = CPOConfig()
    config.cpo.max_length = 100
    assert config.is_set("cpo.max_length") and config.resolved().cpo.max_prompt_length == 50
    config.cpo.max_length = None  # type: ignore[assignment]
    assert not config.is_set("cpo.max_length") and config.cpo.max_length == 2048
    config.optimization.lora_alpha = 3
    config.optimization.lora_alpha = None
    assert config.resolved().optimization.lora_alpha == 32
    config.cpo.projection_dim = None
    assert config.is_set("cpo.projection_dim")


def test_a_section_can_be_replaced_whole_and_is_copied() -> None:
    config = CPOConfig()
    section = CPOSpecificConfig(beta=0.5)
    config.cpo = section
    section.beta = 0.6
    assert config.cpo.beta == 0.5
    with pytest.raises(ConfigError):
        config.cpo = CPOSpecificConfig(max_length=4096)
    with pytest.raises(ConfigError):
        config.cpo = 3  # type: ignore[assignment]
    assert config.cpo.beta == 0.5
    with pytest.raises(ConfigError):
        config.cpo.max_length = 4096


def test_unknown_attributes_and_deletion_are_refused() -> None:
    config = CPOConfig()
    with pytest.raises(ConfigError, match="cpo"):
        config.cpos = 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="deleted"):
        del config.cpo.beta


def test_errors_in_python_name_the_dotted_field() -> None:
    with pytest.raises(ConfigError, match=r"cpo\.beta: -1.0 is out of range"):
        CPOSpecificConfig(beta=-1.0)
    with pytest.raises(ConfigError, match=r"cpo\.betta: there is no such field"):
        CPOConfig(cpo={"betta": 1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"cpo: 3 is no section"):
        CPOConfig.model_validate({"cpo": 3})
    with pytest.raises(ConfigError, match="nonsense"):
        CPOConfig(nonsense=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="section"):
        CPOConfig.model_validate([1])
    with pytest.raises(ConfigError):
        TrainingConfig.model_validate(3)


def test_a_section_alone_obeys_the_rules_among_its_own_fields() -> None:
    with pytest.raises(ConfigError, match="reference_free"):
        CPOSpecificConfig(reference_free=True, force_use_ref_model=True)
    with pytest.raises(ConfigError, match="warm-up"):
        TrainingConfig(warmup_steps=1, warmup_ratio=0.1)
    section = OptimizationConfig(use_lora=False)
    with pytest.raises(ConfigError, match="quantised"):
        section.use_quantization = True


def test_several_fields_change_at_once() -> None:
    config = CPOConfig()
    changed = config.updated({"cpo.max_length": 4096, "model.max_length": 4096})
    assert changed.cpo.max_length == 4096 and config.cpo.max_length == 2048
    assert not changed.is_set("cpo.beta")
    for changes in ({"cpo.betta": 1}, {"cpo.max_length": 4096}, {"cpo.beta": -1}):
        with pytest.raises(ConfigError):
            config.updated(changes)


def test_copies_are_independent_and_keep_the_rules() -> None:
    config = CPOConfig()
    for made in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        made.cpo.beta = 0.9
        assert config.cpo.beta == 0.1
        with pytest.raises(ConfigError):
            made.cpo.max_length = 4096


def test_an_error_survives_pickling() -> None:
    with pytest.raises(ConfigError) as caught:
        CPOSpecificConfig(beta=-1.0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems and str(again) == str(caught.value)


def test_the_common_base_has_no_rules_of_its_own() -> None:
    with pytest.raises(NotImplementedError):
        Model()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cpo.beta": 1e-8, "training.learning_rate": 5e-324},
        {"cpo.max_length": 100, "cpo.projection_dim": None},
        {"data.train_file": ["a b.jsonl", "بيانات: #1.jsonl", "yes", "012"]},
        {"data.train_file": {"a, b: c.jsonl": 0.5}},
        {"data.prompt_column": " س\u200cؤال\t".replace("\t", "")},
        {"data.prompt_column": "null", "data.chosen_column": "1e5", "data.rejected_column": "~"},
        {"cpo.model_init_kwargs": {"a": [1, 2.5, None, True, "x\ny".replace("\n", " ")], "": {}}},
        {"model.name": "-x", "model.revision": "010", "model.tokenizer_name": "a\\b"},
        {"data.validation_file": None, "data.validation_split_percentage": 0.25},
        {"data.validation_file": "data/cpo_validation.jsonl"},
    ],
)
def test_a_written_file_loads_to_the_same_configuration(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = CPOConfig().updated(changes)
    path = tmp_path / "out.yaml"
    config.to_yaml(path)
    again = CPOConfig.from_yaml(path, environ={})
    assert same(again, config)
    assert as_yaml(again) == path.read_text(encoding="utf-8")


def test_unset_values_that_follow_are_written_as_null() -> None:
    text = as_yaml(CPOConfig())
    assert "\n  max_length: null  # follows model.max_length\n" in text
    assert "\n  # beta: 0.1\n" in text
    assert "\n  max_length: 2048\n" in as_yaml(CPOConfig().resolved())


def test_a_file_that_cannot_be_written_is_an_error_and_stays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        CPOConfig().to_yaml(tmp_path / "none" / "x.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        CPOConfig().to_yaml(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_writing_keeps_the_mode_and_the_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("x")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "cpo: {}\n")
    assert link.is_symlink() and real.read_text() == "cpo: {}\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_values_are_written_on_one_line() -> None:
    assert yaml_value({"a": [1, "x: y", None]}) == '{a: [1, "x: y", null]}'


def test_from_yaml_lets_the_environment_override(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("cpo: {beta: 0.2}\n")
    config = CPOConfig.from_yaml(str(path), environ={"CPO_ARABIC_CPO__BETA": "0.3"})
    assert config.cpo.beta == 0.3


def test_loading_does_not_need_the_data(tmp_path: Path) -> None:
    loaded = load(tmp_path, "data: {train_file: none.jsonl}")
    assert loaded.config.data.train_file == "none.jsonl"
