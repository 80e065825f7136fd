"""Log-probabilities of given tokens under a language-model head, without the [T, V] matrix.

Equation, for row t with target y::

    z_v   = cap(scale · (h · W_v + b_v))        cap(x) = c·tanh(x/c), or x where there is no cap
    gap   = LSE_{v≠y}(z_v) − z_y
    log p = z_y − LSE_v(z_v) = −softplus(gap)

    ∂log p/∂h   = scale · σ(gap) · (cap'_y W_y − Σ_{v≠y} p_v cap'_v W_v)    p_v = exp z_v / Σ_{u≠y}
    ∂log p/∂W_v = scale · σ(gap) · ([v = y] cap'_y − [v ≠ y] p_v cap'_v) h

The target stays out of the log-sum-exp for the reason it does in :mod:`.infonce`: where the model
is sure, 1 − p_y is computed, not subtracted. The sum over V is taken tile by tile with a running
maximum (Milakov & Gimelshein 2018, arXiv 1805.02867); that the matrix need not exist is Wijmans
et al. 2024 (Cut Cross-Entropy, arXiv 2411.09009).

Three modes, chosen by what needs a gradient. T rows, D features, V tokens; multiply-adds × 2:

    nothing            2·D·V·T    running maximum and sum only
    hidden only        4·D·V·T    forward accumulates U = Σ p_v cap'_v W_v beside the sum, (T, D) is
    (frozen head)                 all that is saved, backward multiplies it by the incoming gradient
    weight or bias     6·D·V·T    backward reads the exponentials that were kept,
    (trained head)     8·D·V·T    and recomputes the others

What is kept of a tile is exp(z_v − m) cap'_v with m (T,) the running maximum of then: backward
multiplies it by exp(m − LSE), one number a row, and takes no exponential again.

Backward goes vocabulary tile by vocabulary tile, so a slice of W's gradient is complete before the
next is begun and nothing accumulates in a dtype below float32. Hence a tile can wait for backward
where that slice is going to be: the (V, D) memory of W's gradient, which the end of backward needs
in any case, is taken in forward and holds the tiles of the first D rows (D / 2 if W is bfloat16).
Of the other rows, as many tiles as fit in ``memory_budget`` bytes are kept.

Shapes: T rows, D features, V tokens, t rows of one tile, v tokens of one tile
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpo_arabic.kernels.common import (
    Scratch,
    accumulation_dtype,
    exponentials_,
    spans,
    without_autocast,
)
from cpo_arabic.kernels.memory import gradient_memory
from cpo_arabic.kernels.products import multiply

TILE_ROWS = 1024
TILE_ELEMENTS = 1 << 20
"""Logits of one tile on a CPU: 4 MiB in float32."""
CUDA_TILES = 8
"""How much larger a CUDA tile is: 32 MiB, within the second-level cache, few launches."""
TILE_TOKENS = (512, 8192)
"""Fewest and most tokens of one tile."""
MEMORY_BUDGET = 64 << 20
"""Bytes of tiles that are kept by default beside those in the memory of W's gradient."""
NO_PEAK = -1e30
"""Maximum of no logits; finite, since −inf − −inf is not a number."""


class Head(NamedTuple):
    """One call's inputs in the form the loops want them."""

    hidden: Tensor  # (T, D) times scale, accumulation dtype
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,) times scale, accumulation dtype
    targets: Tensor  # (T,)
    softcap: float | None
    native: bool  # bfloat16 products with float32 accumulation: CUDA, and no scale to round
    lodged: int  # first rows, whose tiles wait in the memory of W's gradient

    def weights(self, token: int, token_end: int, converted: Scratch) -> Tensor:
        """(v, D) rows of the head in the dtype that products take."""
        rows = self.weight[token:token_end]
        return rows if self.native else converted.load(rows)


class Tile(NamedTuple):
    """Bounds of one tile of logits."""

    row: int
    row_end: int
    token: int
    token_end: int


class Body(Protocol):
    """The elementwise work on one (t, v) tile of logits, which a backend provides.

    ``local`` (t,) is each row's target counted from the tile's first token; it lies outside
    [0, v) for the rows whose target is in another tile.
    """

    def absorb(
        self,
        logits: Tensor,
        local: Tensor,
        peak: Tensor,
        total: Tensor,
        *,
        softcap: float | None,
        pulling: bool,
    ) -> Tensor:
        """Adds a tile to the running (t,) ``peak`` and ``total``; (t,) factor on older sums.

        Where ``pulling``, the logits become exp(z − peak) cap', and 0 at the targets; otherwise
        what becomes of them is of no account. The first ``peak`` is finite: :data:`NO_PEAK`.
        """
        ...

    def differentiate(
        self, pull: Tensor, local: Tensor, factor: Tensor, slope: Tensor, out: Tensor
    ) -> None:
        """``out`` = p_v cap'_v, which is ``pull`` times (t,) ``factor``; −``slope`` at targets.

        ``out`` may be ``pull`` itself.
        """
        ...


