"""The two products over something large: a vocabulary, a queue of keys; and three layers.

Plain tensors in, plain tensors out. Each product exists three times with one meaning:

``eager``   :mod:`.reference`, the definition; holds the whole matrix
``tiled``   :mod:`.logprob`, :mod:`.infonce`: hand-written autograd in plain PyTorch, any device
``triton``  :mod:`.triton_logprob`, :mod:`.triton_infonce`: the same autograd around CUDA bodies

``backend="auto"`` goes by the tensors' device. A backend asked for by name is used or refused.

Shapes: T tokens, D features, V vocabulary, B queries, N live keys, Q queue entries
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpo_arabic.kernels import infonce as _infonce
from cpo_arabic.kernels import logprob as _logprob
from cpo_arabic.kernels.common import Backend, choose_backend
from cpo_arabic.kernels.linear import linear
from cpo_arabic.kernels.products import product
from cpo_arabic.kernels.reference import eager_infonce, eager_token_log_probs
from cpo_arabic.kernels.rms_norm import rms_norm
from cpo_arabic.kernels.swiglu import swiglu

__all__ = [
    "Backend", "InfoNCEOutput", "infonce", "linear", "product", "rms_norm", "swiglu",
    "token_log_probs",
]  # fmt: skip


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    memory_budget: int = _logprob.MEMORY_BUDGET,
    backend: Backend = "auto",
) -> Tensor:
    """log softmax(cap(scale · (hidden · weightᵀ + bias)))[target], never a [T, V] matrix.

    Args:
        hidden: (T, D), any floating dtype.
        weight: (V, D), the head.
        targets: (T,) int64 in [0, V).
        bias: (V,) of the head, if it has one.
        softcap: logits become softcap · tanh(logits / softcap).
        scale: factor on the logits, before the cap.
        memory_budget: bytes of exponentials that a head which needs a gradient may keep for
            backward beside those of the first D rows, which lie where the gradient of ``weight``
            is going to be; what is not kept is computed again. A frozen head keeps none.
        backend: see the package.

    Returns:
        (T,) float32, or float64 where ``hidden`` is float64. Gradients go to hidden, weight and
        bias, each only where required.
    """
    _check_head(hidden, weight, targets, bias, softcap)
    name = choose_backend(backend, hidden)
    if name == "eager":
        return eager_token_log_probs(hidden, weight, targets, bias, softcap, scale)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    result: Tensor = _logprob.TokenLogProbsFunction.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, softcap, scale, memory_budget, _logprob_body(name)
    )
    return result


class InfoNCEOutput(NamedTuple):
    """What :func:`infonce` returns for B queries."""

    loss: Tensor
    """(B,) loss of each query; 0 for one that has no negative."""
    hardest_negative: Tensor
    """(B,) largest similarity to an unmasked negative, −inf if there is none; detached."""
    positive_similarity: Tensor
    """(B,) similarity to the positive key; detached."""


def infonce(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    margin: float = 0.0,
    concentration: float = 0.0,
    query_labels: Tensor,
    key_labels: Tensor,
    queue: Tensor | None = None,
    queue_labels: Tensor | None = None,
    queue_scale: Tensor | None = None,
    backend: Backend = "auto",
    tile: int | None = None,
) -> InfoNCEOutput:
    """InfoNCE with margin and hard-negative concentration, never a [B, N + Q] matrix.

    Labels are int64 columns [group, prompt, text]; a query's text is that of its positive. Key j
    is no negative of query b when it is b's positive, has the positive's text, or belongs to
    another group with the same prompt.

    Args:
        queries: (B, D).
        keys: (N, D), live keys: in-batch positives and negatives, gradients kept.
        positives: (B,) int64, row of ``keys`` that answers each query.
        temperature: τ > 0.
        margin: taken from the positive's similarity.
        concentration: β ≥ 0; a negative weighs exp(β·sim) over the mean of that.
        query_labels: (B, 3).
        key_labels: (N, 3).
        queue: (Q, D) earlier keys, filled slots only, no gradient; floating, or int8 with a scale.
        queue_labels: (Q, 3), with a queue.
        queue_scale: (Q,) float32, factor of each int8 row.
        backend: see the package.
        tile: keys of one tile; chosen from B and D if not given.

    Returns:
        :class:`InfoNCEOutput`; its loss is float32, or float64 where ``queries`` is float64.
    """
    _check_infonce(queries, keys, positives, query_labels, key_labels, temperature, concentration)
    _check_queue(queries, queue, queue_labels, queue_scale)
    name = _infonce_backend(backend, queries)
    labels = (positives, query_labels, key_labels, queue, queue_labels, queue_scale)
    numbers = (temperature, margin, concentration)
    if name == "eager":
        return InfoNCEOutput(*eager_infonce(queries, keys, *labels, *numbers))
    if not torch.is_grad_enabled():
        queries, keys = queries.detach(), keys.detach()
    outputs = _infonce.InfoNCEFunction.apply(  # type: ignore[no-untyped-call]
        queries, keys, *labels, *numbers, tile, _infonce_body(name)
    )
    return InfoNCEOutput(*outputs)


def _logprob_body(name: Backend) -> _logprob.Body:
    if name == "tiled":
        return _logprob.TiledBody()
    from cpo_arabic.kernels.triton_logprob import TritonBody

    return TritonBody()


def _infonce_body(name: Backend) -> _infonce.Body:
    if name == "tiled":
        return _infonce.TiledBody()
    from cpo_arabic.kernels.triton_infonce import TritonBody

    return TritonBody()


def _infonce_backend(asked: Backend, queries: Tensor) -> Backend:
    """Triton passes a kernel's factors as float32; "auto" respects that."""
    name = choose_backend(asked, queries)
    if name == "triton" and queries.dtype == torch.float64:
        if asked == "auto":
            return "tiled"
        raise ValueError("backend triton computes InfoNCE in float32, and the queries are float64")
    return name


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (T, D), (V, D)"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be ({len(hidden)},) int64, not {tuple(targets.shape)} {targets.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), not {tuple(bias.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, not {softcap}")


def _check_infonce(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    temperature: float,
    concentration: float,
) -> None:
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be (B, D), (N, D)"
        )
    _expect("positives", positives, queries.shape[:1])
    _expect("query_labels", query_labels, (len(queries), 3))
    _expect("key_labels", key_labels, (len(keys), 3))
    if temperature <= 0 or concentration < 0:
        raise ValueError(
            f"temperature must be positive and concentration not negative, "
            f"not {temperature} and {concentration}"
        )


def _check_queue(
    queries: Tensor, queue: Tensor | None, labels: Tensor | None, scale: Tensor | None
) -> None:
    if queue is None:
        if labels is not None or scale is not None:
            raise ValueError("queue_labels and queue_scale go with a queue")
        return
    if labels is None:
        raise ValueError("a queue needs queue_labels")
    if queue.ndim != 2 or queue.shape[1] != queries.shape[1]:
        raise ValueError(f"queue must be (Q, {queries.shape[1]}), not {tuple(queue.shape)}")
    _expect("queue_labels", labels, (len(queue), 3))
    if (queue.dtype == torch.int8) != (scale is not None):
        raise ValueError("an int8 queue, and no other, needs queue_scale")
    if scale is not None and scale.shape != queue.shape[:1]:
        raise ValueError(f"queue_scale must be ({len(queue)},), not {tuple(scale.shape)}")
    if queue.requires_grad:
        raise ValueError("a queue gets no gradient: pass it detached")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != torch.int64:
        raise ValueError(
            f"{name} must be {tuple(shape)} int64, not {tuple(tensor.shape)} {tensor.dtype}"
        )
