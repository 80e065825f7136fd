"""The step's gradient: the same however the global batch is cut, and nothing done for a zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    unset_fake_temporarily,
)

from cpo_arabic.config import CPOConfig
from cpo_arabic.data.pack import PreferenceBatch
from cpo_arabic.modeling.encoder import EmbeddingQueue, MomentumEncoder
from cpo_arabic.modeling.policy import Policy, PolicyOutput, Wanted
from cpo_arabic.modeling.precompute import PrecomputedReference
from cpo_arabic.run import data as run_data
from cpo_arabic.run import model as run_model
from cpo_arabic.training import step as step_module
from cpo_arabic.training.engine import Engine, MicroBatch, prepare
from cpo_arabic.training.plan import Share
from cpo_arabic.training.rehearsal import Rehearsal
from cpo_arabic.training.step import accumulate

ROWS = list(range(6))


class Bench:
    """A policy in float64 with its rows, and the gradient of a step over them."""

    def __init__(self, config: CPOConfig) -> None:
        tokenizer = run_model.tokenizer_of(config)
        self.policy: Policy = run_model.build_policy(config, tokenizer).double().train()
        # LoRA's B starts at zero, which hides half of the gradients.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.policy.trainable().values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.02 * noise)
        records = run_data.read(config)
        self.groups = run_data.groups(config, run_data.tokenize(config, records.train, tokenizer))
        self.collate = run_data.collation(config, tokenizer)
        accelerator = Accelerator(cpu=True)
        self.engine = Engine(
            accelerator=accelerator,
            policy=accelerator.prepare(self.policy),
            objective=run_model.objective_of(config),
            reference=run_model.build_reference(config, self.policy, tokenizer),
            momentum=None,
            queue=None,
            seed=config.training.seed,
        )

    def share(self, *micro_batches: list[int]) -> Share:
        batches = [self.collate([self.groups.group(r, 0) for r in rows]) for rows in micro_batches]
        return Share(batches=batches, rows=list(micro_batches), counted=True)

    def gradient(self, *micro_batches: list[int]) -> dict[str, torch.Tensor]:
        self.policy.zero_grad()
        accumulate(self.engine, self.share(*micro_batches), step=0)
        parameters = self.policy.trainable()
        return {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


@pytest.fixture
def bench(toy_config: Callable[..., Any]) -> Callable[..., Bench]:
    def make(*overrides: str) -> Bench:
        # Masks differ with the cut, as they must; they are tested apart.
        return Bench(toy_config("cpo.simcse_dropout=0", *overrides))

    return make


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        # Log-probabilities and transformers' norms compute in float32.
        assert torch.allclose(value, b[name], rtol=1e-3, atol=1e-6), name


CUTS = [
    ([0], [1], [2], [3], [4], [5]),
    ([0, 1], [2, 3], [4, 5]),
    ([0, 1, 2, 3], [4, 5]),  # the short last one
]


@pytest.mark.parametrize("cut", CUTS, ids=["singles", "pairs", "short-last"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("cpo.projection_dim=8", "cpo.loss_type=sigmoid"),
        ("cpo.contrastive_weight=0",),
        ("cpo.preference_weight=0",),
        ("cpo.preference_weight=0", "cpo.cpo_alpha=0"),
        ("cpo.force_use_ref_model=true",),
        ("optimization.use_lora=false",),
        ("data.padding=longest",),
    ],
    ids=lambda o: ",".join(o) or "defaults",
)
def test_micro_batches_give_the_gradient_of_one_batch(
    bench: Callable[..., Bench], overrides: tuple[str, ...], cut: tuple[list[int], ...]
) -> None:
    made = bench(*overrides)
    assert_same(made.gradient(*cut), made.gradient(ROWS))


def test_means_of_micro_batch_means_would_be_caught(bench: Callable[..., Bench]) -> None:
    """The negative control: dividing each micro-batch by itself gives another gradient."""
    made = bench("cpo.contrastive_weight=0")
    naive: dict[str, torch.Tensor] = {}
    for rows in ([0, 1, 2, 3], [4, 5]):
        for name, value in made.gradient(rows).items():
            naive[name] = naive.get(name, torch.zeros_like(value)) + value / 2
    with pytest.raises(AssertionError):
        assert_same(naive, made.gradient(ROWS))


def test_with_momentum_and_queue_the_cut_changes_nothing(bench: Callable[..., Bench]) -> None:
    made = bench()
    parameters = made.policy.trainable()
    made.engine = replace(
        made.engine, momentum=MomentumEncoder(parameters, 0.9), queue=EmbeddingQueue(7)
    )
    assert made.engine.queue is not None
    generator = torch.Generator().manual_seed(2)
    queued = torch.randn(7, 32, generator=generator, dtype=torch.float64)
    made.engine.queue.push(queued / queued.norm(dim=1, keepdim=True), torch.arange(21).view(7, 3))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.1)  # the momentum weights are now others
    assert_same(made.gradient([0, 1], [2, 3], [4, 5]), made.gradient(ROWS))


def test_one_optimizer_step_of_sgd_lowers_the_loss(bench: Callable[..., Bench]) -> None:
    """The gradient is that of the reported loss: a small step along it lowers it as predicted."""
    made = bench("cpo.contrastive_weight=0")
    gradient = made.gradient(ROWS)
    before = _loss(made)
    size, squared = 1e-3, sum(float(g.square().sum()) for g in gradient.values())
    with torch.no_grad():
        for name, parameter in made.policy.trainable().items():
            parameter.sub_(size * gradient[name])
    assert _loss(made) == pytest.approx(before - size * squared, rel=1e-3, abs=1e-5)


def test_a_term_of_weight_zero_is_not_computed(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Wanted] = []
    forward = Policy.forward

    def spy(self: Policy, batch: Any, wanted: Wanted, seed: int | None = None) -> PolicyOutput:
        asked.append(wanted)
        return forward(self, batch, wanted, seed)

    monkeypatch.setattr(Policy, "forward", spy)
    bench("cpo.contrastive_weight=0").gradient([0], [1])
    assert asked == [Wanted(log_probs=True)] * 2
    asked.clear()
    bench("cpo.preference_weight=0", "cpo.cpo_alpha=0").gradient([0, 1])
    assert asked == [Wanted(only_chosen=True, queries=True, keys=True)]
    asked.clear()
    bench("cpo.preference_weight=0", "cpo.contrastive_weight=0").gradient([0, 1])
    assert asked == [Wanted(log_probs=True, only_chosen=True)]


def test_simcse_masks_are_the_same_in_both_passes_over_a_micro_batch(
    toy_config: Callable[..., Any],
) -> None:
    made = Bench(toy_config("cpo.simcse_dropout=0.3"))
    assert_same(made.gradient([0, 1], [2, 3]), made.gradient([0, 1], [2, 3]))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("cpo.contrastive_weight=0",),
        ("cpo.preference_weight=0",),
        ("cpo.force_use_ref_model=true",),
        ("cpo.force_use_ref_model=true", "cpo.precompute_ref_log_probs=true"),
        ("data.padding=longest",),
        ("model.attn_implementation=eager",),
    ],
    ids=lambda o: ",".join(o) or "defaults",
)
def test_a_step_reads_nothing_back_from_its_device(
    bench: Callable[..., Bench], overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that have no values: whatever waited for one, or for a shape, raises."""
    made = bench("cpo.simcse_dropout=0.1", *overrides)
    if "cpo.precompute_ref_log_probs=true" in overrides:
        rows = torch.tensor([r for r in ROWS for _ in made.groups.group(r, 0).completion_keys])
        keys = torch.tensor([key for r in ROWS for key in made.groups.group(r, 0).completion_keys])
        made.engine.reference = PrecomputedReference(rows, keys, torch.zeros(len(rows)))
    rehearsal = Rehearsal(vocabulary=0, scale=1.0)
    rehearsal.embody(made.policy, "cpu")

    def emptied(batch: PreferenceBatch, device: torch.device) -> MicroBatch:
        with unset_fake_temporarily():  # the host's own work
            found = prepare(batch, device)
        on_host = {name for name, value in vars(batch.to("meta")).items() if _is_on(value, "cpu")}
        sent = {n: _without_values(v) for n, v in vars(found.batch).items() if n not in on_host}
        tables = {n: _without_values(v) for n, v in vars(found).items() if n != "batch"}
        return replace(found, batch=replace(found.batch, **sent), **tables)

    monkeypatch.setattr(step_module, "prepare", emptied)
    share = made.share([0, 1], [2, 3])
    with rehearsal.fake:
        sums, _ = accumulate(made.engine, share, step=0)
    assert all(p.grad is not None for p in made.policy.trainable().values())
    with rehearsal.fake, pytest.raises(DataDependentOutputException):
        sums.means()  # the negative control: a record does read


def _is_on(value: object, kind: str) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == kind


def _without_values(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, torch.Tensor) else value


def _loss(made: Bench) -> float:
    sums, _ = accumulate(made.engine, made.share(ROWS), step=0)
    means = sums.means()
    return means["preference_loss"] + means["nll_loss"]


@pytest.mark.parametrize("padding", ["packed", "longest", "max_length"])
def test_the_fill_ratio_is_that_of_all_positions_of_the_step(
    bench: Callable[..., Bench], padding: str
) -> None:
    built = bench(f"data.padding={padding}")
    share = built.share([0, 1, 2], [3, 4])
    sums, _ = accumulate(built.engine, share, step=0)
    tokens = 0
    for row in range(5):
        group = built.groups.group(row, 0)
        copies = 1 if padding == "packed" else len(group.completion_ids)
        tokens += copies * len(group.prompt_ids) + sum(map(len, group.completion_ids))
    positions = sum(batch.input_ids.numel() for batch in share.batches)
    assert sums.means()["fill_ratio"] == pytest.approx(tokens / positions)
