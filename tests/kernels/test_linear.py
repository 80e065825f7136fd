"""The linear layer and the products under it: MKL's results, by oneDNN where that is the faster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cpo_arabic.kernels import linear, product, products
from cpo_arabic.kernels.products import multiply
from cpo_arabic.modeling.layers import fuse_layers
from tests.kernels.cases import Operations, gradients, relative, saved_shapes

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


@pytest.fixture(params=["mkl", pytest.param("onednn", marks=needs_onednn)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whatever the processor, the library of this name; small products are not spared."""
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "WORTHWHILE", 1)
    yield request.param


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The same values as rows, as columns, or as a window of something wider."""
    if layout == "columns":
        return tensor.T.contiguous().T
    if layout == "window":
        return F.pad(tensor, (3, 2, 1, 4))[1:-4, 3:-2]
    return tensor


@pytest.mark.parametrize("right_layout", ["rows", "columns", "window"])
@pytest.mark.parametrize("left_layout", ["rows", "columns", "window"])
@pytest.mark.parametrize("sizes", [(1, 7, 5), (33, 1, 9), (40, 17, 1), (64, 50, 300), (0, 4, 3)])
def test_products_are_exact_in_any_layout(
    sizes: tuple[int, int, int], left_layout: str, right_layout: str, library: str
) -> None:
    m, k, n = sizes
    left, right = laid(torch.randn(m, k), left_layout), laid(torch.randn(k, n), right_layout)
    truth, old = left.double() @ right.double(), torch.randn(m, n)
    found = product(left, right)
    assert found.is_contiguous()
    assert relative(found, truth) < 1e-6
    over, onto = old.clone(), old.clone()
    multiply(left, right, over)
    multiply(left, right, onto, accumulate=True)
    assert relative(over, truth) < 1e-6
    assert relative(onto, truth + old) < 1e-6


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_gpus_bfloat16_product_is_written_in_float32_where_it_belongs(accumulate: bool) -> None:
    """On tensors without storage: which operations a GPU would run."""
    with FakeTensorMode(), Operations() as operations:
        left = torch.empty(6, 8, device="cuda")
        right = torch.empty(8, 5, device="cuda", dtype=torch.bfloat16)
        multiply(left, right, torch.empty(6, 5, device="cuda"), accumulate=accumulate)
    written = ["mm.dtype", "add_.Tensor"] if accumulate else ["mm.dtype_out"]
    assert operations.names[-len(written) - 1 :] == ["_to_copy.default", *written]


@needs_onednn
@pytest.mark.parametrize(
    ("dtype", "size", "by_onednn"),
    [(torch.float32, 200, True), (torch.float32, 20, False), (torch.float64, 200, False)],
)
def test_large_float32_products_are_onednns_where_mkl_is_not_at_home(
    dtype: torch.dtype, size: int, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    left = torch.randn(size, size, dtype=dtype)
    with torch.profiler.profile() as profile:
        product(left, left)
        multiply(left, left, left.clone())
    used = [each.count for each in profile.key_averages() if "_linear_pointwise" in each.key]
    assert used == ([2] if by_onednn else [])


NEW_SHAPES = """
from pathlib import Path
import torch
from cpo_arabic.kernels import product, products

def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

products._onednn_is_faster = lambda: True
left, right = torch.ones(900, 128), torch.ones(128, 128)
for rows in range(900, 400, -1):
    product(left[:rows], right)
    if rows == 800:
        before = resident_mib()
print(resident_mib() - before)
"""


@needs_onednn
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ever_new_lengths_do_not_add_up_in_memory() -> None:
    """In a process of its own: the caches' sizes are read once. By default it is over 100 MiB."""
    ours = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    program = [sys.executable, "-c", NEW_SHAPES]
    done = subprocess.run(program, env=ours, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30


@pytest.mark.parametrize(
    ("name", "expected"), [("AMD EPYC", True), ("Intel Xeon Platinum 8481C", False)]
)
def test_the_processor_decides(name: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert products._onednn_is_faster.__wrapped__() is expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
def test_it_is_pytorchs_linear_layer(shape: tuple[int, ...], bias: bool, library: str) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(10, 24, requires_grad=True)
    leaves = [x, weight, *([torch.randn(10, requires_grad=True)] if bias else [])]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = torch.randn(*shape[:-1], 10)
    ours, truth = linear(*leaves), F.linear(*wide)
    assert relative(ours, truth) < 1e-6
    for mine, true in zip(
        gradients(ours, leaves, upstream, retain_graph=True),
        gradients(truth, wide, upstream.double()),
        strict=True,
    ):
        assert relative(mine, true) < 1e-6
        assert mine.is_contiguous()
    twice = [gradients(ours, leaves, upstream, retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *twice))


def test_of_a_frozen_weight_and_its_input_only_the_weight_is_kept(library: str) -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(3, 8)
    with saved_shapes() as shapes:
        y = linear(x, weight)
    assert [sorted(shape) for shape in shapes] == [[3, 8]]
    (grad,) = gradients(y, [x], torch.ones(6, 3))
    assert relative(grad, weight.double().sum(0).expand(6, 8)) < 1e-6


def test_of_the_first_layer_only_the_input_is_kept(library: str) -> None:
    x, weight = torch.randn(6, 8), torch.randn(3, 8, requires_grad=True)
    with saved_shapes() as shapes:
        y = linear(x, weight)
    assert [sorted(shape) for shape in shapes] == [[6, 8]]
    (grad,) = gradients(y, [weight], torch.ones(6, 3))
    assert relative(grad, x.double().sum(0).expand(3, 8)) < 1e-6


def test_where_the_products_are_pytorchs_so_is_the_layer(library: str) -> None:
    y = linear(torch.randn(6, 8), torch.randn(3, 8, requires_grad=True))
    assert y.grad_fn is not None
    assert ("_Linear" in str(y.grad_fn.next_functions[0][0])) == (library == "onednn")


def test_a_models_layer_computes_the_same(library: str) -> None:
    layer, x = nn.Linear(16, 12), torch.randn(2, 9, 16, requires_grad=True)
    leaves, upstream = [x, *layer.parameters()], torch.randn(2, 9, 12)
    plain = layer(x)
    theirs = gradients(plain, leaves, upstream)
    fuse_layers(layer)
    ours = layer(x)
    assert "forward" in vars(layer)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, leaves, upstream), theirs)


def test_autocast_is_obeyed() -> None:
    layer, x = nn.Linear(16, 12), torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        fuse_layers(layer)
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, plain)