class TokenLogProbsFunction(torch.autograd.Function):
    """Differentiable in ``hidden``, ``weight`` and ``bias``, once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        memory_budget: int,
        body: Body,
    ) -> Tensor:
        """(T) log-probabilities; what is kept depends on which inputs need a gradient."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        trained = needs_weight or needs_bias
        with without_autocast(hidden.device):
            head = _head(hidden, weight, bias, targets, softcap, scale, trained=needs_weight)
            ctx.gradient = _gradient_memory(head) if needs_weight else None
            target_weight = weight.index_select(0, targets).to(head.hidden.dtype)  # (T, D)
            target_logit, target_slope = _target_logits(head, target_weight)
            found = _forward(
                head,
                body,
                needs_hidden and not trained,
                ctx.gradient,
                memory_budget if trained else 0,
            )
            log_sum, pulled = found.log_sum, found.pulled
            gap = log_sum - target_logit
            rate = torch.sigmoid(gap)
            direction = None
            if pulled is not None:
                direction = target_weight.mul_(target_slope[:, None]).sub_(pulled)
                direction.mul_((rate * scale)[:, None])
        if trained:
            ctx.save_for_backward(
                hidden, weight, bias, targets, log_sum, rate, target_slope, found.peaks,
                *found.kept.values(),
            )  # fmt: skip
            ctx.kept = list(found.kept)
        else:
            ctx.save_for_backward(direction)
        ctx.settings = (softcap, scale, body, hidden.dtype)
        return -torch.logaddexp(gap, torch.zeros_like(gap))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the kept rows under a frozen head; else goes over the tiles again."""
        softcap, scale, body, dtype = ctx.settings
        needs = ctx.needs_input_grad[:3]
        nothing = [None] * 5
        with without_autocast(grad.device):
            if not (needs[1] or needs[2]):
                (direction,) = ctx.saved_tensors
                return ((grad[:, None] * direction).to(dtype), None, None, *nothing)
            hidden, weight, bias, targets, log_sum, rate, slope, peaks, *tiles = ctx.saved_tensors
            head = _head(hidden, weight, bias, targets, softcap, scale, trained=needs[1])
            kept = dict(zip(ctx.kept, tiles, strict=True))
            memory, ctx.gradient = ctx.gradient, None
            if memory is not None:
                kept |= _lodgings(head, memory)
            elif needs[1]:  # given away by an earlier backward, and its tiles with it
                memory = _gradient_memory(head)
            gradients = _Gradients(head, needs, -grad * rate, scale, memory)
            _backward(head, body, peaks, log_sum, slope, kept, gradients)
            return (*gradients.finish(dtype, bias), *nothing)


def lodged_rows(rows: int, features: int, weight_bytes: int, logit_bytes: int = 4) -> int:
    """How many of ``rows`` tokens have their tiles in the memory of a trained W's gradient."""
    return min(rows, features * weight_bytes // logit_bytes)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    scale: float,
    *,
    trained: bool,
) -> Head:
    dtype = accumulation_dtype(hidden)
    scaled = hidden.to(dtype) * scale if scale != 1.0 else hidden.to(dtype)
    shift = None if bias is None else bias.to(dtype) * scale
    low = hidden.dtype == weight.dtype == torch.bfloat16
    native = low and hidden.is_cuda and scale == 1.0
    lodged = 0
    if trained:
        rows, features = scaled.shape
        lodged = lodged_rows(rows, features, weight.element_size(), scaled.element_size())
    return Head(scaled, weight, shift, targets, softcap, native, lodged)


def _gradient_memory(head: Head) -> Tensor:
    """(V, D) of W's dtype; of undefined content, or zeros where no row is going to write there."""
    memory = gradient_memory(head.weight)
    return memory if len(head.hidden) else memory.zero_()


def _lodgings(head: Head, gradient: Tensor) -> dict[Tile, Tensor]:
    """Each tile of the lodged rows, in the slice of W's gradient of the same tokens."""
    if not head.lodged:
        return {}
    found = {}
    for token, token_end in _token_spans(head):
        shape = (head.lodged, token_end - token)
        size = shape[0] * shape[1] * head.hidden.element_size()
        memory = gradient[token:token_end].view(torch.uint8).flatten()[:size]
        tile = Tile(0, head.lodged, token, token_end)
        found[tile] = memory.view(head.hidden.dtype).view(shape)
    return found


