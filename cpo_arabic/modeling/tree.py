"""One forward of a decoder over a PreferenceBatch, its packed trees included.

(R) rows  (L) tokens of a row  (D) hidden  (H) heads  (K) branches of a tree
(P) prompt tokens  (C) tokens of a branch

In a packed row, a token may see its tree's prompt and its own branch, both up to itself. Positions
restart in every branch, so the path from the prompt's first token to any token is an ordinary
sequence with ordinary positions; only attention has to know where the path lies. It is told by a
keyword argument, ``tree_layout``, which a decoder hands down to its attention function, and never
by a dense (L, L) mask:

- ``eager``, ``sdpa``: the model's own attention function, tree by tree: the prompt with its first
  branch, which are an ordinary causal sequence, then each other branch over [prompt; own].
- ``flash_attention_*``, and ``sdpa`` in half precision on CUDA: one variable-length call for all
  rows. Its sequences are the prompts and the branches; the keys of a branch are [prompt; own].
- ``flex_attention``: a block mask (CUDA; on CPU it has no backward and is refused).

In each, every query meets its whole key set in one call, so grouped heads, soft-caps, sinks,
dropout and windows mean what they mean elsewhere. Sliding windows count along the path.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cpo_arabic.data.pack import PreferenceBatch, Tree
from cpo_arabic.errors import ModelError
from cpo_arabic.modeling.last_layer import ReadPositions
from cpo_arabic.modeling.layout import Sequences, TreeLayout

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
BACKENDS = ("eager", "sdpa", "flex_attention", *FLASH)
"""The values of ``attn_implementation`` that work in trees."""

_PREFIX = "cpo_arabic_tree|"
_REMEDY = "Set data.padding: longest"

_VARLEN_OPTIONS = {"scale", "window_size", "enable_gqa"}
_VARLEN_FITS_TREES = inspect.signature(varlen_attn).parameters.keys() >= _VARLEN_OPTIONS


def hidden_states(backbone: nn.Module, batch: PreferenceBatch) -> Tensor:
    """Last hidden states (R, L, D), after the final norm.

    Only completions and each prompt's last token hold a meaning; see :mod:`.last_layer`.

    ``backbone`` is the decoder of a transformers causal language model (``Qwen2Model``, …), with
    LoRA layers injected or without. The model and its config stay as they are for all other uses.
    """
    known: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if batch.trees is None:
        rows: Tensor = backbone(**known, use_cache=False).last_hidden_state
        return rows

    layers = prepare(backbone)
    layout = TreeLayout(batch.trees, *batch.input_ids.shape)
    output: Tensor = backbone(
        **known,
        attention_mask=_no_mask(layout, batch.input_ids.device),
        use_cache=False,
        tree_layout=layout,
    ).last_hidden_state
    if layout.calls != layers:
        raise ModelError(
            f"{type(backbone).__name__}: {layout.calls} of {layers} layers attended by trees, so "
            f"this model does not pass the layout on to its attention. {_REMEDY}."
        )
    return output


def prepare(backbone: nn.Module) -> int:
    """Make the backbone's attention able to read ``tree_layout``; answer its number of layers.

    Calls without that argument go on as before. Repeating it does nothing. A model or a backend
    that cannot attend by trees is refused with a :class:`ModelError` that names it; call it after
    loading a model to know before training starts.
    """
    modules = _attention_modules(backbone)
    _refuse_unfit(backbone, modules)
    last = max(modules, key=lambda module: module.layer_idx)
    if not isinstance(last.config, _TreeConfig):
        ReadPositions().install(_layer_of(last, backbone), last)
    for module in modules:
        if not isinstance(module.config, _TreeConfig):
            module.config = _TreeConfig(module.config)
    return len(modules)


# --- eager and sdpa: tree by tree ----------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """A model's dense attention function, as the trees of one layer use it."""

    plain: Callable[..., Any]
    module: nn.Module
    layout: TreeLayout
    window: int | None
    is_last_layer: bool  # of a prompt only the last token's output is read
    additive: bool  # masks as numbers to add (eager), not as bool; and never left out
    options: dict[str, Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, before: int) -> Tensor:
        """q (B, H, Q, d), k and v (B, H', before + Q, d) → (B, Q, H, d), causal and windowed."""
        queries = q.shape[2]
        window = self.window if self.window and self.window < before + queries else None
        mask = None
        if before or window or self.additive:
            dtype = q.dtype if self.additive else None
            mask = self.layout.path_mask(queries, before, window, q.device, dtype)
        output: Tensor
        output, _ = self.plain(self.module, q, k, v, mask, **self.options)
        return output


