"""Two processes on the CPU: the same run as one, stopped together, ended together."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpo_arabic.training.checkpoint import CheckpointStore
from cpo_arabic.training.metrics import MetricsFile
from cpo_arabic.training.plan import rank_share
from tests.run import processes
from tests.run.processes import run, two_ranks, write_config

slow = pytest.mark.slow

# Masks differ with the cut, as they must.
STEPS = ("cpo.simcse_dropout=0", "training.max_steps=6")
MOMENTUM = (
    "cpo.use_momentum=true", "cpo.momentum_beta=0.9", "cpo.use_queue=true", "cpo.queue_size=16",
)  # fmt: skip
HELD_OUT = f"data.validation_file={processes.DEMO / 'data' / 'heldout.jsonl'}"

CASES = {
    "contrastive": (2, ()),
    "momentum and a queue that overflows": (2, MOMENTUM),
    "a last window without rows for rank 1": (2, ("data.max_samples=10",)),
    "the same, momentum and queue": (2, (*MOMENTUM, "data.max_samples=10")),
    "a last window with unequal parts": (4, ("data.max_samples=14",)),
    "full": (2, ("optimization.use_lora=false", "training.learning_rate=1e-3")),
    "full with a projection head": (
        2,
        ("optimization.use_lora=false", "training.learning_rate=1e-3", "cpo.projection_dim=8"),
    ),
    "one held-out batch for two ranks": (2, (HELD_OUT, "training.eval_batch_size=100")),
    "precomputed reference": (
        2, ("cpo.force_use_ref_model=true", "cpo.precompute_ref_log_probs=true"),
    ),
    "loader processes": (2, ("training.dataloader_num_workers=1",)),
}  # fmt: skip


def records(root: Path) -> list[dict[str, Any]]:
    return MetricsFile(root / "metrics.jsonl").read()


def final(root: Path) -> dict[str, torch.Tensor]:
    """Everything that trained: adapter or model, and the projection head where there is one."""
    found: dict[str, torch.Tensor] = {}
    for path in (root / "final").glob("*.safetensors"):
        found |= {f"{path.stem}.{name}": value for name, value in load_file(path).items()}
    assert found
    return found


def saved(root: Path) -> list[int]:
    return [step for step, _ in CheckpointStore(root, None).folders()]


@slow
@pytest.mark.parametrize("case", CASES)
def test_the_same_global_batch_on_two_ranks_is_the_same_run(
    toy_model: Path, tmp_path: Path, case: str
) -> None:
    """Gradient norms are compared too, since AdamW would hide a wrong scale."""
    accumulated, overrides = CASES[case]
    field = "training.gradient_accumulation_steps"
    one = write_config(
        tmp_path / "one" / "c.yaml", toy_model, *STEPS, *overrides, f"{field}={accumulated}"
    )
    two = write_config(
        tmp_path / "two" / "c.yaml", toy_model, *STEPS, *overrides, f"{field}={accumulated // 2}"
    )
    status, command = run(one.parent, "train", one)
    assert status == 0, command.err
    ranks = two_ranks(two.parent, "train", two)
    assert [rank.status() for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    expected, found = records(one.parent / "run"), records(two.parent / "run")
    assert len(expected) == len(found) >= 6
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_second", "eval_runtime"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), (a["step"], name)
    weights = final(two.parent / "run")
    for name, value in final(one.parent / "run").items():
        assert torch.allclose(value, weights[name], rtol=1e-3, atol=1e-5), name
    assert "reading the data" in ranks[0].out
    assert "reading the data" not in ranks[1].out


@slow
def test_sigterm_to_one_rank_stops_both_at_the_same_step(toy_model: Path, tmp_path: Path) -> None:
    long = ("training.max_steps=40", "training.save_steps=100", *MOMENTUM)
    whole = write_config(tmp_path / "whole" / "c.yaml", toy_model, *long)
    assert [rank.status() for rank in two_ranks(whole.parent, "train", whole)] == [0, 0]
    cut = write_config(tmp_path / "cut" / "c.yaml", toy_model, *long)
    root = cut.parent / "run"
    ranks = two_ranks(cut.parent, "train", cut)
    ranks[0].wait_for(lambda: len(records(root)) >= 4)
    ranks[1].send(signal.SIGTERM)
    assert [rank.status() for rank in ranks] == [143, 143], ranks[0].err + ranks[1].err
    assert saved(root) == [len(records(root))]
    assert [rank.status() for rank in two_ranks(cut.parent, "train", cut, "--resume")] == [0, 0]
    for name, value in final(whole.parent / "run").items():
        assert torch.equal(value, final(root)[name]), name


@slow
def test_a_rank_that_is_killed_ends_the_other(toy_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", toy_model, "training.max_steps=2000")
    ranks = two_ranks(tmp_path, "train", config)
    ranks[0].wait_for(lambda: len(records(tmp_path / "run")) >= 4)
    ranks[1].send(signal.SIGKILL)
    assert ranks[1].status() == -signal.SIGKILL
    assert ranks[0].status() == 2, ranks[0].err
    assert "another process of this run has ended" in ranks[0].err


@slow
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_update_on_both(
    toy_model: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "c.yaml", toy_model, *STEPS, "training.gradient_accumulation_steps=1"
    )
    ranks = two_ranks(tmp_path, "train", config, hook=processes.poison_the_second_rank)
    assert [rank.status() for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    told = [line for line in ranks[0].out.splitlines() if line.startswith("warning")]
    assert len(told) == 1
    assert told[0].startswith("warning: step 2: the gradient norm is nan; update skipped")
    assert told[0].count(",") == 3  # the four rows of both ranks
    assert all(torch.isfinite(value).all() for value in final(tmp_path / "run").values())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_rank_after_rank_is_the_window_s_own_order(size: int, world_size: int) -> None:
    window = [[row] for row in range(size)]
    parts = [rank_share(window, rank, world_size) for rank in range(world_size)]
    assert [rows for part, counted in parts if counted for rows in part] == window
    sizes = [len(part) if counted else 0 for part, counted in parts]
    assert max(sizes) - min(sizes) <= 1
