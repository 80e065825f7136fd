"""A packed batch must give what one row per completion gives, whatever model and backend.

The comparison is always with ``longest``: plain causal rows, which need nothing from tree.py.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.bart.modeling_bart import BartDecoder

from cpo_arabic.data.pack import Padding, PreferenceBatch, TokenizedGroup, collate
from cpo_arabic.errors import ModelError
from cpo_arabic.modeling import tree as tree_module
from cpo_arabic.modeling.layout import TreeLayout
from cpo_arabic.modeling.tree import hidden_states, prepare

# peft, and these tests, use names that the newest transformers renames and older ones need
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# prompt length, branch lengths: ragged, single branches, one-token prompts and branches
SHAPES = ((5, (3, 7, 1)), (9, (2,)), (1, (4, 4)), (17, (6, 1, 9, 2)), (3, (1,)), (8, (12, 3)))


def build(name: str, backend: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random causal language model; weights large enough for attention to matter."""
    torch.manual_seed(0)
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model: Any = {
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "qwen2-window": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **window)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
    }[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.set_attn_implementation(backend)
    return model.to(dtype).eval()


def groups(shapes: tuple[tuple[int, tuple[int, ...]], ...] = SHAPES) -> list[TokenizedGroup]:
    rng = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(1, VOCAB, (count,), generator=rng).tolist()

    return [
        TokenizedGroup(row, ids(prompt), [ids(n) for n in branches], row, list(branches))
        for row, (prompt, branches) in enumerate(shapes)
    ]


def batch_of(padding: Padding, made: list[TokenizedGroup] | None = None) -> PreferenceBatch:
    return collate(
        made or groups(), padding=padding, pad_id=0, max_length=40, max_tokens_per_row=48
    )


def decoder(model: Any) -> Any:
    """The decoder under the head, and under peft's wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner.transformer


@dataclass
class Measured:
    """What must not depend on the layout."""

    hidden: Tensor  # (T + T + G, D) at predictors, at tokens and at prompt ends
    log_probs: Tensor  # (T)
    gradients: dict[str, Tensor]

    def assert_close(self, other: Measured, rtol: float, atol: float) -> None:
        torch.testing.assert_close(self.hidden, other.hidden, rtol=rtol, atol=atol)
        torch.testing.assert_close(self.log_probs, other.log_probs, rtol=rtol, atol=atol)
        assert self.gradients.keys() == other.gradients.keys() != set()
        for name, gradient in self.gradients.items():
            scale = float(other.gradients[name].abs().max())
            torch.testing.assert_close(
                gradient, other.gradients[name], rtol=rtol, atol=atol * max(1.0, scale), msg=name
            )


def measure(model: Any, batch: PreferenceBatch) -> Measured:
    """One forward and backward of a loss that weights every token differently."""
    model.zero_grad()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = hidden_states(decoder(model), batch).flatten(0, 1)
    logits = inner.lm_head(hidden[batch.token_predictors]).float()
    log_probs = -F.cross_entropy(logits, batch.token_targets, reduction="none")
    weights = torch.linspace(-1, 1, len(log_probs))
    ends = hidden[batch.prompt_ends].float()
    ((log_probs * weights).mean() + ends.tanh().mean()).backward()
    places = torch.cat((batch.token_predictors, batch.token_positions, batch.prompt_ends))
    named = model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return Measured(hidden[places].detach(), log_probs.detach(), gradients)


def make_exact(model: Any) -> Any:
    """float64 throughout: transformers' RMSNorm computes in float32 whatever it is given."""

    def exact(norm: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
            return norm.weight * (x * scale)

        return forward

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = exact(module)
    return model.double()


NAMES = ("qwen2", "qwen3", "llama", "qwen2-window", "mistral")


def test_the_batch_of_these_tests_is_a_hard_one() -> None:
    batch = batch_of("packed")
    assert batch.trees is not None
    assert batch.input_ids.shape[0] > 1, "several rows"
    assert len(batch.trees) > batch.input_ids.shape[0], "several trees in a row"
    assert batch.padding_share > 0, "padding at a row's end"


# --- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [*NAMES, "gpt2"])
def test_packed_rows_equal_one_row_per_completion(name: str, backend: str) -> None:
    model = build(name, backend)
    rows, trees = measure(model, batch_of("longest")), measure(model, batch_of("packed"))
    trees.assert_close(rows, rtol=1e-4, atol=2e-5)
    measure(model, batch_of("max_length")).assert_close(rows, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_equal_one_row_per_completion_in_float64(name: str) -> None:
    model = make_exact(build(name))
    rows, trees = measure(model, batch_of("longest")), measure(model, batch_of("packed"))
    assert trees.hidden.dtype == torch.float64
    torch.testing.assert_close(trees.hidden, rows.hidden, rtol=1e-10, atol=1e-10)
    trees.assert_close(rows, rtol=1e-5, atol=1e-6)  # the loss here is taken in float32


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "qwen2-window"])
def test_bf16_trees_are_as_near_to_the_truth_as_bf16_rows(name: str) -> None:
    truth = measure(make_exact(build(name)), batch_of("longest"))
    model = build(name, dtype=torch.bfloat16)
    rows, trees = (measure(model, batch_of(padding)) for padding in ("longest", "packed"))

    def error(measured: Measured) -> list[float]:
        pairs = [(measured.hidden, truth.hidden), (measured.log_probs, truth.log_probs)]
        pairs += [(measured.gradients[n], truth.gradients[n]) for n in truth.gradients]
        return [float((got.double() - t).norm() / t.double().norm()) for got, t in pairs]

    for of_trees, of_rows in zip(error(trees), error(rows), strict=True):
        assert of_trees < 1.5 * of_rows + 5e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2-window", "llama"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool, backend: str) -> None:
    model = build(name, backend).train()
    rows, trees = measure(model, batch_of("longest")), measure(model, batch_of("packed"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = measure(model, batch_of("packed"))
    again.assert_close(trees, rtol=0, atol=0)
    again.assert_close(rows, rtol=1e-4, atol=2e-5)


def _count(counts: dict[str, int], path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    counts[path] = inputs[0].shape[:-1].numel()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
def test_the_last_layer_computes_only_what_is_read(name: str, checkpointing: bool) -> None:
    model, batch = build(name).train(), batch_of("packed")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepare(decoder(model))
    positions: dict[str, dict[str, int]] = defaultdict(dict)  # part → path → how many it computed
    for path, module in decoder(model).named_modules():
        part = path.rpartition(".")[2]
        if part in ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "c_fc"):
            module.register_forward_pre_hook(partial(_count, positions[part], path))
    measure(model, batch)
    everywhere = batch.input_ids.numel()
    read = len(batch.token_targets) + len(batch.prompt_ends)
    assert read < 0.6 * everywhere
    for part, counts in positions.items():
        *others, last = counts.values()
        assert set(others) == {everywhere}
        assert last == (everywhere if part in ("k_proj", "v_proj") else read), part


def test_layers_repeated_by_checkpointing_meet_their_own_batch() -> None:
    model = build("qwen2").train()
    first, second = batch_of("packed"), batch_of("packed", groups(((4, (2, 2)), (7, (5,)))))
    expected = measure(model, first).gradients
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    hidden = hidden_states(decoder(model), first).flatten(0, 1)
    hidden_states(decoder(model), second)  # between forward and backward of the first
    logits = model.lm_head(hidden[first.token_predictors])
    log_probs = -F.cross_entropy(logits, first.token_targets, reduction="none")
    ends = hidden[first.prompt_ends].tanh().mean()
    ((log_probs * torch.linspace(-1, 1, len(log_probs))).mean() + ends).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in expected:
            torch.testing.assert_close(parameter.grad, expected[parameter_name])


def with_lora(model: Any) -> Any:
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)
    wrapped = get_peft_model(model, settings)
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "qwen2-window"])
def test_lora_gradients_are_equal(name: str, checkpointing: bool) -> None:
    model = with_lora(build(name)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows, trees = measure(model, batch_of("longest")), measure(model, batch_of("packed"))
    trees.assert_close(rows, rtol=1e-4, atol=2e-5)
    assert all("lora_" in parameter for parameter in trees.gradients)
    adapted = trees.hidden
    with model.disable_adapter(), torch.no_grad():
        batch = batch_of("packed")
        bare = hidden_states(decoder(model), batch).flatten(0, 1)[batch.token_predictors]
    assert (bare - adapted[: len(bare)]).abs().max() > 0.1


def test_no_grad_and_autocast_give_the_same_states() -> None:
    model, batch = build("qwen2"), batch_of("packed")
    expected = hidden_states(decoder(model), batch)
    assert expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(decoder(model), batch), expected)
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = measure(model, batch)
            rows = measure(model, batch_of("longest"))
        at = batch.token_predictors
        error = (low.hidden[: len(at)].float() - expected.flatten(0, 1)[at]).norm()
        assert error / expected.flatten(0, 1)[at].norm() < 0.05
        difference = (low.hidden.float() - rows.hidden.float()).norm()
        assert difference / rows.hidden.float().norm() < 0.05


