"""The estimate: its peak is the measured one, its sizes are the model's, and no weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cpo_arabic.cli import app
from cpo_arabic.run import rehearse
from cpo_arabic.run.estimate import Estimate, estimate, estimate_alone
from cpo_arabic.run.model import build_policy, tokenizer_of
from cpo_arabic.run.workload import Shape
from cpo_arabic.training.footprint import Moment, Stretch, highest
from scripts import bench_estimate

SHAPE = Shape(prompt=24, completion=12, negatives=2)
CONTRAST = ["cpo.contrastive_weight=1", "cpo.projection_dim=8"]
MEASURED = [
    "full, packed",
    "full, longest",
    "full, checkpointed",
    "LoRA",
    "LoRA, checkpointed",
    "contrastive, momentum, queue",
    "reference model",
]


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("larger-model")
    bench_estimate.make_model(folder, hidden=512, layers=6, vocabulary=32_000)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_the_peak_is_the_measured_one(larger_model: Path, name: str) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark of a step is known on Linux only")
    found = bench_estimate.compare(larger_model, bench_estimate.CASES[name], heap=False)
    assert bench_estimate.ratio(found) == pytest.approx(1, abs=bench_estimate.TOLERANCE)


@pytest.mark.parametrize("lora", [True, False])
def test_sizes_are_those_of_the_loaded_model(toy_config: Callable[..., Any], lora: bool) -> None:
    config = toy_config(f"optimization.use_lora={lora}", *CONTRAST)
    found = estimate_alone(config, SHAPE)
    policy = build_policy(config, tokenizer_of(config))
    assert found.parameters == sum(p.numel() for p in policy.parameters())
    assert found.trainable == sum(p.numel() for p in policy.trainable().values())
    held = [*policy.parameters(), *policy.buffers()]
    assert found.items["weights"] == sum(t.numel() * t.element_size() for t in held)
    assert found.items["optimizer moments"] == 2 * 4 * found.trainable


def test_no_weight_is_read(toy_config: Callable[..., Any], toy_model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(toy_model, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with_weights = estimate_alone(toy_config(), SHAPE)
    assert estimate_alone(toy_config(f"model.name={bare}"), SHAPE).items == with_weights.items


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["optimization.use_lora=false"],
        ["optimization.use_lora=false", "optimization.use_gradient_checkpointing=true"],
        ["optimization.use_lora=true", *CONTRAST],
        ["optimization.use_lora=false", "optimization.bf16=true", "cpo.force_use_ref_model=true"],
    ],
)
def test_a_part_of_the_layers_and_of_the_vocabulary_stands_for_all(
    toy_config: Callable[..., Any],
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
) -> None:
    deep = shutil.copytree(toy_model, tmp_path / "deep")
    settings = json.loads((deep / "config.json").read_text())
    settings |= {"num_hidden_layers": 6, "vocab_size": 60_000}
    settings["layer_types"] = ["full_attention"] * 6
    (deep / "config.json").write_text(json.dumps(settings))
    config = toy_config(f"model.name={deep}", *overrides)
    wide = Shape(prompt=64, completion=64, negatives=2)
    part = estimate_alone(config, wide)
    monkeypatch.setattr(rehearse, "LAYERS", 6)
    monkeypatch.setattr(
        rehearse,
        "rehearsed_vocabulary",
        lambda _config, _batch, architecture: architecture.vocab_size,
    )
    all_of_it = estimate_alone(config, wide)
    assert part.peak == pytest.approx(all_of_it.peak, rel=0.01)
    assert part.moment == all_of_it.moment


@pytest.mark.slow
def test_what_a_setting_changes_is_seen(toy_config: Callable[..., Any]) -> None:
    def peak(*overrides: str) -> Estimate:
        return estimate_alone(toy_config("optimization.use_lora=false", *overrides), SHAPE)

    plain = peak()
    assert peak("optimization.use_gradient_checkpointing=true").peak < plain.peak
    assert peak("data.padding=max_length").peak > peak("data.padding=longest").peak > plain.peak
    weights = plain.items["weights"]
    assert peak("cpo.force_use_ref_model=true").items["reference model"] <= weights
    looked_up = peak("cpo.force_use_ref_model=true", "cpo.precompute_ref_log_probs=true")
    assert "reference model" not in looked_up.items
    queued = peak(*CONTRAST, "cpo.use_queue=true", "cpo.queue_size=64", "cpo.use_momentum=true")
    assert queued.items["queue"] == 64 * (8 * 4 + 3 * 8)
    assert queued.items["momentum encoder"] == 4 * queued.trainable
    assert queued.step_seconds > 0


@pytest.mark.slow
def test_levers_are_legal_and_sorted(toy_config: Callable[..., Any]) -> None:
    config = toy_config("optimization.use_lora=false", "model.dtype=float16")
    report = estimate(config, SHAPE)
    offered = [tuple(lever.changes) for lever in report.levers]
    assert ("optimization.use_gradient_checkpointing",) in offered
    assert ("training.batch_size", "training.gradient_accumulation_steps") in offered
    assert ("data.padding",) not in offered  # packed already
    assert ("optimization.bf16",) not in offered  # excluded by float16
    peaks = [lever.estimate.peak for lever in report.levers]
    assert peaks == sorted(peaks)


def test_the_data_decide_where_no_shape_is_given(toy_config: Callable[..., Any]) -> None:
    found = estimate_alone(toy_config()).workload
    assert found.rows == 12
    assert found.steps == 4
    assert found.largest.input_ids.numel() >= found.positions >= found.tokens


def test_the_first_generation_is_known_by_its_settings(
    toy_config: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"model_type": "qwen", "vocab_size": 4000, "hidden_size": 32}
    settings |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"kv_channels": 8, "seq_length": 256}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = estimate_alone(
        toy_config(f"model.name={tmp_path}", "optimization.use_lora=false"), SHAPE
    )
    layer = (
        4 * 32 * 32 + 3 * 32 + 3 * 32 * 64 + 2 * 32
    )  # attention, its biases, feed-forward, norms
    assert found.parameters == 2 * 4000 * 32 + 2 * layer + 32


def test_a_walk_along_stretches() -> None:
    forward = Stretch("forward", repeats=10, peak=7, left=5)
    head = Stretch("head", peak=30, left=20, left_gradients=20)
    backward = Stretch("backward", repeats=10, peak=9, left=-3, left_gradients=2)
    assert highest([forward, head, backward]) == Moment("head", 0, 50, 30)
    growing = Stretch("backward", repeats=10, peak=9, peak_gradients=4, left=4, left_gradients=9)
    # nine repetitions done: 50 saved − 45 given back + 20 + 81 gradients, then 9 more
    assert highest([forward, head, growing]) == Moment("backward", 105, 5, 5)


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["estimate", *map(str, arguments)])


@pytest.mark.slow
def test_the_verb(toy_config: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    toy_config("optimization.use_lora=false").to_yaml(path)
    shown = run(path, "--shape", "24,12,2")
    assert shown.exit_code == 0, shown.output
    assert "saves most" in shown.output
    assert "fit" in shown.output
    data = json.loads(run(path, "--shape", "24,12,2", "--json").stdout)
    assert data["peak_bytes"] == sum(data["items"].values())
    assert data["levers"][0]["saved_bytes"] == max(each["saved_bytes"] for each in data["levers"])
    assert data["data"]["tokens_per_step"] == 2 * 2 * (24 + 3 * 12)
    assert run(path, "--shape", "24,12").exit_code == 2
    assert not torch.distributed.is_initialized()


def test_mistakes_are_refused_as_train_refuses_them(
    toy_config: Callable[..., Any], tmp_path: Path
) -> None:
    from cpo_arabic.errors import DataError, ModelError

    with pytest.raises(DataError, match=r"max_length"):
        estimate(toy_config(), Shape(prompt=500, completion=500, negatives=1))
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        estimate(toy_config("data.train_file=nowhere.jsonl"))
    with pytest.raises(ModelError, match=r"no-such-model' cannot be loaded"):
        estimate(toy_config("model.name=./no-such-model"), SHAPE)
