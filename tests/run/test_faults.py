"""Killed, interrupted, out of disk or memory, tampered with: nothing is lost and nothing runs."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import shutil
import signal
import struct
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpo_arabic.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    RunDirectoryError,
    TrainingError,
)
from cpo_arabic.run.evaluation import compare
from cpo_arabic.run.training import train
from cpo_arabic.training.checkpoint import CheckpointStore, sha256, verified
from cpo_arabic.training.metrics import MetricsFile
from cpo_arabic.training.observer import SilentObserver
from tests.run import processes
from tests.run.processes import Command, run, write_config
from tests.training.test_step import Bench

Make = Callable[..., Any]

LONG = (
    "training.max_steps=30",
    "training.save_steps=5",
    "cpo.use_momentum=true",
    "cpo.use_queue=true",
    "cpo.queue_size=32",
)


def ignore(_: str) -> None: ...


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "final" / "adapter_model.safetensors")


def steps(root: Path) -> int:
    return len(MetricsFile(root / "metrics.jsonl").read())


def saved(root: Path) -> list[int]:
    return [step for step, _ in CheckpointStore(root, None).folders()]


@pytest.fixture(scope="module")
def uninterrupted(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    status, command = run(folder, "train", write_config(folder / "c.yaml", toy_model, *LONG))
    assert status == 0, command.err
    return weights(folder / "run")


def assert_resumes_to(expected: dict[str, torch.Tensor], config: Path) -> None:
    root = config.parent / "run"
    assert not (root / "final").exists()
    status, command = run(config.parent, "train", config, "--resume")
    assert status == 0, command.err
    for name, value in weights(root).items():
        assert torch.equal(value, expected[name]), name
    assert steps(root) == 30
    assert not list(root.glob(".*"))  # nothing half-written stays


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "ends_with"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step_and_resumes_to_the_same_weights(
    toy_model: Path, tmp_path: Path, uninterrupted: Any, sent: signal.Signals, ends_with: int
) -> None:
    config, root = write_config(tmp_path / "c.yaml", toy_model, *LONG), tmp_path / "run"
    command = Command(tmp_path, "train", config)
    command.wait_for(lambda: steps(root) >= 4)
    command.send(sent)
    assert command.status() == ends_with
    stopped = steps(root)
    assert stopped < 30
    assert saved(root)[-1] == stopped
    assert f"stopped at step {stopped}" in command.out
    assert "--resume" in command.out
    assert_resumes_to(uninterrupted, config)


def test_a_signal_to_the_whole_group_leaves_the_loader_processes_alone(
    toy_model: Path, tmp_path: Path
) -> None:
    """As a batch system sends it: without a group of their own, loaders die and so does the run."""
    config = write_config(
        tmp_path / "c.yaml", toy_model, *LONG, "training.dataloader_num_workers=2"
    )
    command = Command(tmp_path, "train", config)
    command.wait_for(lambda: steps(tmp_path / "run") >= 4)
    command.send(signal.SIGTERM, group=True)
    assert command.status() == 143, command.err
    assert "Traceback" not in command.err
    assert command.err.count("stopping after this step") == 1


@pytest.mark.skipif(get_all_start_methods()[0] != "fork", reason="loaders are not forked here")
@pytest.mark.parametrize(("sent", "ends_with"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_group_while_its_loader_processes_start_is_meant_for_the_run(
    toy_model: Path, tmp_path: Path, sent: signal.Signals, ends_with: int
) -> None:
    config = write_config(
        tmp_path / "c.yaml", toy_model, *LONG, "training.dataloader_num_workers=2"
    )
    started = tmp_path / "started"
    hook = functools.partial(processes.start_children_slowly, started)
    command = Command(tmp_path, "train", config, hook=hook)
    command.wait_for(started.exists)
    command.send(sent, group=True)
    assert command.status() == ends_with, command.err
    assert "Traceback" not in command.err
    assert command.err.count("stopping after this step") == 1
    assert saved(tmp_path / "run") == [1]


def test_the_first_ctrl_c_is_graceful_and_the_second_at_once(
    toy_model: Path, tmp_path: Path
) -> None:
    slow = ("data.max_samples=200", "training.gradient_accumulation_steps=100",
            "training.max_steps=3")  # fmt: skip
    config = write_config(tmp_path / "c.yaml", toy_model, *slow, "training.save_steps=1")
    root = tmp_path / "run"
    command = Command(tmp_path, "train", config)
    command.wait_for(lambda: saved(root) == [1])
    command.send(signal.SIGINT)
    command.wait_for(lambda: "stopping after this step" in command.err)
    command.send(signal.SIGINT)
    assert command.status() == 130
    assert saved(root) == [1]
    assert verified(root / "checkpoint-1").step == 1
    assert "Traceback" not in command.err
    once = Command(tmp_path, "train", config, "--resume")
    once.wait_for(lambda: "loading the model" in once.out)
    once.send(signal.SIGINT)
    assert once.status() == 130
    assert verified(root / "checkpoint-2").step == 2


@pytest.mark.parametrize(
    "moment",
    [
        processes.die_before_the_manifest,
        processes.die_after_the_rename,
        processes.die_in_rotation,
    ],
)
def test_killed_while_saving_it_resumes_to_the_same_weights(
    toy_model: Path, tmp_path: Path, uninterrupted: Any, moment: Callable[[], None]
) -> None:
    config = write_config(tmp_path / "c.yaml", toy_model, *LONG, "training.save_total_limit=2")
    status, _ = run(tmp_path, "train", config, hook=moment)
    assert status == -signal.SIGKILL
    CheckpointStore(tmp_path / "run", None).newest(ignore)
    assert_resumes_to(uninterrupted, config)


def test_killed_at_any_moment_it_resumes_to_the_same_weights(
    toy_model: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    config, root = write_config(tmp_path / "c.yaml", toy_model, *LONG), tmp_path / "run"
    command = Command(tmp_path, "train", config)
    moment = random.randint(6, 26)
    command.wait_for(lambda: saved(root) and steps(root) >= moment)
    command.send(signal.SIGKILL)
    assert command.status() == -signal.SIGKILL
    assert_resumes_to(uninterrupted, config)


def test_killed_before_its_first_checkpoint_the_way_on_is_told(
    toy_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", toy_model, "training.max_steps=2")
    run(tmp_path, "train", config, hook=_die_at_the_first_save)
    status, command = run(tmp_path, "train", config, "--resume")
    assert status == 2
    assert "overwrite_output_dir=true" in command.err
    again = ("--set", "training.overwrite_output_dir=true")
    status, command = run(tmp_path, "train", config, *again)
    assert status == 0, command.err


def _die_at_the_first_save() -> None:
    from cpo_arabic.training import checkpoint

    checkpoint._write_manifest = lambda _folder: processes.die()


# --- disk and memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4_000, 30_000, 200_000])
def test_a_disk_full_at_any_byte_leaves_nothing_half_written(
    toy_model: Path, tmp_path: Path, size: int
) -> None:
    config = write_config(tmp_path / "c.yaml", toy_model, "training.max_steps=4")
    before = ("--set", "training.save_steps=2")
    status, command = run(
        tmp_path, "train", config, *before, hook=functools.partial(processes.limit_files, size)
    )
    assert status == 2, command.err
    assert "File too large" in command.err
    assert "Traceback" not in command.err
    root = tmp_path / "run"
    assert not (root / "final").exists()
    assert not (root / "summary.json").exists()
    for _, folder in CheckpointStore(root, None).folders():
        verified(folder)
    assert not list(root.glob(".tmp-*"))


def test_a_disk_full_for_metrics_keeps_the_checkpoints(toy_model: Path, tmp_path: Path) -> None:
    overrides = ("training.max_steps=4", "training.save_steps=2", "logging.use_tensorboard=true")
    config = write_config(tmp_path / "c.yaml", toy_model, *overrides)
    status, command = run(tmp_path, "train", config, hook=processes.fill_disk_at_metrics)
    assert status == 2
    assert "File too large" in command.err
    assert "Traceback" not in command.err
    assert saved(tmp_path / "run") == [2]
    status, command = run(tmp_path, "train", config, "--resume")
    assert status == 0, command.err
    assert [r["step"] for r in MetricsFile(tmp_path / "run" / "metrics.jsonl").read()] == [
        1, 2, 3, 4,
    ]  # fmt: skip


def test_a_disk_full_anywhere_else_is_told_with_the_file(toy_config: Make) -> None:
    config = toy_config("data.generate_during_eval=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", Path.mkdir)  # put back afterwards
        processes.no_room_for_samples()
        with pytest.raises(RunDirectoryError, match=r"samples.*No space left.*--resume"):
            train(config, SilentObserver())


def test_a_place_that_cannot_hold_a_folder_is_refused_before_anything_is_read(
    toy_config: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    config = toy_config(
        f"training.output_dir={tmp_path / 'file' / 'run'}", "data.train_file=gone.jsonl"
    )
    with pytest.raises(RunDirectoryError, match="is a file"):
        train(config, SilentObserver())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_refused_before_anything_is_read(
    toy_config: Make, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    config = toy_config(
        f"training.output_dir={tmp_path / 'locked' / 'run'}", "data.train_file=gone.jsonl"
    )
    with pytest.raises(RunDirectoryError, match="read-only"):
        train(config, SilentObserver())


def test_a_file_system_that_refuses_folders_is_told_before_the_model_loads(
    toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpo_arabic.run import model

    monkeypatch.setattr(model, "build_policy", lambda *_, **__: pytest.fail("the model loads"))
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        train(toy_config("training.output_dir=/proc/run-of-a-test"), SilentObserver())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
@pytest.mark.parametrize("where", ["step", "load"])
def test_out_of_memory_names_the_levers(
    toy_config: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    from cpo_arabic.run import training
    from cpo_arabic.training import trainer

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if where == "step":
        monkeypatch.setattr(trainer, "accumulate", fail)
    else:
        monkeypatch.setattr(training, "_engine", fail)
    with pytest.raises(TrainingError) as caught:
        train(toy_config("data.validation_file=null"), SilentObserver())
    for lever in ("batch_size (now 2", "use_gradient_checkpointing", "packed", "num_negatives"):
        assert lever in str(caught.value)


def test_another_runtime_error_is_not_called_lack_of_memory(
    toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpo_arabic.training import trainer

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(trainer, "accumulate", fail)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        train(toy_config("data.validation_file=null"), SilentObserver())


# --- gradient checkpointing -----------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient_and_every_adapter_gets_one(
    toy_config: Make,
) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = []
    for on in ("false", "true"):
        overrides = ("cpo.simcse_dropout=0", "cpo.projection_dim=8")
        bench = Bench(toy_config(f"optimization.use_gradient_checkpointing={on}", *overrides))
        calls: list[int] = []
        for module in bench.policy.modules():
            if isinstance(module, GradientCheckpointingLayer):  # its own hooks run once
                module.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append((bench.gradient([0, 1], [2, 3]), len(calls)))
    (plain, once), (checkpointed, again) = found
    assert again > once  # the layers did run a second time
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        assert value.abs().sum() > 0, name
        assert torch.allclose(value, checkpointed[name], rtol=1e-5, atol=1e-8), name


# --- tampering ------------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def resealed(folder: Path) -> None:
    """What an attacker does: a manifest that fits what was planted."""
    digests = {
        str(p.relative_to(folder)): sha256(p)
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"sha256": digests}))


@pytest.fixture
def finished(toy_config: Make) -> Callable[..., Any]:
    """A configuration whose run has one checkpoint and its final artefact."""

    def make(*overrides: str) -> Any:
        config = toy_config("training.max_steps=1", *overrides)
        train(config, SilentObserver())
        return config

    return make


@pytest.mark.parametrize("seal", ["kept", "forged"])
@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "queue.safetensors", "rng_state.pth", "adapter_model.bin"]
)
def test_a_planted_pickle_is_refused_and_never_unpickled(
    finished: Make, tmp_path: Path, name: str, seal: str
) -> None:
    config = finished("data.validation_file=null", "cpo.use_queue=true", "cpo.queue_size=12")
    folder, mark = tmp_path / "run" / "checkpoint-1", tmp_path / "mark"
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    if name == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    if seal == "forged":
        resealed(folder)
    with pytest.raises(CheckpointError):
        train(config, SilentObserver(), resume=True)
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())  # the negative control: the bomb is live
    assert mark.exists()


def test_a_pickle_as_the_final_adapter_is_never_unpickled(finished: Make, tmp_path: Path) -> None:
    config = finished()
    final, mark = tmp_path / "run" / "final", tmp_path / "mark"
    (final / "adapter_model.safetensors").unlink()
    (final / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(ModelError, match="adapter"):
        compare(config, SilentObserver())
    assert not mark.exists()


def lying(kind: str) -> bytes:
    if kind == "huge":
        return struct.pack("<Q", 2**62) + b"{}"
    spans = {"overlapping": ([0, 8], [4, 12]), "beyond the end": ([0, 8], [8, 2**40])}[kind]
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [(b - a) // 4], "data_offsets": [a, b]}
            for name, (a, b) in zip("ab", spans, strict=True)
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(12)


@pytest.mark.parametrize("kind", ["huge", "overlapping", "beyond the end"])
@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "adapter_model.safetensors", "projection_head.safetensors"]
)
def test_a_lying_safetensors_header_is_an_error(
    finished: Make, tmp_path: Path, name: str, kind: str
) -> None:
    config = finished("cpo.projection_dim=8", "data.validation_file=null")
    folder = tmp_path / "run" / "checkpoint-1"
    (folder / name).write_bytes(lying(kind))
    resealed(folder)
    with pytest.raises((CheckpointError, ModelError), match=name.partition("_")[0]):
        train(config, SilentObserver(), resume=True)


def test_a_fully_trained_model_with_a_lying_header_is_an_error(
    finished: Make, tmp_path: Path
) -> None:
    config = finished("optimization.use_lora=false")
    (tmp_path / "run" / "final" / "model.safetensors").write_bytes(lying("huge"))
    with pytest.raises(ModelError, match="final"):
        compare(config, SilentObserver())


def test_an_adapter_of_another_base_model_is_refused(
    finished: Make, toy_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    config = finished()
    twin, narrow = tmp_path / "twin", tmp_path / "narrow"
    shape = Qwen2Config.from_pretrained(toy_model)
    Qwen2ForCausalLM(shape).save_pretrained(twin)  # the same shapes, other weights
    shape.hidden_size = 16
    Qwen2ForCausalLM(shape).save_pretrained(narrow)
    for other in (twin, narrow):
        AutoTokenizer.from_pretrained(toy_model).save_pretrained(other)
        changed = config.model_copy(deep=True)
        changed.model.name = str(other)
        with pytest.raises(ModelError, match=f"trained on .*toy-model.*{other.name}"):
            compare(changed, SilentObserver())
    described = tmp_path / "run" / "final" / "adapter_config.json"
    said = json.loads(described.read_text())
    described.write_text(json.dumps({**said, "base_model_name_or_path": str(narrow)}))
    with pytest.raises(ModelError, match="adapter"):
        compare(changed, SilentObserver())


def test_an_adapter_with_foreign_tensors_is_not_loaded_in_part(
    finished: Make, tmp_path: Path
) -> None:
    config = finished("data.validation_file=null")
    folder = tmp_path / "run" / "checkpoint-1"
    tensors = load_file(folder / "optimizer.safetensors")
    save_file({**tensors, "exp_avg.stranger": torch.zeros(2)}, folder / "optimizer.safetensors")
    resealed(folder)
    with pytest.raises(CheckpointError, match="stranger"):
        train(config, SilentObserver(), resume=True)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_in_a_model_folder_does_not_run_unless_trusted(
    toy_config: Make, toy_model: Path, tmp_path: Path, part: str
) -> None:
    folder, mark = tmp_path / "coded", tmp_path / "mark"
    shutil.copytree(toy_model, folder)
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    file = folder / ("config.json" if part == "model" else "tokenizer_config.json")
    said = json.loads(file.read_text())
    if part == "model":
        said |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    else:
        said |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    file.write_text(json.dumps(said))
    # The library reads a tokenizer's plain files where it need not run code.
    refused = pytest.raises(ModelError, match="trust_remote_code")
    with refused if part == "model" else suppress(ModelError):
        train(toy_config(f"model.name={folder}", "training.max_steps=1"), SilentObserver())
    assert not mark.exists()
    assert part == "tokenizer" or not (tmp_path / "run").exists()


# --- secrets --------------------------------------------------------------------------------------


def test_no_secret_is_in_any_file_of_the_run(
    toy_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watcher(SilentObserver):
        said: list[str] = []  # noqa: RUF012

        def stage(self, text: str) -> None:
            self.said.append(text)

    secrets = ("hf_" + 17 * "Env", "hf_" + 17 * "Arg")
    monkeypatch.setenv("HF_TOKEN", secrets[0])
    for field in ("cpo.model_init_kwargs", "cpo.ref_model_init_kwargs"):
        with pytest.raises(ConfigError, match="credential") as caught:
            toy_config(f"{field}={{token: {secrets[1]}}}")
        assert secrets[1] not in str(caught.value)
    train(
        toy_config(
            f"cpo.reference_model_name={processes.DEMO / 'base-model'}",
            "cpo.precompute_ref_log_probs=true",
            "logging.use_tensorboard=true",
            "logging.log_level=debug",
            "training.max_steps=1",
        ),
        Watcher(),
    )
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {"config.yaml", "metrics.jsonl", "state.json", "README.md"} <= {p.name for p in files}
    assert any("tfevents" in p.name for p in files)
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in secrets), path
    assert not any(secret in line for secret in secrets for line in Watcher.said)
