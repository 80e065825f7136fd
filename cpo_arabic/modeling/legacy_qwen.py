"""First-generation Qwen (``model_type: qwen``), mapped onto transformers' Qwen2 without its code.

The two architectures compute the same function where the configuration allows it: RMS norms before
attention and feed-forward, rotary positions over the halves of each head, ``silu(gate) · up``. What
differs is the layout:

=========================  ====================================================
first generation           Qwen2
=========================  ====================================================
``transformer.wte``        ``model.embed_tokens``
``transformer.h.N.ln_1``   ``model.layers.N.input_layernorm``
``….attn.c_attn``          ``….self_attn.q_proj``, ``k_proj``, ``v_proj``, in thirds
``….attn.c_proj``          ``….self_attn.o_proj``
``….ln_2``                 ``….post_attention_layernorm``
``….mlp.w1``               ``….mlp.up_proj``
``….mlp.w2``               ``….mlp.gate_proj``
``….mlp.c_proj``           ``….mlp.down_proj``
``transformer.ln_f``       ``model.norm``
``lm_head``                ``lm_head``
=========================  ====================================================

``intermediate_size`` counts both branches of the feed-forward there and one of them here.

Two options of the first generation change attention at inference beyond ``seq_length`` tokens only:
``use_dynamic_ntk`` (rotary base) and ``use_logn_attn`` (query scale). They are left out, so the
mapped model is exact up to ``seq_length``, which becomes its ``max_position_embeddings``; training
never used them.

Weights are mapped as views of the memory-mapped files, so no shard is ever read as a whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import cached_file

from cpo_arabic.data.byte_pairs import byte_level, read_ranks
from cpo_arabic.errors import DataError, ModelError

MODEL_TYPE = "qwen"
RANKS_FILE = "qwen.tiktoken"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
"""The control tokens in the order of their ids, which follow the ranks."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_BUFFERS = (".attn.masked_bias", ".rotary_emb.inv_freq")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
_SHOWN = 5

_log = logging.getLogger(__name__)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained``'s options that say how a file is found, not what it becomes."""
    return {key: options[key] for key in _HUB_OPTIONS if key in options}