def test_attention_dropout_reaches_the_trees() -> None:
    model, batch = build("qwen2").train(), batch_of("packed")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    torch.manual_seed(0)
    first = hidden_states(decoder(model), batch)
    assert not torch.allclose(first, hidden_states(decoder(model), batch))
    torch.manual_seed(0)
    torch.testing.assert_close(hidden_states(decoder(model), batch), first)


# --- what must fail, and what must not leak ------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_restarted_positions_without_tree_attention_would_be_caught(backend: str) -> None:
    """A packed row is silently wrong in a plain forward, by far more than the tolerances above."""
    model, batch, rows = build("qwen2", backend), batch_of("packed"), batch_of("longest")
    with torch.no_grad():
        right = hidden_states(decoder(model), rows).flatten(0, 1)[rows.token_positions]
        trees = hidden_states(decoder(model), batch).flatten(0, 1)[batch.token_positions]
        torch.testing.assert_close(trees, right, rtol=1e-4, atol=2e-5)
        plain = decoder(model)(input_ids=batch.input_ids, position_ids=batch.position_ids)
        everything = torch.ones_like(batch.input_ids)
        causal = decoder(model)(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=everything,
        )
    for wrong in (plain, causal):
        got = wrong.last_hidden_state.flatten(0, 1)[batch.token_positions]
        assert (got - right).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_model_that_was_not_prepared_cannot_take_the_layout_for_a_mask(backend: str) -> None:
    model, batch = build("llama", backend), batch_of("packed")
    assert batch.trees is not None
    layout = TreeLayout(batch.trees, *batch.input_ids.shape)
    mask = tree_module._no_mask(layout, torch.device("cpu"))
    with pytest.raises(RuntimeError):
        decoder(model)(input_ids=batch.input_ids, attention_mask=mask, tree_layout=layout)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "qwen3"])