def _target_logits(head: Head, target_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) capped logit of each target, and the cap's slope there."""
    logit = (head.hidden * target_weight).sum(1)
    if head.bias is not None:
        logit = logit + head.bias.index_select(0, head.targets)
    if head.softcap is None:
        return logit, torch.ones_like(logit)
    bent = torch.tanh(logit / head.softcap)
    return head.softcap * bent, 1 - bent * bent


class _Forward(NamedTuple):
    """What the pass over the tiles has found."""

    log_sum: Tensor  # (T,) over the non-targets
    peaks: Tensor  # (tiles along V, T) running maximum that each tile's exponentials are over
    pulled: Tensor | None  # (T, D) Σ p_v cap'_v W_v, where wanted
    kept: dict[Tile, Tensor]  # (t, v) exponentials, in memory of their own


def _forward(
    head: Head, body: Body, want_pulled: bool, gradient: Tensor | None, budget: int
) -> _Forward:
    lodgings = {} if gradient is None else _lodgings(head, gradient)
    h = head.hidden
    log_sum = h.new_empty(len(h))
    peaks = h.new_empty(len(list(_token_spans(head))), len(h))
    pulled = torch.zeros_like(h) if want_pulled else None
    kept: dict[Tile, Tensor] = {}
    work, converted = Scratch(h, h.dtype), Scratch(h, h.dtype)
    for row, row_end in _row_spans(head):
        peak = h.new_full((row_end - row,), NO_PEAK)
        total = torch.zeros_like(peak)
        into = None if pulled is None else pulled[row:row_end]
        for index, (token, token_end) in enumerate(_token_spans(head)):
            tile = Tile(row, row_end, token, token_end)
            weight = head.weights(token, token_end, converted)
            scratch = work.take(row_end - row, token_end - token)
            size = scratch.numel() * scratch.element_size()
            logits = lodgings.get(tile, scratch)
            if logits is scratch and size <= budget:
                budget -= size
                logits = kept[tile] = torch.empty_like(scratch)
            _product(head, tile, weight, logits)
            local = head.targets[row:row_end] - token
            decay = body.absorb(
                logits, local, peak, total,
                softcap=head.softcap, pulling=want_pulled or logits is not scratch,
            )  # fmt: skip
            peaks[index, row:row_end] = peak
            if into is not None:
                multiply(logits, weight, into.mul_(decay[:, None]), accumulate=True)
        log_sum[row:row_end] = total.log() + peak
        if into is not None:
            into.div_(total.masked_fill(total == 0, 1.0)[:, None])
    return _Forward(log_sum, peaks, pulled, kept)


def _backward(
    head: Head,
    body: Body,
    peaks: Tensor,
    log_sum: Tensor,
    slope: Tensor,
    kept: dict[Tile, Tensor],
    gradients: _Gradients,
) -> None:
    """Feeds every tile of ∂(−log p / σ(gap))/∂z to ``gradients``, vocabulary outermost."""
    h = head.hidden
    work, converted = Scratch(h, h.dtype), Scratch(h, h.dtype)
    factors = (peaks - log_sum).exp_()
    for index, (token, token_end) in enumerate(_token_spans(head)):
        weight = head.weights(token, token_end, converted)
        part = gradients.begin(token, token_end)
        for row, row_end in _row_spans(head):
            tile = Tile(row, row_end, token, token_end)
            local = head.targets[row:row_end] - token
            out = work.take(row_end - row, token_end - token)
            pull = kept.get(tile)
            if pull is None:  # by forward's own steps, so that it gets the same bits
                pull = out
                _product(head, tile, weight, pull)
                peak = peaks[index, row:row_end].clone()
                body.absorb(
                    pull, local, peak, torch.zeros_like(peak), softcap=head.softcap, pulling=True
                )
            body.differentiate(pull, local, factors[index, row:row_end], slope[row:row_end], out)
            gradients.add(tile, out, weight, part)
        gradients.end(token, token_end, part)


def _row_spans(head: Head) -> Iterator[tuple[int, int]]:
    """The lodged rows are one tile, and the first: it is read before the gradient is written."""
    if head.lodged:
        yield 0, head.lodged
    for row, row_end in spans(len(head.hidden) - head.lodged, TILE_ROWS):
        yield head.lodged + row, head.lodged + row_end


