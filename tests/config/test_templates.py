"""The shipped files: each loads, says what it is, and the papers' numbers are the papers'."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpo_arabic.config import ConfigError, CPOConfig, load_config
from cpo_arabic.config import templates as room
from cpo_arabic.config.schema import FILE_NAME
from cpo_arabic.config.templates import template, templates, write_start
from tests.config.helpers import load
from tests.config.test_spec import INSTABILITY, MEMORY, PROD, QUICK, RESEARCH


def shipped(name: str) -> CPOConfig:
    return load_config(template(name).path, environ={}, env_file=None).config


@pytest.mark.parametrize("name", templates())
def test_every_shipped_file_loads_and_says_what_it_is(name: str) -> None:
    loaded = load_config(templates()[name].path, environ={}, env_file=None)
    assert len(templates()[name].summary) > 20
    assert [one.field for one in loaded.findings if one.code == "inert"] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("quick", QUICK),
        ("prod", PROD),
        ("research", RESEARCH),
        ("training-instability", INSTABILITY),
        ("memory", MEMORY),
    ],
)
def test_the_shipped_file_is_the_documented_one(tmp_path: Path, name: str, text: str) -> None:
    assert shipped(name) == load(tmp_path, text).config


def test_the_names_of_the_issue_are_there() -> None:
    assert {"quick", "prod", "research"} <= set(templates())
    for name in ("cpo", "simpo", "cpo-simpo", "dpo", "ipo"):
        assert template(name) == template(f"paper-{name}")


def test_cpo_as_released_by_alma_r() -> None:
    config = shipped("paper-cpo")
    training, cpo = config.training, config.cpo
    assert (cpo.loss_type, cpo.alpha, cpo.temperature, cpo.beta) == ("cpo", 0, 1, 0.1)
    assert (cpo.cpo_alpha, cpo.contrastive_weight) == (1, 0)
    assert (cpo.max_length, cpo.max_prompt_length) == (512, 256)
    assert training.batch_size * training.gradient_accumulation_steps == 16
    assert (training.learning_rate, training.weight_decay) == (1e-4, 0.01)
    assert (training.lr_scheduler_type, training.warmup_ratio) == ("inverse_sqrt", 0.01)
    assert config.optimization.bf16 and config.optimization.lora_rank == 16


@pytest.mark.parametrize(
    ("name", "loss", "alpha", "reference", "cloning"),
    [
        ("simpo", "simpo", 1, False, False),
        ("cpo-simpo", "simpo", 1, False, True),
        ("dpo", "sigmoid", 0, True, False),
        ("ipo", "ipo", 1, True, False),
    ],
)
def test_the_other_papers(
    name: str, loss: str, alpha: float, reference: bool, cloning: bool
) -> None:
    cpo = shipped(name).cpo
    assert (cpo.loss_type, cpo.alpha, cpo.contrastive_weight) == (loss, alpha, 0)
    assert cpo.force_use_ref_model is reference
    assert bool(cpo.cpo_alpha) is cloning


def test_an_overlay_is_laid_over_a_file_with_extends(tmp_path: Path) -> None:
    root = room.template_folder()
    text = f"extends: [{root}/research.yaml, {root}/overlays/memory.yaml]\n"
    loaded = load(tmp_path, text)
    assert loaded.config.cpo.num_negatives == 2 and not loaded.config.cpo.use_queue
    assert loaded.config.cpo.projection_dim == 256
    assert "memory.yaml" in str(loaded.provenance["cpo.num_negatives"])


@pytest.mark.parametrize("name", templates())
def test_a_started_file_means_the_same_and_finds_its_schema(tmp_path: Path, name: str) -> None:
    target = tmp_path / "mine.yaml"
    assert write_start(template(name), target) == [target, tmp_path / FILE_NAME]
    assert load_config(target, environ={}, env_file=None).config == shipped(name)
    first = target.read_text(encoding="utf-8").splitlines()[0]
    assert (tmp_path / first.partition("$schema=")[2]).is_file()


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        write_start(template("quick"), target)
    assert target.read_text() == "precious"
    write_start(template("quick"), target, force=True)
    assert "Quick start" in target.read_text()


@pytest.mark.parametrize(("name", "meant"), [("quik", "quick"), ("zzzz", "there are: ")])
def test_an_unknown_template_gets_the_closest(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=meant):
        template(name)


def test_an_installed_package_uses_its_own_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(room, "__file__", str(tmp_path / "templates.py"))
    assert room.template_folder() == tmp_path / "shipped"
