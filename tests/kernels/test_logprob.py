"""Token log-probabilities: exact, in every mode, on every backend."""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cpo_arabic.kernels import logprob, products, token_log_probs
from cpo_arabic.kernels.common import choose_backend
from cpo_arabic.training.footprint import head_work

from .cases import AllocatedBytes, HeadCase, LargestTensor, gradients, relative, saved_shapes

# ragged against every tile size, a single token, a vocabulary smaller than a tile
SHAPES = [(37, 16, 1301), (1, 7, 513), (70, 33, 50)]
SUBSETS = ["h", "w", "b", "hw", "hb", "wb", "hwb"]
FORMS: list[dict[str, Any]] = [
    {},
    {"with_bias": True},
    {"softcap": 1.5},
    {"scale": 0.3},
    {"with_bias": True, "softcap": 2.0, "scale": 1.7},
]
FORMS_AND_SUBSETS = [
    (form, wanted)
    for form, wanted in product(FORMS, SUBSETS)
    if "b" not in wanted or "with_bias" in form
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row tiles and vocabulary tiles at test size."""
    monkeypatch.setattr(logprob, "TILE_ROWS", 16)
    monkeypatch.setattr(logprob, "TILE_ELEMENTS", 16 * 100)
    monkeypatch.setattr(logprob, "TILE_TOKENS", (8, 100))


def test_a_worked_example_comes_out() -> None:
    """h = 1, W = (0, log 2, log 5): probabilities 1/8, 2/8, 5/8."""
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    got = token_log_probs(torch.ones(3, 1), weight, torch.arange(3))
    torch.testing.assert_close(got, torch.tensor([1 / 8, 2 / 8, 5 / 8]).log())


def test_cap_and_scale_apply_in_their_order() -> None:
    """2·(h·W + b) = (0, 2), capped at 1: (0, tanh 2); log p_1 = −log(1 + exp(−tanh 2))."""
    got = token_log_probs(
        torch.ones(1, 1),
        torch.tensor([[0.0], [0.5]]),
        torch.tensor([1]),
        bias=torch.tensor([0.0, 0.5]),
        softcap=1.0,
        scale=2.0,
    )
    assert got.item() == pytest.approx(-math.log1p(math.exp(-math.tanh(2.0))))


@pytest.mark.parametrize(("features", "budget"), [(5, 0), (5, 5000), (5, 1 << 30), (40, 0)])
@pytest.mark.parametrize(("form", "wanted"), FORMS_AND_SUBSETS)
@pytest.mark.usefixtures("small_tiles")
def test_every_gradient_alone_and_together_equals_autograd_of_the_definition(
    form: dict[str, Any], wanted: str, features: int, budget: int
) -> None:
    case = HeadCase.random(37, features, 301, **form)
    inputs = case.inputs(wanted)
    upstream = torch.randn(37, dtype=torch.float64)
    truth = case.run(backend="eager")
    value = case.run(memory_budget=budget, backend="tiled")
    assert relative(value, truth) < 1e-13
    for got, expected in zip(
        gradients(value, inputs, upstream), gradients(truth, inputs, upstream), strict=True
    ):
        assert relative(got, expected) < 1e-12


@pytest.mark.parametrize(("form", "budget"), list(product(FORMS, [0, 3000])))
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck_passes(form: dict[str, Any], budget: int) -> None:
    case = HeadCase.random(5, 3, 21, **form)
    inputs = case.inputs("hwb")

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        bias = tensors[2] if len(tensors) > 2 else None
        return token_log_probs(
            tensors[0], tensors[1], case.targets,
            bias=bias, softcap=case.softcap, scale=case.scale, memory_budget=budget,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", ["h", "hwb"])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[-1]])
def test_the_error_is_no_larger_than_the_definitions(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    wanted: str,
    form: dict[str, Any],
    backend: str,
    device: torch.device,
) -> None:
    case = HeadCase.random(*shape, **form).to(dtype, device)
    exact = case.to(torch.float64)
    upstream = torch.randn(shape[0], dtype=torch.float64, device=device)
    results = []
    for each, name in ((exact, "eager"), (case, "eager"), (case, backend)):
        inputs = each.inputs(wanted)
        output = each.run(backend=name)
        results.append([output, *gradients(output, inputs, upstream)])
    slack = 1e-6 if dtype == torch.float32 else 1e-4
    assert results[2][0].dtype == torch.float32
    for truth, eager, ours in zip(*results, strict=True):
        assert relative(ours, truth) <= relative(eager, truth) + slack


def test_bfloat16_log_probabilities_keep_float32_accumulation() -> None:
    """Against the same rounded inputs in float64; rounding logits to bf16 costs 1e-3 and more."""
    case = HeadCase.random(64, 256, 2000).to(torch.bfloat16)
    truth = case.to(torch.float64).run(backend="eager")
    assert relative(case.run(), truth) < 1e-6 < 1e-4 < relative(case.run(backend="eager"), truth)


def test_a_sure_model_keeps_its_small_gradient(backend: str, device: torch.device) -> None:
    """Logits (12, 0, 0, …): 1 − p ≈ 6e-5 is computed, not left over from a subtraction."""
    case = HeadCase.random(8, 16, 12, seed=3)
    logits = torch.zeros(8, 12, dtype=torch.float64)
    logits.scatter_(1, case.targets[:, None], 12.0)
    hidden = logits @ torch.linalg.pinv(case.weight).T
    case = HeadCase(hidden, case.weight, case.targets).to(torch.float32, device)
    exact = case.to(torch.float64)
    upstream = torch.ones(8)
    inputs = exact.inputs("h")
    truth = gradients(exact.run(backend="eager"), inputs, upstream.to(device))
    inputs = case.inputs("h")
    ours = gradients(case.run(backend=backend), inputs, upstream.to(device))
    eager = gradients(case.run(backend="eager"), inputs, upstream.to(device))
    assert relative(ours[0], truth[0]) < 5e-6
    assert relative(ours[0], truth[0]) < relative(eager[0], truth[0])


@settings(max_examples=20, deadline=None)
@given(
    t=st.integers(0, 40),
    d=st.integers(1, 9),
    v=st.integers(1, 70),
    budget=st.integers(0, 9000),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_the_definition(
    t: int, d: int, v: int, budget: int, seed: int
) -> None:
    case = HeadCase.random(t, d, v, seed=seed, with_bias=True)
    inputs = case.inputs("hwb")
    upstream = torch.randn(t, dtype=torch.float64)
    truth, value = case.run(backend="eager"), case.run(memory_budget=budget)
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)
    for got, expected in zip(
        gradients(value, inputs, upstream), gradients(truth, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("wanted", "budget"), [("h", 0), ("hw", 0), ("hw", 1 << 20)])
def test_no_tokens_by_vocabulary_matrix_exists(wanted: str, budget: int) -> None:
    case = HeadCase.random(700, 8, 9000).to(torch.float32)
    inputs = case.inputs(wanted)
    with LargestTensor() as largest:
        gradients(case.run(memory_budget=budget), inputs, torch.ones(700))
    assert largest.elements <= logprob.TILE_ELEMENTS < 700 * 9000 / 5


def test_a_frozen_head_saves_one_row_per_token_and_nothing_else() -> None:
    case = HeadCase.random(50, 8, 3000).to(torch.float32)
    case.inputs("h")
    with saved_shapes() as shapes:
        case.run()
    assert shapes == [(50, 8)]


def test_beside_its_gradient_a_trained_head_keeps_no_more_than_its_budget() -> None:
    """Those of the first 8 rows, as many as there are features, wait in the gradient's memory."""
    case = HeadCase.random(50, 8, 30000).to(torch.float32)
    case.inputs("hw")
    sizes = {}
    for budget in (0, 2 << 20, 1 << 30):
        with saved_shapes() as shapes:
            case.run(memory_budget=budget)
        tiles = (s for s in shapes if len(s) == 2 and s[1] not in (8, 50))  # inputs, maxima
        sizes[budget] = 4 * sum(t * v for t, v in tiles)
    assert sizes[0] == 0
    assert 1 << 20 < sizes[2 << 20] <= 2 << 20
    assert sizes[1 << 30] == 4 * (50 - 8) * 30000


@pytest.mark.parametrize("wanted", ["h", "hw"])
@pytest.mark.parametrize(
    ("rows", "dtype", "budget", "lodged"),
    [
        (24, torch.float32, 0, 24),
        (100, torch.float32, 0, 32),
        (100, torch.float32, 4 * 68 * 3000, 32),
        (100, torch.bfloat16, 0, 16),
        (100, torch.float64, 0, 32),
    ],
)
def test_the_work_is_what_the_estimate_counts(
    rows: int,
    dtype: torch.dtype,
    budget: int,
    lodged: int,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three products over W, and a fourth only for logits that nothing keeps."""
    done = 0
    multiply = logprob.multiply

    def counted(left: torch.Tensor, right: torch.Tensor, *rest: Any, **options: Any) -> None:
        nonlocal done
        done += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        multiply(left, right, *rest, **options)

    monkeypatch.setattr(logprob, "multiply", counted)
    case = HeadCase.random(rows, 32, 3000).to(dtype)
    inputs = case.inputs(wanted)
    gradients(case.run(memory_budget=budget), inputs, torch.ones(rows))
    trained = wanted == "hw"
    assert logprob.lodged_rows(rows, 32, dtype.itemsize, max(4, dtype.itemsize)) == lodged
    assert done == head_work(rows, 32, 3000, trained=trained, lodged=lodged, budget=budget)


@pytest.mark.parametrize("by_onednn", [False, True])
def test_logits_in_the_memory_of_the_gradient_need_none_of_their_own(
    by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward allocate the gradient, a tile and what is small.

    oneDNN allocates each product as well, and holds one of them at a time.
    """
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: by_onednn)
    case = HeadCase.random(64, 64, 30000).to(torch.float32)
    inputs = case.inputs("hw")
    with AllocatedBytes() as allocated:
        gradients(case.run(memory_budget=0), inputs, torch.ones(64))
    gradient, tile = 4 * 64 * 30000, 4 * logprob.TILE_ELEMENTS
    held = allocated.peak if by_onednn else allocated.total
    assert gradient < held <= gradient + 2 * tile


def test_nothing_is_saved_without_a_gradient() -> None:
    case = HeadCase.random(9, 4, 30)
    assert not case.run().requires_grad
    case.inputs("hw")
    with torch.no_grad(), saved_shapes() as shapes:
        assert not case.run().requires_grad
    assert shapes == []


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize("wanted", ["h", "hw"])
def test_backward_may_run_twice_and_the_output_be_used_twice(
    wanted: str, budget: int, backend: str, device: torch.device
) -> None:
    case = HeadCase.random(9, 4, 300, softcap=1.5).to(torch.float64, device)
    inputs = case.inputs(wanted)
    output = case.run(memory_budget=budget, backend=backend)
    ones = torch.ones(9, device=device)
    once = gradients(output, inputs, ones, retain_graph=True)
    again = gradients(output, inputs, ones, retain_graph=True)
    doubled = gradients(output + output, inputs, ones)
    for first, second, twice in zip(once, again, doubled, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(twice, 2 * first)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    case = HeadCase.random(9, 4, 30)
    inputs = case.inputs("h")
    (first,) = torch.autograd.grad((case.run() ** 2).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    case = HeadCase.random(40, 64, 600).to(torch.float32, device)
    inputs = case.inputs("hw")
    outside = case.run(backend=backend)
    grads = gradients(outside, inputs, torch.ones(40))
    with torch.autocast(device.type, torch.bfloat16):
        inside = case.run(backend=backend)
        grads_inside = gradients(inside, inputs, torch.ones(40))
    assert torch.equal(outside, inside)
    assert all(map(torch.equal, grads, grads_inside))


def test_low_precision_gradients_come_in_their_inputs_dtypes() -> None:
    case = HeadCase.random(9, 4, 30, with_bias=True)
    hidden, weight, bias = case.to(torch.bfloat16).inputs("hwb")
    mixed = HeadCase(hidden, weight.detach().float().requires_grad_(), case.targets, bias)
    inputs = [mixed.hidden, mixed.weight, bias]
    found = [g.dtype for g in gradients(mixed.run(), inputs, torch.ones(9))]
    assert found == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_views_and_strides_do_not_matter() -> None:
    case = HeadCase.random(20, 6, 90)
    strided = HeadCase(case.hidden.T.contiguous().T, case.weight.repeat(1, 2)[:, :6], case.targets)
    torch.testing.assert_close(strided.run(), case.run())


@pytest.mark.parametrize("wanted", ["h", "hwb"])
@pytest.mark.usefixtures("small_tiles")
def test_cudas_bfloat16_products_cost_no_more_than_the_definitions(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path CUDA takes, with its product of bfloat16 matrices into float32 played on the CPU."""

    def product(
        left: torch.Tensor,
        right: torch.Tensor,
        *,
        out_dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        found = left.to(out_dtype) @ right.to(out_dtype)
        return found if out is None else out.copy_(found)

    case = HeadCase.random(37, 16, 301, with_bias=True).to(torch.bfloat16)
    exact = case.to(torch.float64)
    upstream = torch.randn(37, dtype=torch.float64)
    head = logprob._head
    results = []
    for each, name in ((exact, "eager"), (case, "eager"), (case, "tiled")):
        if name == "tiled":
            monkeypatch.setattr(
                logprob, "_head", lambda *a, **k: head(*a, **k)._replace(native=True)
            )
            monkeypatch.setattr(torch, "mm", product)
        inputs = each.inputs(wanted)
        output = each.run(backend=name)
        results.append([output, *gradients(output, inputs, upstream)])
    for truth, eager, ours in zip(*results, strict=True):
        assert relative(ours, truth) <= relative(eager, truth) + 1e-4


def test_shapes_that_do_not_fit_are_named() -> None:
    hidden, weight, targets = torch.ones(3, 4), torch.ones(9, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"hidden \(3, 4\) and weight \(9, 5\)"):
        token_log_probs(hidden, torch.ones(9, 5), targets)
    with pytest.raises(ValueError, match=r"targets must be \(3,\) int64"):
        token_log_probs(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match=r"bias must be \(9,\)"):
        token_log_probs(hidden, weight, targets, bias=torch.ones(3))
    with pytest.raises(ValueError, match="softcap must be positive"):
        token_log_probs(hidden, weight, targets, softcap=0.0)
    with pytest.raises(IndexError):
        token_log_probs(hidden, weight, targets - 100)


def test_a_backend_is_used_as_named_or_refused() -> None:
    case = HeadCase.random(3, 4, 9)
    with pytest.raises(ValueError, match="backend must be"):
        case.run(backend="cuda")


def test_on_a_gpu_triton_is_chosen_but_for_tensors_without_storage() -> None:
    with FakeTensorMode():
        outlined = torch.empty(2, device="cuda")
    assert choose_backend("auto", outlined) == "tiled"
    stored = SimpleNamespace(is_cuda=True)
    assert choose_backend("auto", stored) == ("triton" if find_spec("triton") else "tiled")  # type: ignore[arg-type]
