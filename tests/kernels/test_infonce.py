"""InfoNCE: exact, blind to order and tiling, never the whole matrix, on every backend."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from cpo_arabic.kernels import infonce
from cpo_arabic.kernels.infonce import TILE_ELEMENTS
from cpo_arabic.kernels.reference import excluded_pairs

from .cases import ContrastCase, LargestTensor, gradients, relative, saved_shapes

# ragged against every tile size; one query; no queue
SHAPES = [(9, 27, 301, 16), (1, 3, 130, 5), (17, 40, 0, 33)]
FORMS: list[dict[str, Any]] = [
    {},
    {"margin": 0.3, "temperature": 0.07},
    {"concentration": 0.5},
    {"margin": 0.2, "concentration": 4.0, "temperature": 0.5},
]


def similar(similarities: list[float], **options: Any) -> float:
    """Loss of one query whose similarities are given, the positive's first."""
    n = len(similarities)
    labels = torch.tensor([[0, 0, i] for i in range(n)])
    output = infonce(
        torch.ones(1, 1),
        torch.tensor(similarities)[:, None],
        torch.tensor([0]),
        query_labels=labels[:1],
        key_labels=labels,
        **options,
    )
    return output.loss.item()


def test_a_worked_example_comes_out() -> None:
    """z⁺ = 1, one negative at 0: log(1 + e⁻¹); the same from (1 − 0.5)/0.5."""
    expected = math.log1p(math.exp(-1))
    assert similar([1.0, 0.0], temperature=1.0) == pytest.approx(expected)
    assert similar([1.0, 0.0], temperature=0.5, margin=0.5) == pytest.approx(expected)