def legacy_settings(
    name: str, revision: str | None, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The ``config.json`` of a first-generation Qwen; None for every other model.

    Raises:
        OSError: there is no readable ``config.json``.
    """
    settings, _ = PretrainedConfig.get_config_dict(name, revision=revision, **hub_options(options))
    return dict(settings) if settings.get("model_type") == MODEL_TYPE else None


def qwen2_config(settings: Mapping[str, Any]) -> Qwen2Config:
    """The Qwen2 configuration that computes what these first-generation settings say.

    Raises:
        ModelError: a setting that is missing, malformed, or that Qwen2 cannot represent.
    """
    heads, hidden = _size(settings, "num_attention_heads"), _size(settings, "hidden_size")
    branches, head_size = _size(settings, "intermediate_size"), _size(settings, "kv_channels", 128)
    if heads * head_size != hidden:
        raise _refused(
            f"num_attention_heads {heads} times kv_channels {head_size} is not hidden_size {hidden}"
        )
    if branches % 2:
        raise _refused(f"intermediate_size {branches} counts two equal branches, but is odd")
    only = {"rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True, "emb_dropout_prob": 0.0}
    for field, value in only.items():
        if settings.get(field, value) != value:
            raise _refused(f"{field} is {settings[field]!r}, and Qwen2 can represent {value} only")
    for field, what in (
        ("quantization_config", "quantised weights; name the model that they were made from"),
        ("rope_scaling", "rescaled rotary positions, which first-generation Qwen does not define"),
        ("visual", "an image encoder"),
        ("audio", "an audio encoder"),
    ):
        if settings.get(field):
            raise _refused(f"{field} is set: {what}")
    return Qwen2Config(
        vocab_size=_size(settings, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=branches // 2,
        num_hidden_layers=_size(settings, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=_size(settings, "seq_length"),
        rms_norm_eps=_number(settings, "layer_norm_epsilon", 1e-6),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _number(settings, "rotary_emb_base", 10000.0),
        },
        attention_dropout=_number(settings, "attn_dropout_prob", 0.0),
        initializer_range=_number(settings, "initializer_range", 0.02),
        tie_word_embeddings=bool(settings.get("tie_word_embeddings", False)),
        # A padding id here would freeze that row of the embedding; generation has its own.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def load_legacy_model(
    name: str, settings: Mapping[str, Any], *, revision: str | None, options: Mapping[str, Any]
) -> Any:
    """A ``Qwen2ForCausalLM`` with the weights of a first-generation checkpoint.

    Args:
        name: folder or hub name.
        settings: what :func:`legacy_settings` returned.
        revision: of a hub name.
        options: as ``from_pretrained`` takes them: ``dtype``, ``attn_implementation``, ….

    Raises:
        ModelError: settings that Qwen2 cannot represent; weights that are missing, unexpected,
            doubled or of another shape; a file that is damaged or holds more than tensors.
    """
    config = qwen2_config(settings)
    files = _Files(name, revision, options)
    state = _map(_read(files), config)
    model, report = Qwen2ForCausalLM.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **options
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(problem):
            raise ModelError(f"{name!r}: {problem} after the mapping: {report[problem]}")
    del state
    if options.get("quantization_config") is None:
        _own_memory(model)
    model.config._name_or_path = model.name_or_path = name
    _set_generation(model, files.json("generation_config.json"))
    beyond = [f for f in ("use_dynamic_ntk", "use_logn_attn") if settings.get(f)]
    if beyond:
        _log.info(
            "%s: %s change attention beyond %d tokens only and are left out",
            name,
            " and ".join(beyond),
            config.max_position_embeddings,
        )
    return model


def load_legacy_tokenizer(
    name: str, settings: Mapping[str, Any], *, revision: str | None
) -> Any | None:
    """A fast Qwen2 tokenizer with the ids of ``qwen.tiktoken``; None where there is no such file.

    A chat model's completions end with ``<|im_end|>``, a base model's with ``<|endoftext|>``;
    padding is ``<|endoftext|>``.

    Raises:
        ModelError: the file is malformed.
    """
    files = _Files(name, revision, {})
    path = files.find(RANKS_FILE)
    if path is None:
        return None
    try:
        vocabulary, merges = byte_level(read_ranks(path))
    except DataError as error:
        raise ModelError(f"{RANKS_FILE} of {name!r} makes no tokenizer: {error}") from error
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(SPECIAL_TOKENS)}
    chat = _is_chat(files.json("generation_config.json"))
    endoftext, _, end_of_turn, *_ = SPECIAL_TOKENS
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=None,
        eos_token=end_of_turn if chat else endoftext,
        pad_token=endoftext,
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=_size(settings, "seq_length"),
        clean_up_tokenization_spaces=False,
        **({"chat_template": CHAT_TEMPLATE} if chat else {}),
    )
    tokenizer.name_or_path = name
    return tokenizer


class _Files:
    """The files of a folder or hub repository."""

    def __init__(self, name: str, revision: str | None, options: Mapping[str, Any]) -> None:
        self.name = name
        self._options = {**hub_options(options), "revision": revision}

    def find(self, file: str) -> Path | None:
        path = cached_file(
            self.name, file, _raise_exceptions_for_missing_entries=False, **self._options
        )
        return None if path is None else Path(path)

    def json(self, file: str) -> dict[str, Any]:
        path = self.find(file)
        if path is None:
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{file} of {self.name!r} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"{file} of {self.name!r} holds no JSON object")
        return content

    def weights(self) -> list[Path]:
        """The shards, safetensors first."""
        for single in WEIGHT_FILES:
            index = self.json(f"{single}.index.json").get("weight_map")
            if isinstance(index, dict):
                return [self._shard(shard) for shard in sorted({str(v) for v in index.values()})]
            path = self.find(single)
            if path is not None:
                return [path]
        raise ModelError(
            f"{self.name!r} has no weights: neither {' nor '.join(WEIGHT_FILES)}, whole or sharded"
        )

    def _shard(self, shard: str) -> Path:
        path = self.find(shard) if Path(shard).name == shard else None
        if path is None:
            raise ModelError(f"{self.name!r} lacks the shard {shard!r} that its index names")
        return path


def _read(files: _Files) -> dict[str, Tensor]:
    """Every tensor of every shard, memory-mapped."""
    found: dict[str, Tensor] = {}
    for path in files.weights():
        for key, tensor in _read_shard(path).items():
            if key in found:
                raise ModelError(f"{files.name!r} has {key} in more than one shard")
            found[key] = tensor
    return found


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch reports a refused pickle with its own unpickling error, a damaged archive with others
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(f"{path} cannot be read as weights alone: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ModelError(f"{path} does not hold named tensors alone")
    return content


def _layout(config: Qwen2Config) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """First-generation name → the Qwen2 names it fills, cut along dimension 0, and its shape."""
    hidden, width, rows = config.hidden_size, config.intermediate_size, config.vocab_size
    layout: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "transformer.wte.weight": (("model.embed_tokens.weight",), (rows, hidden)),
        "transformer.ln_f.weight": (("model.norm.weight",), (hidden,)),
        "lm_head.weight": (("lm_head.weight",), (rows, hidden)),
    }
    for n in range(config.num_hidden_layers):
        old, new = f"transformer.h.{n}", f"model.layers.{n}"
        qkv = [f"{new}.self_attn.{part}_proj" for part in "qkv"]
        layout |= {
            f"{old}.ln_1.weight": ((f"{new}.input_layernorm.weight",), (hidden,)),
            f"{old}.ln_2.weight": ((f"{new}.post_attention_layernorm.weight",), (hidden,)),
            f"{old}.attn.c_attn.weight": (
                tuple(f"{part}.weight" for part in qkv),
                (3 * hidden, hidden),
            ),
            f"{old}.attn.c_attn.bias": (tuple(f"{part}.bias" for part in qkv), (3 * hidden,)),
            f"{old}.attn.c_proj.weight": ((f"{new}.self_attn.o_proj.weight",), (hidden, hidden)),
            f"{old}.mlp.w1.weight": ((f"{new}.mlp.up_proj.weight",), (width, hidden)),
            f"{old}.mlp.w2.weight": ((f"{new}.mlp.gate_proj.weight",), (width, hidden)),
            f"{old}.mlp.c_proj.weight": ((f"{new}.mlp.down_proj.weight",), (hidden, width)),
        }
    return layout


def _map(found: Mapping[str, Tensor], config: Qwen2Config) -> dict[str, Tensor]:
    """The checkpoint under Qwen2's names, as views of it."""
    layout, head = _layout(config), "lm_head.weight"
    found = {key: tensor for key, tensor in found.items() if not key.endswith(_BUFFERS)}
    missing = [key for key in layout if key not in found]
    if config.tie_word_embeddings and head in missing:
        missing.remove(head)
    unexpected = [key for key in found if key not in layout]
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {shape}"
        for key, (_, shape) in layout.items()
        if key in found and tuple(found[key].shape) != shape
    ]
    problems = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("lacks", missing),
            ("also has", unexpected),
            ("has in another shape", shapes),
        )
        if names
    ]
    if problems:
        raise _refused(f"the checkpoint {'; it '.join(problems)}")
    if config.tie_word_embeddings and head in found:
        if not torch.equal(found[head], found["transformer.wte.weight"]):
            raise _refused(f"tie_word_embeddings is true, but {head} is not transformer.wte.weight")
        del found[head]
    return {
        target: part
        for key, tensor in found.items()
        for target, part in zip(
            layout[key][0], tensor.chunk(len(layout[key][0]), dim=0), strict=True
        )
    }


def _own_memory(model: Any) -> None:
    """Copies what still lies in the checkpoint's files, one parameter at a time."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _set_generation(model: Any, settings: Mapping[str, Any]) -> None:
    """Where generation stops; a chat model's turns end with ``<|im_end|>`` as well."""
    end, pad = settings.get("eos_token_id"), settings.get("pad_token_id")
    if isinstance(end, int):
        turn = end + SPECIAL_TOKENS.index("<|im_end|>")
        model.generation_config.eos_token_id = [end, turn] if _is_chat(settings) else end
    if isinstance(pad, int):
        model.generation_config.pad_token_id = pad


def _is_chat(generation: Mapping[str, Any]) -> bool:
    return generation.get("chat_format") == "chatml"


def _size(settings: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = settings.get(field, default)
    if type(value) is not int or value < 1:
        raise _refused(f"{field} is {value!r}, not a positive whole number")
    return value


def _number(settings: Mapping[str, Any], field: str, default: float) -> float:
    value = settings.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise _refused(f"{field} is {value!r}, not a number")
    return float(value)


def _refused(reason: str) -> ModelError:
    return ModelError(f"this first-generation Qwen cannot be mapped onto Qwen2: {reason}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