def test_a_branch_reaches_no_other_branch_and_a_tree_no_other_tree(name: str) -> None:
    model, batch = build(name), batch_of("packed")
    assert batch.trees is not None
    with torch.no_grad():
        before = hidden_states(decoder(model), batch)
    owner = torch.full((batch.input_ids.numel(),), -1)
    owner[batch.token_positions] = batch.token_completions
    for s in range(len(batch.completion_lengths)):
        changed = batch.input_ids.flatten().clone()
        changed[owner == s] = (changed[owner == s] + 1) % VOCAB
        with torch.no_grad():
            after = hidden_states(
                decoder(model), replace(batch, input_ids=changed.view_as(batch.input_ids))
            )
        moved = (after != before).any(-1).flatten()
        assert moved[owner == s].all()
        assert not moved[owner != s].any()

    first = batch.trees[0]
    changed = batch.input_ids.clone()
    changed[first.row, first.start] += 1  # the root of the first tree
    with torch.no_grad():
        after = hidden_states(decoder(model), replace(batch, input_ids=changed))
    moved = (after != before).any(-1)
    inside = torch.zeros_like(moved)
    end = first.start + first.prompt_length + sum(first.branch_lengths)
    inside[first.row, first.start : end] = True
    assert moved[inside].any()
    assert not moved[~inside].any()


def test_the_shared_config_and_other_models_stay_as_they_were() -> None:
    policy = build("qwen2")
    reference = Qwen2ForCausalLM(policy.config).eval()
    reference.load_state_dict(policy.state_dict())
    before = policy.config.to_json_string(use_diff=False)
    rows = batch_of("longest")
    plain = decoder(policy)(input_ids=rows.input_ids).last_hidden_state
    hidden_states(decoder(policy), batch_of("packed"))

    assert policy.config._attn_implementation == "sdpa"
    assert policy.config.to_json_string(use_diff=False) == before
    assert all(m.config is policy.config for m in reference.modules() if hasattr(m, "config"))
    for model in (policy, reference):
        torch.testing.assert_close(
            decoder(model)(input_ids=rows.input_ids).last_hidden_state, plain, rtol=0, atol=0
        )


