"""First-generation Qwen against a forward pass of its own, and the families that load as they are.

The checkpoints are random and written in the first generation's layout; :func:`forward` computes
what its architecture says, from those very tensors and without any model class.
"""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cpo_arabic.data.byte_pairs import read_ranks
from cpo_arabic.errors import DataError, ModelError
from cpo_arabic.modeling.legacy_qwen import SPECIAL_TOKENS, qwen2_config
from cpo_arabic.modeling.loading import ModelSource, load_model, load_tokenizer
from cpo_arabic.run.training import train
from cpo_arabic.training.observer import SilentObserver

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

TOLERANCE = 1e-4
"""Float32 rounding; the logits' standard deviation is about 3."""
DEMO = Path(__file__).resolve().parents[2] / "demo" / "base-model"
SETTINGS: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "model_type": "qwen",
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "kv_channels": 16,
    "intermediate_size": 88,
    "layer_norm_epsilon": 1e-4,
    "rotary_emb_base": 700,
    "rotary_pct": 1.0,
    "seq_length": 64,
    "max_position_embeddings": 256,
    "no_bias": True,
    "scale_attn_weights": True,
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "use_flash_attn": "auto",
    "tie_word_embeddings": False,
}


def random_weights(settings: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Tensors in the first generation's layout, large enough that every part matters."""
    draw = torch.Generator().manual_seed(seed)
    hidden, width = settings["hidden_size"], settings["intermediate_size"] // 2
    rows = settings["vocab_size"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) / math.sqrt(shape[-1])

    def gain() -> Tensor:
        return 1 + 0.3 * torch.randn(hidden, generator=draw)

    weights = {"transformer.wte.weight": torch.randn((rows, hidden), generator=draw)}
    for n in range(settings["num_hidden_layers"]):
        block = {
            "ln_1.weight": gain(),
            "attn.c_attn.weight": 2 * normal(3 * hidden, hidden),
            "attn.c_attn.bias": torch.randn(3 * hidden, generator=draw),
            "attn.c_proj.weight": normal(hidden, hidden),
            "ln_2.weight": gain(),
            "mlp.w1.weight": normal(width, hidden),
            "mlp.w2.weight": 2 * normal(width, hidden),
            "mlp.c_proj.weight": normal(hidden, width),
        }
        weights |= {f"transformer.h.{n}.{name}": tensor for name, tensor in block.items()}
    weights["transformer.ln_f.weight"] = gain()
    if not settings["tie_word_embeddings"]:
        weights["lm_head.weight"] = 3 * normal(rows, hidden)
    return weights


def forward(settings: dict[str, Any], weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """The first generation's logits of one row, in double precision."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, size = settings["num_attention_heads"], settings["kv_channels"]
    length = len(ids)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + settings["layer_norm_epsilon"]) * gain

    def rotate(x: Tensor) -> Tensor:
        """Turns coordinate i and i + size/2 of each head by position · base^(-2i/size)."""
        half = size // 2
        out = torch.empty_like(x)
        for position in range(length):
            for i in range(half):
                angle = position * settings["rotary_emb_base"] ** (-2 * i / size)
                a, b = x[position, :, i], x[position, :, i + half]
                out[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["transformer.wte.weight"][ids]
    for n in range(settings["num_hidden_layers"]):
        p = f"transformer.h.{n}."
        fused = norm(x, w[p + "ln_1.weight"]) @ w[p + "attn.c_attn.weight"].T
        fused = fused + w[p + "attn.c_attn.bias"]
        query, key, value = fused.view(length, 3, heads, size).unbind(1)
        query, key = rotate(query), rotate(key)
        mixed = torch.zeros(length, heads, size, dtype=torch.float64)
        for row in range(length):
            for head in range(heads):
                scores = key[: row + 1, head] @ query[row, head] / math.sqrt(size)
                mixed[row, head] = scores.softmax(0) @ value[: row + 1, head]
        x = x + mixed.view(length, heads * size) @ w[p + "attn.c_proj.weight"].T
        h = norm(x, w[p + "ln_2.weight"])
        branches = (h @ w[p + "mlp.w1.weight"].T) * F.silu(h @ w[p + "mlp.w2.weight"].T)
        x = x + branches @ w[p + "mlp.c_proj.weight"].T
    head_weight = w.get("lm_head.weight", w["transformer.wte.weight"])
    return norm(x, w["transformer.ln_f.weight"]) @ head_weight.T


def write_shards(folder: Path, weights: dict[str, Tensor], kind: str, count: int) -> None:
    """The weights in ``count`` files of a kind with their index, or in one without."""

    def write(path: Path, part: dict[str, Tensor]) -> None:
        if kind == "safetensors":
            save_file(part, path, metadata={"format": "pt"})
        else:
            torch.save(part, path)

    stem = "model" if kind == "safetensors" else "pytorch_model"
    if count == 1:
        write(folder / f"{stem}.{kind}", weights)
        return
    names = sorted(weights)
    index: dict[str, str] = {}
    for number in range(count):
        file = f"{stem}-{number + 1:05}-of-{count:05}.{kind}"
        part = {name: weights[name] for name in names[number::count]}
        index |= dict.fromkeys(part, file)
        write(folder / file, part)
    content = {"metadata": {}, "weight_map": index}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(content))


def write_model(
    folder: Path,
    weights: dict[str, Tensor],
    *,
    kind: str = "safetensors",
    shards: int = 1,
    **changes: Any,
) -> Path:
    """A repository as the first generation's are laid out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))
    write_shards(folder, weights, kind, shards)
    return folder


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(SETTINGS)


@pytest.fixture(scope="module")
def truth(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids up to the whole of ``seq_length`` and their logits."""
    ids = torch.randint(0, 101, (64,), generator=torch.Generator().manual_seed(1))
    return ids, forward(SETTINGS, weights, ids.tolist())


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids[None]).logits[0]
    return result


def source(folder: Path, **changes: Any) -> ModelSource:
    return replace(ModelSource(str(folder)), **changes)


# The function that the weights compute


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_mapped_model_computes_the_first_generation_logits(
    tmp_path: Path,
    weights: dict[str, Tensor],
    truth: tuple[Tensor, Tensor],
    kind: str,
    shards: int,
) -> None:
    model = load_model(source(write_model(tmp_path / "m", weights, kind=kind, shards=shards)))
    assert type(model) is Qwen2ForCausalLM
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 64
    ids, expected = truth
    assert expected.std() > 1
    torch.testing.assert_close(logits(model, ids).double(), expected, atol=TOLERANCE, rtol=0)


def test_the_comparison_notices_each_part(
    weights: dict[str, Tensor], truth: tuple[Tensor, Tensor]
) -> None:
    """Were two parts swapped or one setting misread, the logits would be far off."""
    ids, expected = truth[0][:16], truth[1][:16]
    block, hidden = "transformer.h.1.", SETTINGS["hidden_size"]
    w1, w2 = weights[block + "mlp.w1.weight"], weights[block + "mlp.w2.weight"]
    fused = weights[block + "attn.c_attn.weight"].view(3, hidden, hidden)
    bias = weights[block + "attn.c_attn.bias"].view(3, hidden)
    changed_weights = {
        "branches": {block + "mlp.w1.weight": w2, block + "mlp.w2.weight": w1},
        "order": {block + "attn.c_attn.weight": fused[[1, 0, 2]].reshape(-1, hidden)},
        "bias": {block + "attn.c_attn.bias": bias[[0, 2, 1]].reshape(-1)},
    }
    changed_settings: dict[str, dict[str, Any]] = {
        "base": {"rotary_emb_base": 10000},
        "eps": {"layer_norm_epsilon": 0.05},
    }
    for change in changed_weights.values():
        assert (forward(SETTINGS, weights | change, ids.tolist()) - expected).abs().max() > 0.1
    for setting in changed_settings.values():
        assert (forward(SETTINGS | setting, weights, ids.tolist()) - expected).abs().max() > 0.1


def test_a_tied_head_is_the_embedding_with_or_without_its_copy(tmp_path: Path) -> None:
    settings: dict[str, Any] = SETTINGS | {"tie_word_embeddings": True}
    weights = random_weights(settings, seed=5)
    ids = torch.arange(12)
    expected = forward(settings, weights, ids.tolist())
    embedding = weights["transformer.wte.weight"]
    copies: dict[str, dict[str, Tensor]] = {
        "without": {},
        "with": {"lm_head.weight": embedding.clone()},
    }
    for name, extra in copies.items():
        folder = write_model(tmp_path / name, weights | extra, tie_word_embeddings=True)
        model = load_model(source(folder))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(logits(model, ids).double(), expected, atol=TOLERANCE, rtol=0)
    other = write_model(
        tmp_path / "other", weights | {"lm_head.weight": embedding + 1}, tie_word_embeddings=True
    )
    with pytest.raises(ModelError, match=r"tie_word_embeddings is true, but lm_head\.weight"):
        load_model(source(other))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_attention_are_those_asked_for(
    tmp_path: Path,
    weights: dict[str, Tensor],
    truth: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    backend: str,
) -> None:
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    folder = write_model(tmp_path / "m", half, shards=2)
    model = load_model(source(folder, dtype=dtype, attn_implementation=backend))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config._attn_implementation == backend
    ids = truth[0][:20]
    expected = forward(SETTINGS, half, ids.tolist())
    error = (logits(model, ids).double() - expected).abs()
    if dtype == torch.float32:
        assert error.max() < TOLERANCE
    else:
        assert error.mean() < 0.05 * expected.std()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_every_parameter_has_memory_of_its_own(
    tmp_path: Path, weights: dict[str, Tensor], kind: str
) -> None:
    """No parameter lies in the mapped file or in the fused tensor it was cut from."""
    folder = write_model(tmp_path / "m", weights, kind=kind)
    model = load_model(source(folder))
    storages = [p.untyped_storage() for p in model.parameters()]
    assert [s.nbytes() for s in storages] == [4 * p.numel() for p in model.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    again = load_model(source(folder))
    assert torch.equal(again.model.norm.weight, weights["transformer.ln_f.weight"])


def test_saved_it_is_a_plain_qwen2(
    tmp_path: Path, weights: dict[str, Tensor], truth: tuple[Tensor, Tensor]
) -> None:
    model = load_model(source(write_model(tmp_path / "m", weights)))
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").model_type == "qwen2"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again, truth[0]), logits(model, truth[0]))


def test_a_hub_repository_loads_by_name_and_revision(
    tmp_path: Path, weights: dict[str, Tensor], truth: tuple[Tensor, Tensor]
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--Toy--Qwen-toy"
    write_model(repository / "snapshots" / commit, weights, shards=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    init = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model = load_model(ModelSource("Toy/Qwen-toy", revision="v1", init_kwargs=init))
    torch.testing.assert_close(logits(model, truth[0]).double(), truth[1], atol=TOLERANCE, rtol=0)
    assert model.name_or_path == "Toy/Qwen-toy"
    with pytest.raises(ModelError, match="Toy/Qwen-toy"):
        load_model(ModelSource("Toy/Qwen-toy", revision="v2", init_kwargs=init))


def test_generation_stops_where_the_checkpoint_says(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    folder = write_model(tmp_path / "m", weights)
    for chat_format, end in (("raw", 90), ("chatml", [90, 92])):
        content = {"chat_format": chat_format, "eos_token_id": 90, "pad_token_id": 90}
        (folder / "generation_config.json").write_text(json.dumps(content))
        generation = load_model(source(folder)).generation_config
        assert (generation.eos_token_id, generation.pad_token_id) == (end, 90)


# What is refused


def test_keys_that_are_missing_unexpected_or_misshapen_are_named(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    wrong = dict(weights)
    wrong["transformer.h.1.mlp.w3.weight"] = wrong.pop("transformer.h.1.mlp.w2.weight")
    wrong["transformer.ln_f.weight"] = torch.ones(47)
    with pytest.raises(ModelError) as caught:
        load_model(source(write_model(tmp_path / "m", wrong, shards=2)))
    assert str(caught.value) == (
        "this first-generation Qwen cannot be mapped onto Qwen2: the checkpoint lacks "
        "transformer.h.1.mlp.w2.weight; it also has transformer.h.1.mlp.w3.weight; it has in "
        "another shape transformer.ln_f.weight (47,) instead of (48,)"
    )


@pytest.mark.parametrize(
    "name", [n for n in random_weights(SETTINGS) if ".h." not in n or ".h.1." in n]
)
def test_no_weight_may_be_missing(tmp_path: Path, weights: dict[str, Tensor], name: str) -> None:
    rest = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ModelError, match=f"lacks {name}$"):
        load_model(source(write_model(tmp_path / "m", rest)))


def test_old_buffers_are_no_unexpected_keys(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    buffers = {
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.rotary_emb.inv_freq": torch.ones(8),
    }
    model = load_model(source(write_model(tmp_path / "m", weights | buffers)))
    assert not any(
        "masked_bias" in name or "rotary" in name for name, _ in model.named_parameters()
    )


def test_a_key_in_two_shards_and_a_lost_shard_are_refused(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    folder = write_model(tmp_path / "m", weights, shards=2)
    first, second = sorted(folder.glob("model-*.safetensors"))
    part = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file(part | {name: tensor.clone()}, second)
    with pytest.raises(ModelError, match=f"{name} in more than one shard"):
        load_model(source(folder))
    save_file(part, second)
    first.unlink()
    with pytest.raises(ModelError, match=f"lacks the shard '{first.name}'"):
        load_model(source(folder))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_model(source(folder))


class Payload:
    """What a hostile pickle would run on loading."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return Path.touch, (Path("never"),)  # type: ignore[return-value]


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_model(tmp_path / "m", weights, kind="bin")
    torch.save(weights | {"x": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read as weights alone"):
        load_model(source(folder))
    assert not (tmp_path / "never").exists()
    torch.save(weights | {"step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="does not hold named tensors alone"):
        load_model(source(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_refused(tmp_path: Path, weights: dict[str, Tensor], file: str) -> None:
    folder = write_model(tmp_path / "m", weights, kind=file.rsplit(".", 1)[-1])
    (folder / file).write_bytes((folder / file).read_bytes()[:-5000])
    with pytest.raises(ModelError, match=f"{file} cannot be read"):
        load_model(source(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_bias": False}, "no_bias is False"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"emb_dropout_prob": 0.1}, "emb_dropout_prob is 0.1"),
        ({"kv_channels": 8}, "num_attention_heads 3 times kv_channels 8 is not hidden_size 48"),
        ({"intermediate_size": 87}, "intermediate_size 87 counts two equal branches"),
        ({"hidden_size": None}, "hidden_size is None, not a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"seq_length": "64"}, "seq_length is '64'"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6', not a number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set: quantised weights"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is set"),
        ({"visual": {"layers": 48}}, "visual is set: an image encoder"),
        ({"audio": {"n_layer": 32}}, "audio is set: an audio encoder"),
    ],
)
def test_settings_that_qwen2_cannot_represent_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        qwen2_config(SETTINGS | change)


def test_the_published_sizes_give_the_published_shapes() -> None:
    """Qwen-7B's settings: 32 layers of 4096, feed-forward branches of 11008."""
    config = qwen2_config(
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "kv_channels": 128,
            "intermediate_size": 22016,
            "layer_norm_epsilon": 1e-6,
            "rotary_emb_base": 10000,
            "seq_length": 8192,
        }
    )
    assert (config.intermediate_size, config.num_key_value_heads) == (11008, 32)
    assert config.rope_parameters["rope_theta"] == 10000.0
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 7_721_324_544


def test_an_option_given_twice_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_model(tmp_path / "m", weights)
    with pytest.raises(ModelError, match="model_init_kwargs sets dtype"):
        load_model(source(folder, init_kwargs={"dtype": "float16"}))


# The tokenizer

TEXT = (
    "كتب الطالب الدرس في الكتاب ثم كتب الرسالة إلى صديقه and then he wrote a letter to the writer"
)


def learn_ranks(text: str, merges: int) -> dict[bytes, int]:
    """Byte-pair ranks of a text; single bytes first, in no natural order."""
    ranks = {bytes([(byte * 73 + 11) % 256]): byte for byte in range(256)}
    words = [[bytes([b]) for b in f" {word}".encode()] for word in text.split()]
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (left, right), _count = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks.setdefault(left + right, len(ranks))
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return ranks


def encode_word(ranks: dict[bytes, int], word: str) -> list[int]:
    """tiktoken's rule: merge the neighbours whose union has the lowest rank, until none has one."""
    parts = [bytes([b]) for b in unicodedata.normalize("NFC", word).encode()]
    while True:
        unions = [a + b for a, b in pairwise(parts)]
        known = [union for union in unions if union in ranks]
        if not known:
            return [ranks[part] for part in parts]
        i = unions.index(min(known, key=ranks.__getitem__))
        parts = [*parts[:i], unions[i], *parts[i + 2 :]]


def write_tokenizer(folder: Path, ranks: dict[bytes, int], chat_format: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    settings = {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat_format is not None:
        content = json.dumps({"chat_format": chat_format})
        (folder / "generation_config.json").write_text(content)
    return folder


def load(folder: Path) -> Any:
    return load_tokenizer(str(folder), revision=None, trust_remote_code=False)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return learn_ranks(TEXT, 60)


def test_ids_are_the_ranks_and_the_control_tokens_follow(
    tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    tokenizer = load(write_tokenizer(tmp_path / "t", ranks))
    assert tokenizer.is_fast
    assert len(tokenizer) == len(ranks) + 208
    words = [*TEXT.split(), "الكاتبة", "writers", "café", "cafe\u0301", "ﷺ", "لا"]
    for word in words:
        assert tokenizer(word)["input_ids"] == encode_word(ranks, word)
        assert tokenizer(f" {word}")["input_ids"] == encode_word(ranks, f" {word}")
    for token, rank in ranks.items():
        if token.decode("utf-8", errors="replace").encode() == token:
            assert tokenizer.decode([rank]) == token.decode()
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    first = len(ranks)
    expected = [first, first + 1, first + 2, first + 3, first + 207]
    assert tokenizer.convert_tokens_to_ids(controls) == expected
    assert tokenizer("".join(controls))["input_ids"] == expected
    assert len(SPECIAL_TOKENS) == 208
    assert tokenizer.decode(expected, skip_special_tokens=True) == ""


def test_text_survives_the_round_trip_and_a_save(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    tokenizer = load(write_tokenizer(tmp_path / "t", ranks))
    text = f"  {TEXT}\n\n٣٤ 12،؟  \t🙂 'll ّ <|im_start|>user\nسَلام<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text)["input_ids"] == ids
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.eos_token, again.pad_token) == ("<|endoftext|>", "<|endoftext|>")


def test_the_end_of_a_completion_follows_the_chat_format(
    tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    for chat_format, end in ((None, 0), ("raw", 0), ("chatml", 2)):
        tokenizer = load(write_tokenizer(tmp_path / str(chat_format), ranks, chat_format))
        assert tokenizer.eos_token_id == len(ranks) + end
        assert tokenizer.pad_token_id == len(ranks)
        assert (tokenizer.bos_token, tokenizer.unk_token) == (None, None)
        assert bool(tokenizer.chat_template) == (chat_format == "chatml")
        assert tokenizer.model_max_length == 64
    chat = [{"role": "user", "content": "كتب"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>user\nكتب<|im_end|>\n<|im_start|>assistant\n"


def test_ranks_that_make_no_tokenizer_are_refused(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    first_byte = next(iter(ranks))
    gap = {t: r + (r > 300) for t, r in ranks.items()}
    no_byte = {t: i for i, t in enumerate(t for t in ranks if t != first_byte)}
    for number, (bad, message) in enumerate(
        [
            (gap, "without a gap"),
            (no_byte, "has no token"),
            (ranks | {"ظغض".encode(): len(ranks)}, "is not the merge of two tokens"),
        ]
    ):
        with pytest.raises(ModelError, match=message):
            load(write_tokenizer(tmp_path / str(number), bad))
    for content, message in (
        (b"YQ== 0\nYQ== 1\n", "has rank 0 and 1"),
        (b"YQ== 0\nYQ==\n", ":2: "),
        (b"!! 0\n", ":1: "),
    ):
        (tmp_path / "bad.tiktoken").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_ranks(tmp_path / "bad.tiktoken")


def test_a_folder_of_legacy_weights_with_another_tokenizer_uses_that_one(tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    assert len(load(tmp_path)) == len(AutoTokenizer.from_pretrained(DEMO))


# Training

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, Callable[[int], Any]] = {
    "qwen2": lambda v: Qwen2ForCausalLM(
        Qwen2Config(vocab_size=v, tie_word_embeddings=True, **SIZES)
    ),
    "qwen2.5": lambda v: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=v,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            **SIZES,
        )
    ),
    "qwen3": lambda v: Qwen3ForCausalLM(
        Qwen3Config(vocab_size=v, tie_word_embeddings=True, head_dim=16, **SIZES)
    ),
}


def run_two_steps(toy_config: Callable[..., Any], name: Path, *overrides: str) -> Any:
    """Two steps; every loss finite and the adapters or weights written."""
    result = train(
        toy_config(f"model.name={name}", "training.max_steps=2", *overrides), SilentObserver()
    )
    assert result.outcome.step == 2
    lines = result.directory.metrics.read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses and all(math.isfinite(loss) for loss in losses)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_later_families_load_as_they_are_and_train(
    tmp_path: Path, toy_config: Callable[..., Any], family: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    torch.manual_seed(0)
    made = FAMILIES[family](len(tokenizer)).eval()
    folder = tmp_path / "model"
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = load_model(source(folder))
    assert type(loaded) is type(made)
    ids = torch.arange(20)
    assert torch.equal(logits(loaded, ids), logits(made, ids))
    run_two_steps(toy_config, folder)


@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_first_generation_model_trains_and_leaves_a_qwen2(
    tmp_path: Path, toy_config: Callable[..., Any], way: str
) -> None:
    later = AutoTokenizer.from_pretrained(DEMO)
    vocabulary = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()}
    changes: dict[str, Any] = {
        "vocab_size": len(ranks) + 208 + 7,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "intermediate_size": 128,
        "seq_length": 512,
    }
    folder = write_tokenizer(tmp_path / "model", ranks)
    weights = random_weights(SETTINGS | changes)
    weights["lm_head.weight"] /= 3
    write_model(folder, weights, shards=2, **changes)
    tokenizer = load(folder)
    text = "قال المعلم: «اقرأ الدرس» ثم خرج.\n"
    assert tokenizer(text)["input_ids"] == later(text)["input_ids"]

    result = run_two_steps(
        toy_config, folder, f"optimization.use_lora={'true' if way == 'lora' else 'false'}"
    )
    final = result.directory.final
    assert AutoTokenizer.from_pretrained(final)(text)["input_ids"] == tokenizer(text)["input_ids"]
    if way == "full":
        model = AutoModelForCausalLM.from_pretrained(final)
        assert type(model) is Qwen2ForCausalLM
        assert not torch.equal(
            model.model.layers[0].mlp.up_proj.weight, weights["transformer.h.0.mlp.w1.weight"]
        )
    else:
        adapter = json.loads((final / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(folder)
