# ruff: noqa: N803, N806 - Triton's compile-time constants are written in capitals
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""CUDA body of :mod:`.infonce`: one launch over the keys, one over the queue.

Equation and references: :mod:`.infonce`. A program holds BLOCK_B queries in registers and walks
over its share of the keys, as in Dao et al. 2022 (arXiv 2205.14135); the keys are split over enough
programs to fill the device, and the splits' partial maxima and sums are merged afterwards. Nothing
is read back to the host.

Covered: float32, bfloat16 and float16 queries, keys and queues, int8 queues, D ≤ 512 (a row lies in
registers). Products are float32-accurate: three TF32 products where the hardware has them.

Shapes: B queries, N keys, D dimensions, P splits, S scales (1 or 2)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_arabic.kernels.infonce import Problem, Sweep

_CONFIGS = [
    triton.Config({"BLOCK_B": b, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for b, n, warps, stages in [
        (16, 32, 4, 2),
        (16, 64, 4, 2),
        (32, 32, 4, 2),
        (32, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 64, 8, 2),
        (64, 128, 8, 2),
    ]
]
if not torch.cuda.is_available():  # the interpreter has nothing to time
    _CONFIGS = [triton.Config({"BLOCK_B": 16, "BLOCK_N": 32})]


@triton.jit
def _load_rows(base, rows, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) float32 of a contiguous (count, D) matrix, 0 beyond its edges."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    return tl.load(base + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _excluded(query_labels, key_labels, queries, keys, B, N):
    """(b, n) true where a key must not be a negative, or where there is none."""
    q_at, k_at = query_labels + 3 * queries, key_labels + 3 * keys.to(tl.int64)
    q_in, k_in = queries < B, keys < N
    q_group = tl.load(q_at, mask=q_in, other=0)[:, None]
    q_prompt = tl.load(q_at + 1, mask=q_in, other=0)[:, None]
    q_text = tl.load(q_at + 2, mask=q_in, other=0)[:, None]
    k_group = tl.load(k_at, mask=k_in, other=0)[None, :]
    k_prompt = tl.load(k_at + 1, mask=k_in, other=0)[None, :]
    k_text = tl.load(k_at + 2, mask=k_in, other=0)[None, :]
    same = (q_text == k_text) | ((q_prompt == k_prompt) & (q_group != k_group))
    return same | ~(q_in[:, None] & k_in[None, :])


@triton.autotune(_CONFIGS, key=["D", "TWO", "MEANS", "SCALED"])
@triton.jit
def _sweep_kernel(
    queries, keys, key_scale, query_labels, key_labels, positives,
    peak, totals, count, sums,
    B, N, share, sharp, soft,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr, LIVE: tl.constexpr,
    TWO: tl.constexpr, MEANS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial peak (P, B), totals (P, S, B), count (P, B) and sums (P, S, B, D) of one split."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    q = _load_rows(queries, rows, B, D, BLOCK_D)
    best = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    negatives = tl.zeros((BLOCK_B,), tl.int32)
    total_a, total_b = tl.zeros((BLOCK_B,), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    if MEANS:
        sum_a = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        if TWO:
            sum_b = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    last = tl.minimum(split * share + share, N)
    for start in range(split * share, last, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        k = _load_rows(keys, place, last, D, BLOCK_D)
        if SCALED:
            k *= tl.load(key_scale + place, mask=place < last, other=0.0)[:, None]
        excluded = _excluded(query_labels, key_labels, rows, place, B, last)
        if LIVE:
            own = tl.load(positives + rows, mask=rows < B, other=-1)
            excluded |= own[:, None] == place[None, :]
        similarity = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        similarity = tl.where(excluded, float("-inf"), similarity)
        negatives += tl.sum(tl.where(excluded, 0, 1), 1)
        raised = tl.maximum(best, tl.max(similarity, 1))
        floor = tl.where(raised == float("-inf"), 0.0, raised)
        below, decay = similarity - floor[:, None], best - floor
        weight, older = tl.exp(sharp * below), tl.exp(sharp * decay)
        total_a = total_a * older + tl.sum(weight, 1)
        if MEANS:
            sum_a = sum_a * older[:, None] + tl.dot(weight, k, input_precision=PRECISION)
        if TWO:
            weight, older = tl.exp(soft * below), tl.exp(soft * decay)
            total_b = total_b * older + tl.sum(weight, 1)
            if MEANS:
                sum_b = sum_b * older[:, None] + tl.dot(weight, k, input_precision=PRECISION)
        best = raised

    S: tl.constexpr = 2 if TWO else 1
    inside = rows < B
    tl.store(peak + split * B + rows, best, mask=inside)
    tl.store(count + split * B + rows, negatives, mask=inside)
    at = split.to(tl.int64) * S * B + rows
    tl.store(totals + at, total_a, mask=inside)
    if TWO:
        tl.store(totals + at + B, total_b, mask=inside)
    if MEANS:
        columns = tl.arange(0, BLOCK_D)
        both = inside[:, None] & (columns < D)[None, :]
        tl.store(sums + at[:, None] * D + columns[None, :], sum_a, mask=both)
        if TWO:
            tl.store(sums + (at + B)[:, None] * D + columns[None, :], sum_b, mask=both)


@triton.autotune(_CONFIGS, key=["D", "TWO"])
@triton.jit
def _key_gradient_kernel(
    queries, keys, query_labels, key_labels, positives, peak, totals, rate, gradient,
    B, N, sharp, soft,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(N, D) Σ_b rate_b (a·p_bj − β·r_bj) q_b; a program owns BLOCK_N keys."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _load_rows(keys, place, N, D, BLOCK_D)
    result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        inside = rows < B
        q = _load_rows(queries, rows, B, D, BLOCK_D)
        excluded = _excluded(query_labels, key_labels, rows, place, B, N)
        own = tl.load(positives + rows, mask=inside, other=-1)
        excluded |= own[:, None] == place[None, :]
        best = tl.load(peak + rows, mask=inside, other=0.0)
        best = tl.where(best == float("-inf"), 0.0, best)
        pushed = tl.load(rate + rows, mask=inside, other=0.0)
        similarity = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        below = tl.where(excluded, float("-inf"), similarity - best[:, None])
        total = tl.load(totals + rows, mask=inside, other=1.0)
        factor = sharp * pushed / tl.where(total == 0, 1.0, total)
        weight = tl.exp(sharp * below) * factor[:, None]
        if TWO:
            total = tl.load(totals + B + rows, mask=inside, other=1.0)
            factor = soft * pushed / tl.where(total == 0, 1.0, total)
            weight -= tl.exp(soft * below) * factor[:, None]
        result += tl.dot(tl.trans(weight), q, input_precision=PRECISION)
    columns = tl.arange(0, BLOCK_D)
    inside_keys = (place < N)[:, None] & (columns < D)[None, :]
    at = place.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(gradient + at, result, mask=inside_keys)


class TritonBody:
    """Both loops of :class:`.infonce.Body` as Triton kernels."""

    def sweep(self, problem: Problem, *, want_means: bool) -> Sweep:
        parts = [self._segment(problem, problem.keys, problem.key_labels, None, want_means, True)]
        if problem.queue is not None and problem.queue_labels is not None:
            queue, labels, scale = problem.queue, problem.queue_labels, problem.queue_scale
            parts.append(self._segment(problem, queue, labels, scale, want_means, False))
        return _merge(problem, parts)

    def _segment(
        self,
        problem: Problem,
        keys: Tensor,
        labels: Tensor,
        scale: Tensor | None,
        want_means: bool,
        live: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Partial results (P, …) over the live keys or over the queue."""
        q = problem.queries.contiguous()
        (b, d), n, s = q.shape, len(keys), len(problem.scales)
        share = _share(b, n, q.device)
        splits = max(1, triton.cdiv(n, share))
        peak, totals = q.new_empty(splits, b), q.new_empty(splits, s, b)
        count = torch.empty(splits, b, dtype=torch.int32, device=q.device)
        sums = q.new_empty(splits, s, b, d) if want_means else None

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(b, meta["BLOCK_B"]), splits

        _sweep_kernel[grid](
            q, keys.contiguous(), scale if scale is not None else q,
            problem.query_labels.contiguous(), labels.contiguous(),
            problem.positives.contiguous(), peak, totals, count, sums if want_means else q,
            b, n, share, problem.scales[0], problem.concentration,
            LIVE=live, SCALED=scale is not None, MEANS=want_means, **_constants(problem),
        )  # fmt: skip
        return peak, totals, count, sums

    def key_gradient(self, problem: Problem, peak: Tensor, totals: Tensor, rate: Tensor) -> Tensor:
        q = problem.queries.contiguous()
        gradient = q.new_empty(problem.keys.shape)

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (triton.cdiv(len(gradient), meta["BLOCK_N"]),)

        _key_gradient_kernel[grid](
            q, problem.keys.contiguous(), problem.query_labels.contiguous(),
            problem.key_labels.contiguous(), problem.positives.contiguous(), peak.contiguous(),
            totals.contiguous(), rate.contiguous(), gradient,
            len(q), len(gradient), problem.scales[0], problem.concentration, **_constants(problem),
        )  # fmt: skip
        return gradient


def _constants(problem: Problem) -> dict[str, Any]:
    d = problem.queries.shape[1]
    tensor_cores = problem.queries.is_cuda and torch.version.hip is None
    return {
        "D": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "TWO": problem.concentration > 0,
        "PRECISION": "tf32x3" if tensor_cores else "ieee",
    }


def _share(queries: int, keys: int, device: torch.device) -> int:
    """Keys of one split: enough splits for two programs on every multiprocessor."""
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = max(1, 2 * processors // triton.cdiv(max(queries, 1), 32))
    share: int = max(128, triton.cdiv(keys, splits))
    return share


def _merge(problem: Problem, parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> Sweep:
    """Brings the partial sums of all splits to one peak and adds them."""
    peaks = torch.cat([part[0] for part in parts])  # (P, B)
    totals = torch.cat([part[1] for part in parts])  # (P, S, B)
    count = torch.cat([part[2] for part in parts]).sum(0)
    peak = peaks.amax(0)
    floor = peak.masked_fill(peak == -math.inf, 0.0)
    decay = torch.stack([((peaks - floor) * scale).exp() for scale in problem.scales], 1)
    total = (totals * decay).sum(0)
    means = None
    partial = [part[3] for part in parts if part[3] is not None]
    if partial:
        share = decay / total.masked_fill(total == 0, 1.0)
        means = torch.einsum("psb,psbd->sbd", share, torch.cat(partial))
    return Sweep(peak, total, count, means)