def test_concentration_weights_the_hard_negative_as_worked_by_hand() -> None:
    """Negatives 0 and 1, τ = 1, β = 1: weights 2/(1+e) and 2e/(1+e), so Σ w e^s = 2(1+e²)/(1+e)."""
    weighted = 2 * (1 + math.e**2) / (1 + math.e)
    expected = math.log(1 + weighted / math.e)
    got = similar([1.0, 0.0, 1.0], temperature=1.0, concentration=1.0)
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("wanted", ["q", "k", "qk"])
@pytest.mark.parametrize(("form", "tile"), list(product(FORMS, [None, 7])))
def test_every_gradient_alone_and_together_equals_autograd_of_the_definition(
    form: dict[str, Any], wanted: str, tile: int | None
) -> None:
    case = ContrastCase.random(9, 27, 301, 16, **form)
    inputs = case.inputs(wanted)
    upstream = torch.randn(9, dtype=torch.float64)
    truth, value = case.run(backend="eager"), case.run(backend="tiled", tile=tile)
    for got, expected in zip(value, truth, strict=True):
        assert relative(got, expected) < 1e-13
    for got, expected in zip(
        gradients(value.loss, inputs, upstream),
        gradients(truth.loss, inputs, upstream),
        strict=True,
    ):
        assert relative(got, expected) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_passes(form: dict[str, Any]) -> None:
    case = ContrastCase.random(4, 11, 30, 3, **form)

    def function(queries: Tensor, keys: Tensor) -> Tensor:
        return replace(case, queries=queries, keys=keys).run(tile=8).loss

    assert torch.autograd.gradcheck(function, case.inputs("qk"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_error_is_no_larger_than_the_definitions(
    shape: tuple[int, int, int, int],
    form: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    case = ContrastCase.random(*shape, **form).to(dtype, device)
    exact = case.to(torch.float64)
    upstream = torch.randn(shape[0], dtype=torch.float64, device=device)
    results = []
    for each, name in ((exact, "eager"), (case, "eager"), (case, backend)):
        inputs = each.inputs("qk")
        output = each.run(backend=name)
        results.append([*output, *gradients(output.loss, inputs, upstream)])
    slack = 1e-6 if dtype == torch.float32 else 1e-4
    assert results[2][0].dtype == torch.float32
    for truth, eager, ours in zip(*results, strict=True):
        assert relative(ours, truth) <= relative(eager, truth) + slack


@pytest.mark.parametrize("concentration", [0.0, 1.0])
def test_a_dominating_positive_keeps_its_small_loss_and_gradient(
    concentration: float, backend: str, device: torch.device
) -> None:
    """At τ = 0.02 the loss is about e⁻⁴⁰; log-softmax in float32 would say 0."""
    case = ContrastCase.random(6, 12, 40, 64, temperature=0.02, concentration=concentration)
    keys = torch.cat([normalize(case.queries + 0.02 * case.keys[:6], dim=1), case.keys[6:]])
    case = replace(case, keys=keys).to(torch.float32, device)
    exact = case.to(torch.float64)
    upstream = torch.ones(6, device=device)
    inputs, exact_inputs = case.inputs("qk"), exact.inputs("qk")
    ours, truth = case.run(backend=backend), exact.run(backend="eager")
    assert 0 < float(truth.loss.detach().max()) < 1e-9
    assert relative(ours.loss, truth.loss) < 1e-5
    for got, expected in zip(
        gradients(ours.loss, inputs, upstream),
        gradients(truth.loss, exact_inputs, upstream),
        strict=True,
    ):
        assert relative(got, expected) < 1e-5


@settings(max_examples=20, deadline=None)
@given(
    b=st.integers(1, 7),
    extra=st.integers(0, 9),
    q=st.integers(0, 40),
    d=st.integers(1, 6),
    tile=st.integers(1, 50),
    concentration=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_the_definition(
    b: int, extra: int, q: int, d: int, tile: int, concentration: float, seed: int
) -> None:
    case = ContrastCase.random(b, b + extra, q, d, seed=seed, concentration=concentration)
    inputs = case.inputs("qk")
    upstream = torch.randn(b, dtype=torch.float64)
    truth, value = case.run(backend="eager"), case.run(tile=tile)
    for got, expected in zip(value, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for got, expected in zip(
        gradients(value.loss, inputs, upstream),
        gradients(truth.loss, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_the_negatives_does_not_matter(form: dict[str, Any], backend: str) -> None:
    case = ContrastCase.random(5, 15, 60, 8, **form).to(torch.float32)
    assert case.queue is not None
    assert case.queue_labels is not None
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    keys = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    shuffled = replace(
        case,
        queue=case.queue[order],
        queue_labels=case.queue_labels[order],
        keys=case.keys[keys],
        key_labels=case.key_labels[keys],
        positives=keys.argsort()[:5],
    )
    for got, expected in zip(shuffled.run(backend=backend), case.run(backend=backend), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tile", [1, 13, 64, 1000])
def test_the_tile_size_does_not_matter(tile: int) -> None:
    case = ContrastCase.random(5, 15, 200, 8, concentration=0.5, margin=0.1)
    for got, expected in zip(case.run(tile=tile), case.run(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_how_the_queue_is_searched_for_what_a_query_must_not_see_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In parts, and by low bits that all labels share."""
    module = importlib.import_module("cpo_arabic.kernels.infonce")
    for factor in (1, 1 << 40):
        case = ContrastCase.random(4, 12, 90, 8)
        assert case.queue_labels is not None
        labels = (case.query_labels, case.key_labels, case.queue_labels)
        own, keys, queue = (each * factor for each in labels)
        case = replace(case, query_labels=own, key_labels=keys, queue_labels=queue)
        excluded = excluded_pairs(own, queue)
        assert excluded[:, :50].any() and excluded[:, 50:].any() and not excluded.all(0).any()
        truth = case.run(backend="eager").loss
        for at_once in (7, 1 << 16):
            monkeypatch.setattr(module, "SUSPECTS_AT_ONCE", at_once)
            assert relative(case.run(backend="tiled").loss, truth) < 1e-13


def test_two_halves_of_the_queue_add_up() -> None:
    """exp(loss) − 1 = Σ_j e^{l_j − z⁺} is additive over negatives; the live keys count twice."""
    case = ContrastCase.random(5, 15, 90, 8)
    assert case.queue is not None
    assert case.queue_labels is not None
    first = replace(case, queue=case.queue[:37], queue_labels=case.queue_labels[:37])
    second = replace(case, queue=case.queue[37:], queue_labels=case.queue_labels[37:])
    alone = replace(case, queue=None, queue_labels=None)
    total, a, b, keys = (each.run().loss.expm1() for each in (case, first, second, alone))
    torch.testing.assert_close(total, a + b - keys, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reason", ["same text", "same prompt in another group"])
def test_a_masked_key_changes_nothing(form: dict[str, Any], reason: str, backend: str) -> None:
    """The added key is the query itself, the hardest negative there could be."""
    case = ContrastCase.random(1, 4, 30, 8, **form).to(torch.float32)
    group, prompt, text = case.query_labels[0].tolist()
    label = [7, 10**6, text] if reason == "same text" else [group + 1, prompt, 10**6]
    queue_label = [-1, *label[1:]]
    assert case.queue is not None
    assert case.queue_labels is not None
    more = replace(
        case,
        keys=torch.cat([case.keys, case.queries]),
        key_labels=torch.cat([case.key_labels, torch.tensor([label])]),
        queue=torch.cat([case.queue, case.queries]),
        queue_labels=torch.cat([case.queue_labels, torch.tensor([queue_label])]),
    )
    inputs, more_inputs = case.inputs("qk"), more.inputs("q")
    before, after = case.run(backend=backend), more.run(backend=backend)
    for got, expected in zip(after, before, strict=True):
        torch.testing.assert_close(got, expected)
    (gradient,) = gradients(after.loss, more_inputs, torch.ones(1))
    torch.testing.assert_close(gradient, gradients(before.loss, inputs, torch.ones(1))[0])


def test_another_group_with_another_prompt_is_a_negative() -> None:
    """Without this, masking everything would pass the test above."""
    case = ContrastCase.random(1, 4, 0, 8)
    more = replace(
        case,
        keys=torch.cat([case.keys, case.queries]),
        key_labels=torch.cat([case.key_labels, torch.tensor([[5, 10**6, 10**6]])]),
    )
    assert more.run().loss.item() > case.run().loss.item() + 0.1
    assert more.run().hardest_negative.item() == pytest.approx(1.0)


def test_the_positive_is_no_negative_whatever_its_labels_say(
    backend: str, device: torch.device
) -> None:
    case = ContrastCase.random(5, 15, 20, 8, concentration=0.5).to(torch.float32, device)
    case.query_labels[:, 2] = 10**6 + torch.arange(5, device=device)
    inputs = case.inputs("qk")
    truth, value = case.run(backend="eager"), case.run(backend=backend)
    for got, expected in zip(value, truth, strict=True):
        torch.testing.assert_close(got, expected)
    ones = torch.ones(5, device=device)
    for got, expected in zip(
        gradients(value.loss, inputs, ones), gradients(truth.loss, inputs, ones), strict=True
    ):
        torch.testing.assert_close(got, expected)
    assert (value.hardest_negative < 0.99).all()
    near = replace(case, keys=torch.cat([case.queries, case.keys[5:]]))
    assert (near.run(backend=backend).hardest_negative < 0.99).all()


def test_an_empty_queue_is_no_queue(backend: str) -> None:
    case = ContrastCase.random(5, 15, 0, 8, concentration=0.5).to(torch.float32)
    empty = replace(
        case, queue=torch.empty(0, 8), queue_labels=torch.empty(0, 3, dtype=torch.int64)
    )
    for got, expected in zip(empty.run(backend=backend), case.run(backend=backend), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_query_without_negatives_costs_nothing(form: dict[str, Any], backend: str) -> None:
    """Query 0's text is everyone's text; query 1 is an ordinary one beside it."""
    case = ContrastCase.random(2, 5, 20, 8, **form).to(torch.float32)
    assert case.queue_labels is not None
    case.query_labels[0, 2] = 77
    case.key_labels[:, 2] = 77
    case.queue_labels[:, 2] = 77
    inputs = case.inputs("qk")
    output = case.run(backend=backend)
    queries, keys = gradients(output.loss, inputs, torch.ones(2))
    assert output.loss[0].item() == 0.0
    assert output.hardest_negative[0].item() == -math.inf
    assert not queries[0].any()
    assert queries[1].any()
    assert torch.isfinite(queries).all()
    assert torch.isfinite(keys).all()


@pytest.mark.parametrize(("storage", "stated"), [("bfloat16", 2e-3), ("int8", 6e-3)])
def test_a_compact_queue_stays_within_its_stated_error(
    storage: str, stated: float, backend: str, device: torch.device
) -> None:
    """A bf16 element is off by up to 2⁻⁹ of itself, an int8 one by 1/254 of its row's largest."""
    case = ContrastCase.random(8, 24, 500, 64).to(torch.float32, device)
    assert case.queue is not None
    if storage == "int8":
        scale = case.queue.abs().amax(1) / 127
        stored = (case.queue / scale[:, None]).round().to(torch.int8)
        compact = replace(case, queue=stored, queue_scale=scale)
    else:
        compact = replace(case, queue=case.queue.bfloat16())
    inputs = case.inputs("q")
    full, small = case.run(backend=backend), compact.run(backend=backend)
    ones = torch.ones(8, device=device)
    assert relative(small.loss, full.loss) < stated
    assert (
        relative(gradients(small.loss, inputs, ones)[0], gradients(full.loss, inputs, ones)[0])
        < stated
    )
    exact = compact.run(backend="eager")
    torch.testing.assert_close(small.loss, exact.loss, rtol=1e-5, atol=1e-6)


def test_a_compact_queue_is_never_written_to() -> None:
    case = ContrastCase.random(8, 24, 500, 64).to(torch.float32)
    assert case.queue is not None
    before = case.queue.clone()
    case.inputs("qk")
    case.run().loss.sum().backward()
    assert torch.equal(case.queue, before)


@pytest.mark.parametrize("concentration", [0.0, 1.0])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_no_queries_by_keys_matrix_exists(concentration: float, storage: torch.dtype) -> None:
    case = ContrastCase.random(64, 192, 40000, 8, concentration=concentration).to(torch.float32)
    assert case.queue is not None
    case = replace(case, queue=case.queue.to(storage))
    inputs = case.inputs("qk")
    with LargestTensor() as largest:
        # the queue's own (Q, D) storage is an input; slices of it are seen, so it bounds the test
        gradients(case.run().loss, inputs, torch.ones(64))
    assert largest.elements <= max(TILE_ELEMENTS, 40000 * 8) < 64 * 40000 / 4


def test_what_is_saved_does_not_grow_with_the_queue() -> None:
    sizes = []
    for q in (10, 5000):
        case = ContrastCase.random(8, 24, q, 16)
        case.inputs("qk")
        with saved_shapes() as shapes:
            case.run()
        sizes.append(shapes)
    assert sizes[0] == sizes[1]


def test_the_momentum_encoders_keys_cost_no_backward_pass() -> None:
    case = ContrastCase.random(8, 24, 100, 16)
    (queries,) = case.inputs("q")
    loss = case.run().loss.sum()
    with LargestTensor() as largest:
        loss.backward()
    assert queries.grad is not None
    assert largest.elements <= 8 * 16


def test_backward_may_run_twice_and_the_output_be_used_twice() -> None:
    case = ContrastCase.random(8, 24, 100, 16, concentration=0.5)
    inputs = case.inputs("qk")
    loss = case.run().loss
    ones = torch.ones(8)
    once = gradients(loss, inputs, ones, retain_graph=True)
    again = gradients(loss, inputs, ones, retain_graph=True)
    doubled = gradients(loss + loss, inputs, ones)
    for first, second, twice in zip(once, again, doubled, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(twice, 2 * first)


def test_only_the_loss_carries_a_gradient() -> None:
    case = ContrastCase.random(8, 24, 100, 16)
    case.inputs("qk")
    output = case.run()
    assert output.loss.requires_grad
    assert not output.hardest_negative.requires_grad
    assert not output.positive_similarity.requires_grad
    with torch.no_grad():
        assert not case.run().loss.requires_grad


def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    case = ContrastCase.random(8, 24, 100, 16, concentration=0.5).to(torch.float32, device)
    inputs = case.inputs("qk")
    ones = torch.ones(8, device=device)
    outside = case.run(backend=backend)
    grads = gradients(outside.loss, inputs, ones)
    with torch.autocast(device.type, torch.bfloat16):
        inside = case.run(backend=backend)
        grads_inside = gradients(inside.loss, inputs, ones)
    assert all(map(torch.equal, outside, inside))
    assert all(map(torch.equal, grads, grads_inside))


def test_gradients_come_in_their_inputs_dtypes() -> None:
    case = ContrastCase.random(8, 24, 100, 16).to(torch.bfloat16)
    mixed = replace(case, keys=case.keys.float())
    inputs = mixed.inputs("qk")
    found = [g.dtype for g in gradients(mixed.run().loss, inputs, torch.ones(8))]
    assert found == [torch.bfloat16, torch.float32]


def test_inputs_that_do_not_fit_are_named() -> None:
    case = ContrastCase.random(4, 8, 10, 6)
    assert case.queue is not None
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keys": torch.ones(8, 5)}, r"queries \(4, 6\) and keys \(8, 5\)"),
        ({"positives": torch.zeros(3, dtype=torch.long)}, r"positives must be \(4,\) int64"),
        ({"key_labels": case.key_labels[:, :2]}, r"key_labels must be \(8, 3\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"concentration": -1.0}, "concentration not negative"),
        ({"queue_labels": None}, "a queue needs queue_labels"),
        ({"queue": None}, "go with a queue"),
        ({"queue": torch.ones(10, 5)}, r"queue must be \(Q, 6\)"),
        ({"queue": case.queue.to(torch.int8)}, "an int8 queue, and no other"),
        ({"queue_scale": torch.ones(10)}, "an int8 queue, and no other"),
        ({"queue": case.queue.clone().requires_grad_()}, "pass it detached"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            replace(case, **change).run()
    with pytest.raises(ValueError, match="backend must be"):
        case.run(backend="cuda")