def attend_by_tree(dense: Dense, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (R, H, L, d), k and v (R, H', L, d) → (R, L, H, d), zero at padding."""
    layout = dense.layout
    rows = []
    # Splits, not slices: the backward of all pieces together is one concatenation, where that of
    # each slice would be a whole tensor of zeros.
    for trees, *row in zip(layout.by_row, *(x.chunk(layout.rows) for x in (q, k, v)), strict=True):
        segments = [length for tree in trees for length in _segments(tree)]
        padding = layout.length - sum(segments)
        queries, keys, values = (x.split_with_sizes([*segments, padding], dim=2) for x in row)
        outputs: list[Tensor] = []  # (1, tokens, H, d)
        first = 0
        for tree in trees:
            here = slice(first, first + len(tree.branch_lengths))
            outputs += _one_tree(dense, tree.prompt_length, queries[here], keys[here], values[here])
            first = here.stop
        rows.append(_padded(torch.cat(outputs, dim=1), 0, padding))
    return torch.cat(rows)


def _segments(tree: Tree) -> tuple[int, ...]:
    """Tokens of the prompt with its first branch, and of each other branch."""
    first, *others = tree.branch_lengths
    return (tree.prompt_length + first, *others)


def _one_tree(
    dense: Dense, prompt: int, q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Segments, each (1, H, tokens, d) → their outputs (1, tokens, H, d)."""
    unread = prompt - 1 if dense.is_last_layer else 0
    queries = q[0][:, :, unread:] if unread else q[0]  # a slice of all costs a copy in backward
    yield _padded(dense(queries, k[0], v[0], unread), unread, 0)

    # the keys of the prompt that a branch's first token sees; later tokens see no earlier ones
    seen = prompt if dense.window is None else min(prompt, dense.window - 1)
    keys, values = (x[0][:, :, prompt - seen : prompt] for x in (k, v))
    for branch, own_keys, own_values in zip(q[1:], k[1:], v[1:], strict=True):
        yield dense(
            branch, torch.cat((keys, own_keys), dim=2), torch.cat((values, own_values), dim=2), seen
        )


def _padded(output: Tensor, before: int, after: int) -> Tensor:
    """(1, tokens, H, d) with zeros before and after; itself for none, where ``F.pad`` copies."""
    return F.pad(output, (0, 0, 0, 0, before, after)) if before or after else output


# --- attention in one variable-length call --------------------------------------------------------


def _flatten(x: Tensor) -> Tensor:
    """(R, H, L, d) → (R·L, H, d)"""
    return x.transpose(1, 2).flatten(0, 1)


def _in_sequences(
    layout: TreeLayout, q: Tensor, k: Tensor, v: Tensor, is_last_layer: bool
) -> tuple[Sequences, tuple[Tensor, Tensor, Tensor]]:
    """Bounds; queries (N, H, d), keys and values (ΣN, H', d); of the last layer what is read."""
    sequences = layout.sequences(q.device, only_read=is_last_layer)
    queries = layout.gather_read(_flatten(q)) if is_last_layer else _flatten(q)
    keys, values = (_flatten(x)[sequences.key_index] for x in (k, v))
    return sequences, (queries, keys, values)


def _in_rows(layout: TreeLayout, outputs: Tensor, is_last_layer: bool) -> Tensor:
    """(N, H, d), or with a leading 1, → (R, L, H, d), zero where nothing reads"""
    flat = outputs.reshape(-1, *outputs.shape[-2:])
    flat = layout.spread_read(flat) if is_last_layer else flat
    return flat.view(layout.rows, layout.length, *flat.shape[1:])


def attend_flash(
    plain: Callable[..., Any],
    module: nn.Module,
    layout: TreeLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_last_layer: bool,
    options: dict[str, Any],
) -> Tensor:
    """Through transformers' flash function, which takes ready sequence bounds → (R, L, H, d)."""
    sequences, states = _in_sequences(layout, q, k, v, is_last_layer)
    output, _ = plain(
        module,
        *(x.transpose(0, 1)[None] for x in states),
        None,
        cu_seq_lens_q=sequences.query_bounds,
        cu_seq_lens_k=sequences.key_bounds,
        max_length_q=sequences.longest_query,
        max_length_k=sequences.longest_key,
        **options,
    )
    return _in_rows(layout, output, is_last_layer)


def attend_varlen(
    layout: TreeLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_last_layer: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Through torch's own variable-length attention → (R, L, H, d)."""
    sequences, states = _in_sequences(layout, q, k, v, is_last_layer)
    output: Any = varlen_attn(
        *states,
        sequences.query_bounds,
        sequences.key_bounds,
        sequences.longest_query,
        sequences.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return _in_rows(layout, output, is_last_layer)


def _fits_varlen(q: Tensor, v: Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's variable-length kernel can take this call: plain, half precision, sm80+."""
    return (
        q.is_cuda
        and _VARLEN_FITS_TREES
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] == v.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and not options.get("dropout")
        and options.get("softcap") is None
        and options.get("s_aux") is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


# --- how a model comes to call this --------------------------------------------------------------


class _TreeConfig:
    """What an attention module sees as its config: the model's own, live, but for one name.

    The name of the attention function leads to :func:`_attention`. The shared config is not
    touched, so masks, saving, other models of the same config and later changes of the
    implementation work as if this were not here; and since it stays in place, a layer that
    gradient checkpointing runs again in the backward pass attends as it did in the forward pass.
    """

    def __init__(self, plain: Any) -> None:
        self.__dict__["plain"] = plain

    def __getattr__(self, name: str) -> Any:
        if "plain" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return getattr(self.__dict__["plain"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["plain"], name, value)

    @property
    def _attn_implementation(self) -> Any:
        plain = self.__dict__["plain"]._attn_implementation
        return _PREFIX + plain if _is_known(plain) else plain


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Any,
    tree_layout: TreeLayout | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The attention function of a prepared model: the plain one, unless there is a layout."""
    if tree_layout is not None:
        return _attention_in_trees(module, q, k, v, tree_layout, options), None
    with _own_config(module) as name:
        result: tuple[Tensor, Any] = _plain(module, name)(
            module, q, k, v, attention_mask, **options
        )
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the shapes of every tree are new; what surrounds it compiles
def _attention_in_trees(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TreeLayout,
    options: dict[str, Any],
) -> Tensor:
    layout.calls += 1
    window = _window(module, options)
    config: Any = module.config
    is_last = module.layer_idx == config.num_hidden_layers - 1
    with _own_config(module) as name:
        plain = _plain(module, name)
        if name == "flex_attention":
            blocks = layout.block_mask(window, q.device)
            output: Tensor = plain(module, q, k, v, blocks, **options)[0]
        elif _is_flash(name):
            output = attend_flash(plain, module, layout, q, k, v, is_last, options)
        elif name == "sdpa" and _fits_varlen(q, v, options):
            output = attend_varlen(layout, q, k, v, is_last, options.get("scaling"), window)
        else:
            dense = Dense(plain, module, layout, window, is_last, name == "eager", options)
            output = attend_by_tree(dense, q, k, v)
    return output


def _window(module: nn.Module, options: dict[str, Any]) -> int | None:
    """The layer's sliding window; what a tree cannot be cut from is refused."""
    window: int | None = options.get("sliding_window")
    kinds = getattr(module.config, "layer_types", None)
    if window is None and kinds and kinds[module.layer_idx] == "sliding_attention":
        raise ModelError(_refusal(module, "a sliding-window layer does not pass its window"))
    if options.get("position_bias") is not None:
        raise ModelError(_refusal(module, "attention adds a bias by absolute place in the row"))
    return window


@contextmanager
def _own_config(module: nn.Module) -> Iterator[str]:
    """The module with the model's config again, as the plain functions expect it; its backend."""
    view: Any = module.config
    module.config = view.plain
    try:
        yield view.plain._attn_implementation
    finally:
        module.config = view


def _plain(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that the model would have called; eager ones live in its file."""
    found: Callable[..., Any]
    if name == "eager":
        found = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    else:
        found = ALL_ATTENTION_FUNCTIONS[name]
    return found


def _is_flash(name: str) -> bool:
    """Flash attention from its package, or as a kernel that transformers fetches in its stead."""
    return name in FLASH or (name.startswith("kernels-community/") and "flash-attn" in name)


def _is_known(name: object) -> bool:
    return isinstance(name, str) and _PREFIX + name in ALL_ATTENTION_FUNCTIONS


def _no_mask(layout: TreeLayout, device: torch.device) -> Tensor:
    """A mask that a decoder hands on untouched (it has 4 dimensions) and that fits no attention:
    were it ever used, the shapes would not match."""
    size = layout.length + 1
    return torch.zeros((), dtype=torch.bool, device=device).expand(1, 1, size, size)


def _layer_of(attention: nn.Module, backbone: nn.Module) -> nn.Module:
    """The decoder layer that an attention module belongs to."""
    return next(m for m in backbone.modules() if attention in set(m.children()))


# --- what is refused -----------------------------------------------------------------------------


def _attention_modules(backbone: nn.Module) -> list[Any]:
    wanted = ("config", "layer_idx", "is_causal")
    return [m for m in backbone.modules() if all(hasattr(m, name) for name in wanted)]


def _refuse_unfit(backbone: nn.Module, modules: list[Any]) -> None:
    """Raise for a model that trees cannot be computed with, naming what stands in the way."""
    config: Any = backbone.config
    name = config._attn_implementation
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(_refusal(backbone, "it is an encoder and a decoder"))
    if foreign := kinds - {"full_attention", "sliding_attention"}:
        raise ModelError(_refusal(backbone, f"it has layers of kind {', '.join(sorted(foreign))}"))
    if (
        not getattr(backbone, "_supports_attention_backend", False)
        or len(modules) != config.num_hidden_layers
        or not all(module.is_causal for module in modules)
    ):
        raise ModelError(_refusal(backbone, "its attention cannot be exchanged"))
    if name not in BACKENDS and not _is_flash(name):
        known = ", ".join(BACKENDS)
        raise ModelError(
            _refusal(backbone, f"attn_implementation is {name!r}")
            + f" Or set model.attn_implementation to one of {known}."
        )
    if name == "flex_attention" and next(backbone.parameters()).device.type == "cpu":
        raise ModelError(
            _refusal(backbone, "flex_attention has no backward pass on CPU")
            + " Or set model.attn_implementation: sdpa."
        )
    if name == "eager" and not all(_has_eager(module) for module in modules):
        raise ModelError(_refusal(backbone, "its eager attention cannot be found"))
    if not _is_known(name):  # a kernel under its own name
        AttentionInterface.register(_PREFIX + name, _attention)


def _has_eager(module: nn.Module) -> bool:
    return hasattr(sys.modules[type(module).__module__], "eager_attention_forward")


def _refusal(module: nn.Module, reason: str) -> str:
    kind = getattr(module.config, "model_type", type(module).__name__)
    return f"{kind} cannot be trained on packed trees: {reason}. {_REMEDY}."


for _name in BACKENDS:
    AttentionInterface.register(_PREFIX + _name, _attention)
