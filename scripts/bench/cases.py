"""The rows and the models that the step's and the cost's variants share.

A case is named ``P,C,k[,G]``: G groups (1 if left out) of a prompt of P random tokens and k + 1
completions of C random tokens, with a random Qwen2; with ``~`` in front, lengths are drawn between
half and one and a half times those. Or ``demo,k[,G]``: G (32) rows of the demo's Arabic training
data with the first k negatives written for each, and the demo's model. Or ``wmt24pp,1[,G]``: G
(32) WMT24++ pairs (English source; Arabic post-edit and what was there before it) from
``../shared/data``, with the demo's model. Words at the end: ``lora``, an adapter of rank 16 on
every linear layer but the head; ``gpu``, a model of the 0.5-billion class in bfloat16 on a GPU.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpo_arabic.data.pack import TokenizedGroup

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = ROOT / "demo" / "base-model"
BESIDE = ROOT.parent / "shared" / "data"
"""What is not the project's to copy lies beside it, where it is at all."""
ROWS = {
    "demo": ROOT / "demo" / "data" / "train.jsonl",
    "wmt24pp": BESIDE / "wmt24pp_ar_pairs.train.jsonl",
}
CHANGES = {
    "demo": [f"data.validation_file={ROOT / 'demo' / 'data' / 'heldout.jsonl'}"],
    "wmt24pp": [
        f"data.validation_file={BESIDE / 'wmt24pp_ar_pairs.dev.jsonl'}",
        "data.prompt_column=source",
        "model.max_length=1024",
        "cpo.max_prompt_length=512",
        "cpo.max_target_length=512",
    ],
}
"""What the demo's configuration needs to read them."""
LORA_RANK = 16
HALF_BILLION = {"hidden": 896, "layers": 24, "vocab": 151_936}


