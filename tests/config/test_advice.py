"""Every warning and advice: a setting that earns it, and the nearest one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_arabic.config import CPOConfig, Finding
from cpo_arabic.config import advice as room
from cpo_arabic.config.advice import CHECKS, describe_objective, file_findings, findings
from tests.config.helpers import load

MIXED = {"cpo.negative_sampling_strategy": "mixed"}
SIMPO = {"cpo.loss_type": "simpo"}

# check: (earns it, does not), each over the defaults
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learning_rate_range": ({"training.learning_rate": 2e-4}, {"training.learning_rate": 1e-4}),
    "warmup_longer_than_run": (
        {"training.warmup_steps": 10, "training.max_steps": 10},
        {"training.warmup_steps": 9, "training.max_steps": 10},
    ),
    "interval_longer_than_run": (
        {"training.eval_steps": 11, "training.max_steps": 10},
        {"training.eval_steps": 10, "training.max_steps": 10},
    ),
    "no_clipping": ({"training.max_grad_norm": None}, {"training.max_grad_norm": 5.0}),
    "preference_temperature_low": ({"cpo.temperature": 0.019}, {"cpo.temperature": 0.02}),
    "contrastive_temperature_low": (
        {"cpo.contrastive_temperature": 0.019},
        {"cpo.contrastive_temperature": 0.02},
    ),
    "reward_scale": ({"cpo.beta": 0.049}, {"cpo.beta": 0.05}),
    "sums_at_mean_scale": ({"cpo.alpha": 0}, {"cpo.alpha": 0, "cpo.temperature": 1}),
    "gamma_against_beta": (SIMPO | {"cpo.cpo_gamma": 1.1}, SIMPO | {"cpo.cpo_gamma": 1.0}),
    "simpo_without_margin": (SIMPO | {"cpo.cpo_gamma": 0}, SIMPO),
    "cpo_simpo": (SIMPO, SIMPO | {"cpo.cpo_alpha": 0}),
    "reference_expected": (
        {"cpo.loss_type": "ipo"},
        {"cpo.loss_type": "ipo", "cpo.force_use_ref_model": True},
    ),
    "sigmoid_without_reference": (
        {"cpo.loss_type": "sigmoid"},
        {"cpo.loss_type": "sigmoid", "cpo.reference_model_name": "x"},
    ),
    "simpo_with_reference": (SIMPO | {"cpo.force_use_ref_model": True}, SIMPO),
    "reference_copy_costs_memory": (
        {"cpo.force_use_ref_model": True, "optimization.use_lora": False},
        {"cpo.force_use_ref_model": True},
    ),
    "no_preference_term": ({"cpo.preference_weight": 0}, {}),
    "one_negative_with_mixing": (
        MIXED | {"cpo.hard_negative_ratio": 0.3},
        MIXED | {"cpo.hard_negative_ratio": 0.3, "cpo.num_negatives": 3},
    ),
    "strategy_without_hard_share": (MIXED, MIXED | {"cpo.hard_negative_ratio": 0.5}),
    "queue_without_momentum": (
        {"cpo.use_queue": True},
        {"cpo.use_queue": True, "cpo.use_momentum": True},
    ),
    "unbounded_similarities": ({"cpo.normalize_embeddings": False}, {}),
    "views_without_noise": (
        {"cpo.simcse_dropout": 0},
        {"cpo.simcse_dropout": 0, "cpo.use_momentum": True},
    ),
    "same_temperatures": ({"cpo.temperature": 0.05}, {"cpo.temperature": 0.06}),
    "momentum_copies_weights": (
        {"cpo.use_momentum": True, "optimization.use_lora": False},
        {"cpo.use_momentum": True},
    ),
    "padding_to_the_maximum": ({}, {"data.padding": "longest"}),
    "refuses_long_rows": (
        {"data.truncation": False},
        {"data.truncation": False, "data.on_bad_row": "skip"},
    ),
    "large_model_without_checkpointing": (
        {"model.name": "Qwen/Qwen2.5-7B"},
        {"model.name": "Qwen/Qwen2.5-0.5B"},
    ),
    "legacy_model": ({"model.name": "Qwen/Qwen-1_8B"}, {"model.name": "Qwen/Qwen1.5-1.8B"}),
    "remote_code": ({"model.trust_remote_code": True}, {}),
    "missing_bitsandbytes": ({"optimization.use_quantization": True}, {}),
    "missing_wandb": ({"logging.use_wandb": True}, {}),
    "missing_miner": (
        {"data.create_hard_negatives": True, "data.hard_negative_strategy": "bm25"},
        {"data.create_hard_negatives": True},
    ),
}


@pytest.fixture(autouse=True)
def no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "has_package", lambda name: False)


def found(changes: dict[str, Any]) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings(CPOConfig().updated(changes))}


def test_every_check_has_a_case() -> None:
    assert set(CASES) == {check.test.__name__ for check in CHECKS}


@pytest.mark.parametrize("code", CASES)
def test_a_setting_earns_its_finding_with_a_remedy(code: str) -> None:
    finding = found(CASES[code][0])[code]
    assert finding.message and finding.remedy and finding.field


@pytest.mark.parametrize("code", CASES)
def test_the_nearest_setting_does_not(code: str) -> None:
    assert code not in found(CASES[code][1])


@pytest.mark.parametrize("extra", ["missing_bitsandbytes", "missing_wandb", "missing_miner"])
def test_an_installed_package_is_not_missed(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "has_package", lambda name: True)
    assert extra not in found(CASES[extra][0])


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"training.learning_rate": 5e-8}, "learning_rate_range", "so low"),
        (
            {"training.learning_rate": 2e-5, "optimization.use_lora": False},
            "learning_rate_range",
            "full fine-tuning",
        ),
        ({"cpo.beta": 2}, "reward_scale", "saturates"),
        (
            MIXED | {"cpo.hard_negative_ratio": 0.8},
            "one_negative_with_mixing",
            "every negative is hard",
        ),
        ({"model.name": "x/Y-70B"}, "large_model_without_checkpointing", "70B"),
        ({"model.name": "Qwen/Qwen-14B-Chat"}, "legacy_model", "Qwen2"),
    ],
)
def test_findings_say_which_case_it_is(changes: dict[str, Any], code: str, said: str) -> None:
    assert said in found(changes)[code].message


def test_two_temperatures_of_which_one_is_idle_may_be_equal() -> None:
    changes = {"cpo.temperature": 0.05, "cpo.contrastive_weight": 0}
    assert "same_temperatures" not in found(changes)


def test_the_defaults_earn_no_warning() -> None:
    assert [one.code for one in findings(CPOConfig())] == ["padding_to_the_maximum"]


def test_a_field_set_for_nothing_names_the_switch() -> None:
    finding = found({"cpo.queue_size": 100})["inert"]
    assert finding.message == "cpo.queue_size is set, but has no effect: cpo.use_queue is false"
    assert finding.severity == "warning" and "cpo.use_queue" in finding.remedy


def test_a_mere_statement_earns_no_warning() -> None:
    assert "inert" not in found({"cpo.reference_free": True})
    assert "inert" not in found({"cpo.label_smoothing": 0.0})


def test_warnings_come_before_advice() -> None:
    order = [one.severity for one in findings(CPOConfig().updated({"cpo.queue_size": 100}))]
    assert order == sorted(order, reverse=True)


def test_findings_name_the_place_of_a_value(tmp_path: Path) -> None:
    loaded = load(tmp_path, "cpo:\n  queue_size: 7\n", ["cpo.use_queue=false"])
    places = {one.field: one.place for one in loaded.findings}
    assert places["cpo.queue_size"].endswith("run.yaml:2:15")
    assert places["data.padding"] == ""


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        (json.dumps({"prompt": "س" * 1280, "chosen": "ج" * 1280, "rejected": ""}), "62%"),
        ('{"prompt": "", "chosen": "x"}\n[1]\n{"prompt": 3, "chosen": "x"}\n{bad\n', "100%"),
        ("[1]\n", None),
        ("", None),
    ],
)
def test_the_share_of_padding_is_estimated_from_the_data(
    tmp_path: Path, rows: str, share: str | None
) -> None:
    (tmp_path / "rows.jsonl").write_text(rows)
    changes = {"data.train_file": str(tmp_path / "rows.jsonl")}
    message = found(changes)["padding_to_the_maximum"].message
    assert (share in message) if share else ("%" not in message)


def test_other_kinds_of_data_get_no_estimate(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    changes = {"data.train_file": str(tmp_path / "rows.json")}
    assert "%" not in found(changes)["padding_to_the_maximum"].message


def test_missing_files_are_reported_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = CPOConfig().updated(
        {
            "data.validation_file": "v.jsonl",
            "data.test_file": "t.jsonl",
            "data.conversation_template": "a.jinja",
        }
    )
    fields = [one.field for one in file_findings(config)]
    assert fields == [
        "data.train_file",
        "data.validation_file",
        "data.test_file",
        "data.conversation_template",
    ]
    assert [one.field for one in file_findings(CPOConfig())] == ["data.train_file"]
    assert file_findings(CPOConfig().updated({"data.dataset_name": "x"})) == []
    problem = file_findings(config)[0].as_problem()
    assert "does not exist" in problem.rule and problem.remedy


@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        (
            {},
            "minimise 1·CPO listwise(k = 1, β/τ = 0.1/0.1, mean log-probs, no reference) "
            "+ 1·NLL(chosen) + 1·0.05·InfoNCE(margin 0.1, hard-negative β_h = 0.1, cosine)",
        ),
        (
            {
                "cpo.loss_type": "simpo",
                "cpo.beta": 2,
                "cpo.temperature": 1,
                "cpo.cpo_gamma": 1,
                "cpo.cpo_alpha": 0,
                "cpo.contrastive_weight": 0,
            },
            "minimise 1·SimPO listwise(k = 1, β/τ = 2/1, mean log-probs, γ = 1, no reference)",
        ),
        (
            {
                "cpo.loss_type": "ipo",
                "cpo.force_use_ref_model": True,
                "cpo.alpha": 0.5,
                "cpo.cpo_alpha": 0,
                "cpo.contrastive_weight": 0,
            },
            "minimise 1·IPO squared(k = 1, target 1/(2β) = 5, log-probs / tokens^0.5, "
            "reference = starting model)",
        ),
        (
            {
                "cpo.loss_type": "sigmoid",
                "cpo.label_smoothing": 0.1,
                "cpo.alpha": 0,
                "cpo.temperature": 1,
                "cpo.reference_model_name": "m",
                "cpo.cpo_alpha": 0,
                "cpo.contrastive_weight": 0,
            },
            "minimise 1·sigmoid (DPO form)(k = 1, β/τ = 0.1/1, summed log-probs, "
            "label smoothing ε = 0.1, reference = m)",
        ),
        (
            {
                "cpo.preference_weight": 0,
                "cpo.cpo_alpha": 0,
                "cpo.contrastive_weight": 1.2,
                "cpo.contrastive_temperature": 0.02,
                "cpo.cpo_beta": 0,
                "cpo.normalize_embeddings": False,
                "cpo.projection_dim": 256,
                "cpo.use_momentum": True,
                "cpo.use_queue": True,
            },
            "minimise 1.2·0.02·InfoNCE(margin 0.1, dot product, projection to 256, "
            "momentum 0.999, queue of 65536)",
        ),
    ],
)
def test_the_objective_is_stated_in_one_line(changes: dict[str, Any], objective: str) -> None:
    assert describe_objective(CPOConfig().updated(changes)) == objective