def test_generation_works_after_a_packed_forward() -> None:
    model = build("qwen2")
    prompt = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **options)
    hidden_states(decoder(model), batch_of("packed"))
    assert model.generate(prompt, **options).tolist() == before.tolist()


def test_a_copied_model_is_independent_and_the_backend_can_still_be_changed() -> None:
    model, batch = build("qwen2"), batch_of("packed")
    expected = hidden_states(decoder(model), batch)
    twin = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    assert twin.config._attn_implementation == "sdpa"
    for each in (model, twin):
        torch.testing.assert_close(hidden_states(decoder(each), batch), expected)
    rows = batch_of("longest")
    torch.testing.assert_close(
        hidden_states(decoder(model), rows).flatten(0, 1)[rows.token_positions],
        hidden_states(decoder(twin), rows).flatten(0, 1)[rows.token_positions],
    )


def test_a_prepared_model_is_saved_as_any_other(tmp_path: Any) -> None:
    model = build("qwen2")
    expected = hidden_states(decoder(model), batch_of("packed"))
    model.save_pretrained(tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(hidden_states(decoder(loaded), batch_of("packed")), expected)


# --- the other backends --------------------------------------------------------------------------


def by_sequences(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, scale: float, window: int
) -> Tensor:
    """Variable-length attention by its definition. q (T, H, d), k and v (N, H', d) → (T, H, d).

    Causal, the last query on the last key; ``window``: how far back a query sees, −1: all.
    """
    outputs = []
    for i in range(len(q_bounds) - 1):
        mine, keys = slice(q_bounds[i], q_bounds[i + 1]), slice(k_bounds[i], k_bounds[i + 1])
        groups = q.shape[1] // k.shape[1]
        key, value = (x[keys].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[mine], key) * scale
        place = torch.arange(key.shape[0])
        distance = place[-q[mine].shape[0] :, None] - place
        hidden = (distance < 0) | ((distance > window) if window >= 0 else False)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(outputs)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="the stand-in has the shape of a newer transformers' loader",
)
@pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "qwen3"])
def test_flash_attention_is_given_the_right_sequences(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own flash path runs; only the kernel of the package is stood in for."""
    from transformers import modeling_flash_attention_utils as flash

    asked: list[str] = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert options["causal"]
        assert options["max_seqlen_q"] == options["cu_seqlens_q"].diff().max()
        assert options["max_seqlen_k"] == options["cu_seqlens_k"].diff().max()
        assert options["cu_seqlens_q"].dtype == options["cu_seqlens_k"].dtype == torch.int32
        return by_sequences(
            q,
            k,
            v,
            options["cu_seqlens_q"],
            options["cu_seqlens_k"],
            options["softmax_scale"],
            options.get("window_size", (-1, -1))[0],
        )

    def process(**given: Any) -> dict[str, Any]:
        window = given["sliding_window"]
        return {
            "causal": given["is_causal"],
            "softmax_scale": given["softmax_scale"],
            "max_seqlen_q": given["max_seqlen_q"],
            "max_seqlen_k": given["max_seqlen_k"],
            **({"window_size": (window - 1, window - 1)} if window else {}),
        }

    def load(implementation: str, *_: Any, **__: Any) -> Any:
        asked.append(implementation)
        return (None, varlen, None, None, None), (process, None)

    monkeypatch.setattr(flash, "lazy_import_flash_attention", load)
    model = build(name)
    rows = measure(model, batch_of("longest"))
    model.config._attn_implementation_internal = "flash_attention_2"
    measure(model, batch_of("packed")).assert_close(rows, rtol=1e-4, atol=2e-5)
    assert set(asked) == {"flash_attention_2"}


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window"])
def test_torch_varlen_attention_is_given_the_right_sequences(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[int] = []

    def varlen(*tensors: Any, scale: float, window_size: tuple[int, int], **_: Any) -> Tensor:
        assert window_size[1] == 0
        queries.append(len(tensors[0]))
        return by_sequences(*tensors[:5], scale, window_size[0])

    monkeypatch.setattr(tree_module, "varlen_attn", varlen)
    monkeypatch.setattr(tree_module, "_fits_varlen", lambda *_: True)
    model = build(name)
    rows = measure(model, batch_of("longest"))
    batch = batch_of("packed")
    measure(model, batch).assert_close(rows, rtol=1e-4, atol=2e-5)
    *others, last = queries
    assert set(others) == {batch.input_ids.numel()}
    assert last == sum(1 + sum(tree.branch_lengths) for tree in batch.trees or ())


@pytest.mark.parametrize("window", [None, 4])
def test_the_block_mask_of_flex_attention_says_what_the_trees_say(window: int | None) -> None:
    batch = batch_of("packed")
    assert batch.trees is not None
    layout = TreeLayout(batch.trees, *batch.input_ids.shape)
    sees = layout.block_mask(window, torch.device("cpu")).mask_mod
    expected = torch.zeros((*batch.input_ids.shape, layout.length), dtype=torch.bool)
    for tree in batch.trees:
        prompt = list(range(tree.start, tree.start + tree.prompt_length))
        end = tree.start + tree.prompt_length
        for length in tree.branch_lengths:
            path = prompt + list(range(end, end + length))
            end += length
            for i, query in enumerate(path):
                first = 0 if window is None else max(0, i - window + 1)
                expected[tree.row, query, path[first : i + 1]] = True
    r, q, k = (torch.arange(n) for n in expected.shape)
    got = sees(r[:, None, None], torch.tensor(0), q[None, :, None], k[None, None])
    real = expected.any(-1)  # padding may see what it likes of itself, but no tree
    assert (got[real] == expected[real]).all()
    assert not got.transpose(1, 2)[real][:, :].logical_and(~expected.transpose(1, 2)[real]).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["qwen2", "qwen2-window"])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_cuda_backends_equal_rows(name: str, backend: str) -> None:
    model = build(name, dtype=torch.bfloat16).cuda()
    rows, packed = (batch_of(p).to("cuda") for p in ("longest", "packed"))
    with torch.no_grad():
        expected = hidden_states(decoder(model), rows).flatten(0, 1)[rows.token_positions]
        model.set_attn_implementation(backend)
        got = hidden_states(decoder(model), packed).flatten(0, 1)[packed.token_positions]
    assert (got - expected).float().norm() / expected.float().norm() < 0.03


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["paged|eager", "my_own_kernel"])
def test_an_unknown_backend_is_refused_by_name(backend: str) -> None:
    model = build("qwen2")
    model.config._attn_implementation_internal = backend
    with pytest.raises(ModelError, match=rf"qwen2 .*{backend[:5]}.*data.padding: longest"):
        prepare(decoder(model))


def test_flex_attention_on_cpu_is_refused() -> None:
    model = build("qwen2")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ModelError, match=r"flex_attention .* CPU.*data.padding: longest"):
        hidden_states(decoder(model), batch_of("packed"))


def test_models_that_cannot_are_refused_by_name() -> None:
    linear = build("qwen2")
    linear.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match=r"qwen2 .* layers of kind linear_attention"):
        prepare(decoder(linear))

    both = BartDecoder(BartConfig(vocab_size=VOCAB, d_model=16, decoder_layers=1))
    with pytest.raises(ModelError, match=r"bart .* an encoder and a decoder"):
        prepare(both)

    sighted = build("qwen2")
    decoder(sighted).layers[1].self_attn.is_causal = False
    with pytest.raises(ModelError, match=r"qwen2 .* attention cannot be exchanged"):
        prepare(decoder(sighted))


def test_a_model_that_keeps_the_layout_to_itself_is_refused() -> None:
    """Its attention never sees the layout, so its result would be that of a plain forward."""
    model, batch = build("qwen2"), batch_of("packed")
    layer = decoder(model).layers[2]
    plain = layer.forward

    def forgetful(*args: Any, tree_layout: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return plain(*args, attention_mask=None, **kwargs)

    layer.forward = forgetful
    with pytest.raises(ModelError, match=r"2 of 3 layers .* data.padding: longest"):
        hidden_states(decoder(model), batch)


def test_a_window_that_a_layer_keeps_to_itself_is_refused() -> None:
    model = build("qwen2-window")
    for layer in decoder(model).layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(ModelError, match="does not pass its window"):
        hidden_states(decoder(model), batch_of("packed"))