def _token_spans(head: Head) -> Iterator[tuple[int, int]]:
    """Multiples of 8 tokens: any dtype may be laid over their slice of another one's matrix."""
    fewest, most = TILE_TOKENS
    rows = max((end - start for start, end in _row_spans(head)), default=1)
    elements = TILE_ELEMENTS * CUDA_TILES if head.hidden.is_cuda else TILE_ELEMENTS
    return spans(len(head.weight), min(max(elements // rows // 8 * 8, fewest), most))


def _product(head: Head, tile: Tile, weight: Tensor, out: Tensor) -> None:
    """(t, v) scale·(h Wᵀ + b) of one tile, before the cap, into ``out``."""
    multiply(head.hidden[tile.row : tile.row_end], weight.T, out)
    if head.bias is not None:
        out.add_(head.bias[tile.token : tile.token_end])


class _Gradients:
    """Accumulates what is wanted of ∂/∂hidden, ∂/∂weight, ∂/∂bias and nothing else.

    A tile G arrives without its rows' factors; they are put on the (T, D) hidden states, which
    enter W's gradient, and on the finished gradient of hidden, never on a tile.
    """

    def __init__(
        self,
        head: Head,
        needs: tuple[bool, ...],
        factors: Tensor,
        scale: float,
        weight: Tensor | None,
    ) -> None:
        h = head.hidden
        self._factors, self._scale = factors, scale
        self._hidden = torch.zeros_like(h) if needs[0] else None
        self._weight = weight
        self._bias = h.new_zeros(len(head.weight)) if needs[2] else None
        scaled = h * factors[:, None]
        self._scaled_hidden = scaled.to(head.weight.dtype) if head.native else scaled
        self._slice = Scratch(h, h.dtype)

    def begin(self, token: int, token_end: int) -> Tensor | None:
        """(v, D) where this slice of W's gradient is built, in the accumulation dtype."""
        if self._weight is None:
            return None
        mine = self._weight[token:token_end]
        return mine if mine.dtype == self._factors.dtype else self._slice.take(*mine.shape)

    def add(self, tile: Tile, gradient: Tensor, weight: Tensor, part: Tensor | None) -> None:
        rows = slice(tile.row, tile.row_end)
        if self._hidden is not None:
            multiply(gradient, weight, self._hidden[rows], accumulate=True)
        if part is not None:
            # the first row tile overwrites: a third of a gigabyte need not be zeroed before
            multiply(gradient.T, self._scaled_hidden[rows], part, accumulate=tile.row > 0)
        if self._bias is not None:
            self._bias[tile.token : tile.token_end].addmv_(gradient.T, self._factors[rows])

    def end(self, token: int, token_end: int, part: Tensor | None) -> None:
        if self._weight is not None and part is not None and part.dtype != self._weight.dtype:
            self._weight[token:token_end] = part

    def finish(self, dtype: torch.dtype, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        if self._hidden is not None:
            self._hidden.mul_((self._factors * self._scale)[:, None])
            self._hidden = self._hidden.to(dtype)
        if self._bias is not None and bias is not None:
            self._bias = self._bias.mul_(self._scale).to(bias.dtype)
        return self._hidden, self._weight, self._bias


class TiledBody:
    """Plain PyTorch on one tile, on any device."""

    def absorb(
        self,
        logits: Tensor,
        local: Tensor,
        peak: Tensor,
        total: Tensor,
        *,
        softcap: float | None,
        pulling: bool,
    ) -> Tensor:
        slope = None
        if softcap is not None:
            logits.div_(softcap).tanh_()
            slope = 1 - logits * logits if pulling else None
            logits.mul_(softcap)
        _put_at_target(logits, local, torch.full_like(peak, -math.inf))
        raised = torch.maximum(peak, logits.amax(1))
        exponentials_(logits, raised)
        decay = (peak - raised).exp_()
        total.mul_(decay).add_(logits.sum(1))
        peak.copy_(raised)
        if slope is not None:
            logits.mul_(slope)
        return decay

    def differentiate(
        self, pull: Tensor, local: Tensor, factor: Tensor, slope: Tensor, out: Tensor
    ) -> None:
        torch.mul(pull, factor[:, None], out=out)
        _put_at_target(out, local, -slope)


def _put_at_target(tile: Tensor, local: Tensor, value: Tensor) -> None:
    """tile[t, local[t]] = value[t] for the rows whose target lies in this tile."""
    column = local.clamp(0, tile.shape[1] - 1)[:, None]
    inside = (local == column[:, 0])[:, None]
    tile.scatter_(1, column, torch.where(inside, value[:, None], tile.gather(1, column)))