@dataclass(frozen=True)
class Shape:
    """The random Qwen2's."""

    hidden: int
    layers: int
    vocab: int
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """G groups of one chosen completion and k negatives; no ``prompt``: rows of a data set."""

    name: str
    data: str
    prompt: int
    completion: int
    negatives: int
    groups: int
    ragged: bool
    lora: bool
    gpu: bool

    @staticmethod
    def parse(text: str) -> Case:
        """``512,64,3,lora`` → P 512, C 64, k 3, G 1, with an adapter.

        Raises:
            ValueError: it is not of the form above.
        """
        words = text.removeprefix("~").split(",")
        numbers = [int(word) for word in words if word.isdecimal()]
        names = {word for word in words if not word.isdecimal()}
        data = next((word for word in words[:1] if word in ROWS), "")
        least = 1 if data else 3
        if names - {data, "lora", "gpu"} or not least <= len(numbers) <= least + 1:
            raise ValueError(f"{text!r} is no case: P,C,k[,G] or demo,k[,G] or wmt24pp,1[,G]")
        prompt, completion = (0, 0) if data else numbers[:2]
        negatives, groups = (*numbers[least - 1 :], 32 if data else 1)[:2]
        return Case(
            text, data, prompt, completion, negatives, groups,
            ragged=text.startswith("~"), lora="lora" in names, gpu="gpu" in names,
        )  # fmt: skip

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cuda" if self.gpu else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch.bfloat16 if self.gpu else torch.float32

    def missing(self) -> str:
        """Why it cannot be run here, or nothing."""
        if self.gpu and not torch.cuda.is_available():
            return "no GPU here"
        if self.data and not ROWS[self.data].exists():
            return "data not here"
        return ""

    def draw(self, shape: Shape) -> list[TokenizedGroup]:
        """Its groups, the same in every process."""
        if self.data:
            return _rows(self, shape.seed)
        generator = torch.Generator().manual_seed(shape.seed)

        def ids(count: int) -> list[int]:
            if self.ragged:
                bounds = count // 2, count * 3 // 2 + 1
                count = int(torch.randint(*bounds, (), generator=generator))
            return torch.randint(1, shape.vocab, (count,), generator=generator).tolist()

        return [
            TokenizedGroup(
                row=row,
                prompt_ids=ids(self.prompt),
                completion_ids=[ids(self.completion) for _ in range(self.negatives + 1)],
                prompt_key=row,
                completion_keys=[100 * row + number for number in range(self.negatives + 1)],
            )
            for row in range(self.groups)
        ]

    def tokenizer(self) -> Any:
        """The demo's; for random ids one that only knows how to pad."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if self.data:
            return AutoTokenizer.from_pretrained(BASE_MODEL)
        from tokenizers import Tokenizer, models

        words = models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="</s>"
        )

    def model(self, shape: Shape) -> Any:
        """The causal language model in float32 on the CPU, the same in every process."""
        from transformers import AutoModelForCausalLM

        if self.data:
            model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
        else:
            model = random_qwen2(shape)
        return (_with_adapter(model, shape.seed) if self.lora else model).train()


def random_qwen2(shape: Shape) -> Any:
    """A Qwen2 of that shape with random weights, in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(shape.seed)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(shape.hidden // 64, 2),
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(config)


def _with_adapter(model: Any, seed: int) -> Any:
    """Its B is random instead of zero, which would hide every A's gradient."""
    from cpo_arabic.modeling.loading import LoraSettings, add_lora

    settings = LoraSettings(LORA_RANK, 2 * LORA_RANK, dropout=0.0, target_modules="all-linear")
    wrapped = add_lora(model, settings, seed=seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return wrapped


def _rows(case: Case, seed: int) -> list[TokenizedGroup]:
    """Rows with k negatives of their own, drawn at random, the first k of each."""
    from cpo_arabic.config import load_config
    from cpo_arabic.run import data as run_data

    changes = [
        f"data.train_file={ROWS[case.data]}",
        f"model.name={BASE_MODEL}",
        *CHANGES[case.data],
    ]
    config_file = ROOT / "configs" / "demo.yaml"
    config = load_config(config_file, changes, environ={}, env_file=None).config
    dataset = run_data.tokenize(config, run_data.read(config).train, case.tokenizer())
    wanted = range(case.negatives + 1)
    fit = [row for row in range(len(dataset)) if len(dataset.lengths(row)[1]) >= len(wanted)]
    return [
        TokenizedGroup(
            row=row,
            prompt_ids=dataset.store.prompt_ids(row),
            completion_ids=[dataset.store.completion_ids(row, number) for number in wanted],
            prompt_key=dataset.prompt_key(row),
            completion_keys=list(dataset.completion_keys(row))[: len(wanted)],
        )
        for row in random.Random(seed).sample(fit, case.groups)
    ]


def unpadded(groups: list[TokenizedGroup]) -> tuple[int, int]:
    """Tokens, each prompt and each completion once; and those of the completions alone."""
    completions = sum(len(ids) for group in groups for ids in group.completion_ids)
    return completions + sum(len(group.prompt_ids) for group in groups), completions


def sizes(model: Any) -> dict[str, int]:
    """Weights of the parts that work is counted for."""
    from cpo_arabic.modeling.policy import causal_lm

    bare = causal_lm(model)
    linear = [m for m in bare.get_decoder().layers.modules() if isinstance(m, torch.nn.Linear)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "decoder_weights": sum(m.weight.numel() for m in linear),
        "head_weights": bare.get_output_embeddings().weight.numel(),
        "frozen_head": not bare.get_output_embeddings().weight.requires_grad,
    }


def needed_flops(facts: dict[str, Any]) -> float:
    """The matrix products nobody can leave out.

    Each token once through the decoder's matrices and each completion token once through the head:
    2 forward, 2 for the input's gradient, and 2 for the weight's, unless they are frozen.
    """
    each = 4 if facts["frozen_head"] else 6
    decoder, head = facts["decoder_weights"], facts["head_weights"]
    return float(each * (decoder * facts["tokens"] + head * facts["completion_tokens"]))
