"""Real runs of a toy model: every way of training, resumed bit for bit, refused with a remedy."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpo_arabic.errors import CheckpointError, RunDirectoryError, TrainingError
from cpo_arabic.run.directory import claimed
from cpo_arabic.run.training import Result, train
from cpo_arabic.training.metrics import MetricsFile
from cpo_arabic.training.observer import SilentObserver
from cpo_arabic.training.trainer import StopRequest

Make = Callable[..., Any]


class StopAfter(SilentObserver):
    """Asks for a stop once a step is done, as a signal would."""

    def __init__(self, step: int) -> None:
        self.at, self.request = step, StopRequest()

    def stepped(self, step: int, record: dict[str, Any] | None) -> None:
        if step == self.at:
            self.request.signal = 15


def records(result: Result) -> list[dict[str, Any]]:
    return MetricsFile(result.directory.metrics).read()


def weights(result: Result) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(result.directory.final.glob("*.safetensors")):
        found |= load_file(path)
    assert found
    return found


def train_loss(result: Result) -> list[float]:
    return [r["loss"] for r in records(result) if "loss" in r]


WAYS = {
    "lora": (),
    "full": ("optimization.use_lora=false",),
    "momentum-and-queue": ("cpo.use_momentum=true", "cpo.use_queue=true", "cpo.queue_size=64"),
    "projection": ("cpo.projection_dim=8",),
    "reference": ("cpo.force_use_ref_model=true",),
    "reference-full": ("cpo.force_use_ref_model=true", "optimization.use_lora=false"),
    "sigmoid": ("cpo.loss_type=sigmoid", "cpo.label_smoothing=0.1"),
    "hinge": ("cpo.loss_type=hinge",),
    "ipo": ("cpo.loss_type=ipo", "cpo.beta=0.5"),
    "simpo": ("cpo.loss_type=simpo", "cpo.beta=2", "cpo.temperature=1"),
    "bf16": ("optimization.bf16=true",),
    "checkpointing": ("optimization.use_gradient_checkpointing=true",),
    "rows": ("data.padding=longest",),
    "hard-negatives": ("cpo.negative_sampling_strategy=hard", "cpo.hard_negative_ratio=0.5"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_falls(toy_config: Make, way: str) -> None:
    result = train(
        toy_config("training.max_steps=8", "data.validation_file=null",
                   "data.validation_split_percentage=0", *WAYS[way]),
        SilentObserver(),
    )  # fmt: skip
    losses = train_loss(result)
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_artefact_loads_with_the_plain_libraries(toy_config: Make, toy_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(toy_config(), SilentObserver())
    base = AutoModelForCausalLM.from_pretrained(toy_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, result.directory.final)(ids).logits
    assert not torch.allclose(plain, adapted)
    assert len(AutoTokenizer.from_pretrained(result.directory.final)) == base.config.vocab_size


def test_a_fully_trained_model_loads_with_transformers(toy_config: Make) -> None:
    from transformers import AutoModelForCausalLM

    result = train(toy_config("optimization.use_lora=false"), SilentObserver())
    model = AutoModelForCausalLM.from_pretrained(result.directory.final)
    assert type(model).__name__ == "Qwen2ForCausalLM"


def test_metrics_carry_the_names_of_the_field(toy_config: Make) -> None:
    result = train(toy_config("training.eval_steps=2"), SilentObserver())
    names = {
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected", "nll_loss", "contrastive/loss", "contrastive/accuracy",
    }  # fmt: skip
    found = records(result)
    trained = [r for r in found if "grad_norm" in r]
    evaluated = [r for r in found if "eval_loss" in r]
    assert [r["step"] for r in trained] == [1, 2, 3, 4]
    assert [r["step"] for r in evaluated] == [0, 2, 4]
    assert names <= trained[0].keys()
    assert {f"eval_{name}" for name in names} <= evaluated[0].keys()
    summary = json.loads(result.directory.summary.read_text())
    assert summary["held_out_after"] == {
        k: v for k, v in evaluated[-1].items() if k.startswith("eval_")
    }
    assert result.directory.curves.stat().st_size > 1000


RESUMED = {
    "momentum-queue-projection": (
        "cpo.use_momentum=true", "cpo.momentum_beta=0.9", "cpo.use_queue=true",
        "cpo.queue_size=20", "cpo.projection_dim=8",
    ),
    "full-with-dropout": ("optimization.use_lora=false", "data.disable_dropout=false"),
    "lora-dropout-reference": (
        "optimization.lora_dropout=0.2", "data.disable_dropout=false",
        "cpo.force_use_ref_model=true",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", RESUMED)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    toy_config: Make, tmp_path: Path, way: str
) -> None:
    overrides = ("training.max_steps=7", "training.save_steps=100", *RESUMED[way])
    whole = train(toy_config(*overrides), SilentObserver())
    config = toy_config(f"training.output_dir={tmp_path / 'cut'}", *overrides)
    watcher = StopAfter(4)  # in the second epoch of three steps
    cut = train(config, watcher, stop=watcher.request)
    assert cut.outcome.stopped_by == 15
    assert not cut.directory.final.exists()
    resumed = train(config, SilentObserver(), resume=True)
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    steps = [r["step"] for r in records(resumed) if "grad_norm" in r]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in records(resumed) if "loss" in r] == train_loss(whole)


def test_forgetting_the_optimizer_would_be_caught(toy_config: Make, tmp_path: Path) -> None:
    """The negative control of the resume test: weights alone do not give the same end."""
    from cpo_arabic.training import state

    overrides = ("training.max_steps=6", "training.save_steps=3", "data.validation_file=null")
    whole = train(toy_config(*overrides), SilentObserver())
    config = toy_config(f"training.output_dir={tmp_path / 'cut'}", *overrides)
    watcher = StopAfter(3)
    train(config, watcher, stop=watcher.request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "load_optimizer", lambda *_: None)
        resumed = train(config, SilentObserver(), resume=True)
    pairs = zip(weights(whole).values(), weights(resumed).values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "change", ["training.learning_rate=1e-3", "cpo.beta=0.2", "data.max_samples=10"]
)
def test_another_run_s_checkpoint_is_refused_with_old_and_new(
    toy_config: Make, change: str
) -> None:
    train(toy_config("training.max_steps=2"), SilentObserver())
    field = change.partition("=")[0]
    with pytest.raises(CheckpointError, match=rf"{field}.*then.*now"):
        train(toy_config("training.max_steps=2", change), SilentObserver(), resume=True)


def test_precomputed_reference_log_probs_train_the_same_and_are_reused(
    toy_config: Make, tmp_path: Path
) -> None:
    reference = ("cpo.force_use_ref_model=true", "cpo.loss_type=sigmoid")
    live = train(toy_config(*reference), SilentObserver())
    table = (
        *reference,
        "cpo.precompute_ref_log_probs=true",
        f"data.cache_dir={tmp_path / 'cache'}",
    )
    once = train(toy_config(f"training.output_dir={tmp_path / 'a'}", *table), SilentObserver())
    files = sorted((tmp_path / "cache").glob("reference-log-probs-*.safetensors"))
    stamps = [f.stat().st_mtime_ns for f in files]
    train(toy_config(f"training.output_dir={tmp_path / 'b'}", *table), SilentObserver())
    assert len(files) == 2
    assert [f.stat().st_mtime_ns for f in files] == stamps
    for (name, a), b in zip(weights(live).items(), weights(once).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_a_named_reference_is_another_model(toy_config: Make, toy_model: Path) -> None:
    named = train(
        toy_config(f"cpo.reference_model_name={Path(__file__).parents[2] / 'demo/base-model'}",
                   "training.max_steps=1"),
        SilentObserver(),
    )  # fmt: skip
    own = train(
        toy_config("cpo.force_use_ref_model=true", "training.max_steps=1",
                   f"training.output_dir={named.directory.root}-own"),
        SilentObserver(),
    )  # fmt: skip
    assert own.outcome.before["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert named.outcome.before["eval_rewards/chosen"] != pytest.approx(0.0, abs=1e-3)


def test_a_used_directory_is_refused_unless_told(toy_config: Make) -> None:
    first = train(toy_config("training.max_steps=1"), SilentObserver())
    marker = first.directory.root / "mine"
    marker.write_text("x")
    with pytest.raises(RunDirectoryError, match="already used"):
        train(toy_config("training.max_steps=1"), SilentObserver())
    assert marker.exists()
    train(
        toy_config("training.max_steps=1", "training.overwrite_output_dir=true"), SilentObserver()
    )
    assert not marker.exists()


def test_two_runs_in_one_directory_are_refused(toy_config: Make, tmp_path: Path) -> None:
    root = tmp_path / "run"
    in_use = pytest.raises(RunDirectoryError, match="in use by another run")
    with claimed(root), in_use:
        train(toy_config(), SilentObserver())
    assert not root.exists()


def test_resume_without_a_run_is_refused(toy_config: Make) -> None:
    with pytest.raises(RunDirectoryError, match="no run to resume"):
        train(toy_config(), SilentObserver(), resume=True)


def test_a_linked_output_directory_is_refused(toy_config: Make, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "run").symlink_to(outside)
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        train(toy_config(), SilentObserver())
    assert not list(outside.iterdir())


def test_one_update_that_is_not_finite_is_skipped_and_named(
    toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpo_arabic.training import trainer as loop

    class Watcher(SilentObserver):
        warnings: list[str] = []  # noqa: RUF012

        def warning(self, text: str) -> None:
            self.warnings.append(text)

    real = loop.accumulate

    def poisoned(engine: Any, share: Any, step: int) -> Any:
        found = real(engine, share, step)
        if step == 1:
            next(iter(engine.bare.trainable().values())).grad.fill_(float("nan"))
        return found

    monkeypatch.setattr(loop, "accumulate", poisoned)
    result = train(toy_config(), Watcher())
    assert len(Watcher.warnings) == 1
    assert "Rows: [" in Watcher.warnings[0]
    assert all(torch.isfinite(w).all() for w in weights(result).values())
    assert len(train_loss(result)) == 4


def test_too_many_such_updates_in_a_row_end_the_run(
    toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpo_arabic.training import trainer as loop

    real = loop.accumulate

    def poisoned(engine: Any, share: Any, step: int) -> Any:
        found = real(engine, share, step)
        next(iter(engine.bare.trainable().values())).grad.fill_(float("inf"))
        return found

    monkeypatch.setattr(loop, "accumulate", poisoned)
    with pytest.raises(TrainingError, match="max_skipped_steps = 2"):
        train(toy_config("training.max_skipped_steps=2", "training.max_steps=9"), SilentObserver())


def test_sanity_check_leaves_no_trace_and_refuses_what_does_not_learn(
    toy_config: Make, tmp_path: Path
) -> None:
    plain = train(toy_config(), SilentObserver())
    checked = train(
        toy_config("data.sanity_check=true", "data.sanity_check_size=4",
                   f"training.output_dir={tmp_path / 'checked'}"),
        SilentObserver(),
    )  # fmt: skip
    for a, b in zip(weights(plain).values(), weights(checked).values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TrainingError, match="sanity check"):
        train(
            toy_config("data.sanity_check=true", "training.learning_rate=1e-12",
                       f"training.output_dir={tmp_path / 'wild'}"),
            SilentObserver(),
        )  # fmt: skip


def test_samples_are_written_beside_chosen_and_rejected(toy_config: Make) -> None:
    result = train(
        toy_config("data.generate_during_eval=true", "cpo.max_target_length=8",
                   "training.max_steps=1"),
        SilentObserver(),
    )  # fmt: skip
    lines = (result.directory.root / "samples" / "step-1.jsonl").read_text().splitlines()
    assert json.loads(lines[0]).keys() == {"row", "prompt", "completion", "chosen", "rejected"}


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(toy_config: Make, tmp_path: Path, workers: int) -> None:
    alone = train(toy_config("training.max_steps=2"), SilentObserver())
    helped = train(
        toy_config("training.max_steps=2", f"training.dataloader_num_workers={workers}",
                   f"training.output_dir={tmp_path / 'helped'}"),
        SilentObserver(),
    )  # fmt: skip
    for a, b in zip(weights(alone).values(), weights(helped).values(), strict=True):
        assert torch.equal(a, b)


def test_a_damaged_newest_checkpoint_resumes_from_the_one_before(
    toy_config: Make, tmp_path: Path
) -> None:
    overrides = ("training.max_steps=6", "training.save_steps=2", "data.validation_file=null")
    whole = train(toy_config(*overrides), SilentObserver())
    expected = weights(whole)
    newest = whole.directory.root / "checkpoint-6" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    shutil.rmtree(whole.directory.final)
    resumed = train(toy_config(*overrides), SilentObserver(), resume=True)
    for a, b in zip(expected.values(), weights(resumed).values(), strict=True):
        assert torch.equal(a, b)


def test_no_secret_and_no_thread_is_left_behind(toy_config: Make) -> None:
    before = threading.active_count()
    result = train(toy_config("training.max_steps=1"), SilentObserver())
    assert threading.active_count() <= before + 1
    assert "init_kwargs: null" in result.directory.config.read_text()


def test_a_mistake_met_late_leaves_an_earlier_run_as_it_was(toy_config: Make) -> None:
    from cpo_arabic.errors import ModelError

    first = train(toy_config("training.max_steps=1"), SilentObserver())
    with pytest.raises(ModelError, match="lora_target_modules"):
        train(
            toy_config(
                "training.overwrite_output_dir=true", "optimization.lora_target_modules=[no]"
            ),
            SilentObserver(),
        )
    assert first.directory.summary.exists()


def test_a_refused_run_leaves_no_directory(toy_config: Make, tmp_path: Path) -> None:
    from cpo_arabic.errors import ModelError

    with pytest.raises(ModelError):
        train(toy_config("optimization.lora_target_modules=[no]"), SilentObserver())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["semantic_search", "self"])
def test_mined_negatives_are_kept_in_a_file_and_trained_on(toy_config: Make, strategy: str) -> None:
    result = train(
        toy_config("data.create_hard_negatives=true", f"data.hard_negative_strategy={strategy}",
                   "cpo.hard_negative_ratio=1", "cpo.negative_sampling_strategy=hard",
                   "cpo.max_target_length=8", "training.max_steps=1"),
        SilentObserver(),
    )  # fmt: skip
    (mined,) = result.directory.root.glob("mined-*.jsonl")
    rows = [json.loads(line) for line in mined.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert row["mined"]
        assert row["chosen"] not in [found["text"] for found in row["mined"]]


@pytest.mark.parametrize("strategy", ["paraphrase", "orthography"])
def test_augmented_twins_are_trained_on(toy_config: Make, strategy: str) -> None:
    result = train(
        toy_config("data.augment_data=true", f"data.augmentation_strategy={strategy}",
                   "data.augmentation_ratio=0.5", "cpo.max_prompt_length=16",
                   "training.max_steps=1"),
        SilentObserver(),
    )  # fmt: skip
    assert result.summary["train_rows"] == 18


def test_streamed_rows_train_and_are_tokenised_once(toy_config: Make, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    overrides = ("data.max_samples=null", "data.streaming=true", f"data.cache_dir={cache}",
                 "training.max_steps=1", "data.validation_file=null")  # fmt: skip
    first = train(toy_config(*overrides), SilentObserver())
    entries = sorted(cache.glob("tokens-*"))
    assert len(entries) == 2
    again = train(toy_config(*overrides, "training.overwrite_output_dir=true"), SilentObserver())
    assert sorted(cache.glob("tokens-*")) == entries
    assert again.summary["train_rows"] == first.summary["train_rows"]
    assert 200 < first.summary["train_rows"] < 265
