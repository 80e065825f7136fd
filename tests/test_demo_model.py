"""The toy base model that the demo and the tests use: its tokenizer and its weights."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[1] / "demo" / "base-model"
SENTENCES = (
    "أريد أن أذهب إلى المدرسة غدا.",
    "هل تعرف أين تقع المكتبة؟",
    "كان الطقس جميلا في ذلك اليوم.",
    "لا أحب شرب القهوة في المساء.",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def round_trip(tokenizer: Any, text: str) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "السلام عليكم ورحمة الله وبركاته",
        "كَتَبَ الوَلَدُ الدَّرْسَ كِتَابَةً",
        "جميـــــل جدًّا",
        "لا؛ نعم، ربما؟ «حسنا» … ٪",
        "١٢٣ 456 ۷۸۹ 3.14",
        "سطر أول\nسطر ثان\r\n\n\tثالث  ",
        "Qwen يكتب العربية, don't it? naïve café",
        "👩‍👩‍👧 😀🇸🇦 中文 русский",
        "a\u0301 ا\u0653 ی\u200cک",
        "\u0000\u200f\ufeff",
        "<|im_start|>user\nمرحبا<|im_end|>\n",
    ],
)
def test_decoding_returns_the_nfc_form(tokenizer: Any, text: str) -> None:
    assert round_trip(tokenizer, text) == unicodedata.normalize("NFC", text)


@given(
    text=st.text(
        alphabet=st.one_of(
            st.characters(codec="utf-8"),
            st.characters(min_codepoint=0x600, max_codepoint=0x6FF),
            st.sampled_from(" \n\t'،؟"),
        )
    )
)
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    assert round_trip(tokenizer, text) == unicodedata.normalize("NFC", text)


def test_canonically_equal_texts_have_equal_ids(tokenizer: Any) -> None:
    assert tokenizer.encode("ا\u0653") == tokenizer.encode("\u0622")


def test_control_tokens_are_the_last_ids(tokenizer: Any) -> None:
    size = len(tokenizer)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [size - 3, size - 2, size - 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (size - 3, size - 1)
    assert tokenizer.bos_token is None
    assert all(tokenizer.encode(name) == [size - 3 + i] for i, name in enumerate(names))


def test_no_id_has_two_tokens_and_none_is_missing(tokenizer: Any) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_every_merge_makes_a_token_of_the_vocabulary() -> None:
    layout = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    made = ["".join(pair) for pair in layout["merges"]]
    assert len(made) == len(set(made)) == len(layout["vocab"]) - 256
    assert all(token in layout["vocab"] for token in made)
    assert all(part in layout["vocab"] for pair in layout["merges"] for part in pair)


def test_role_names_and_marks_are_single_tokens(tokenizer: Any) -> None:
    for piece in ("system", "user", "assistant", "\n", "،", "؛", "؟", "7", "ـ"):
        assert len(tokenizer.encode(piece)) == 1, piece


def test_chat_template_renders_chatml(tokenizer: Any) -> None:
    user = {"role": "user", "content": "مرحبا"}
    messages = [
        {"role": "system", "content": "أجب بإيجاز."},
        user,
        {"role": "assistant", "content": "أهلا"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nأجب بإيجاز.<|im_end|>\n"
        "<|im_start|>user\nمرحبا<|im_end|>\n"
        "<|im_start|>assistant\nأهلا<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nمرحبا<|im_end|>\n<|im_start|>assistant\n"


def test_model_and_tokenizer_agree(model: Any, tokenizer: Any) -> None:
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert set(model.generation_config.eos_token_id) == {
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    }
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_card_states_the_measured_figures(model: Any) -> None:
    report = json.loads((FOLDER / "pretraining.json").read_text(encoding="utf-8"))
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert f"{report['parameters']:,}" in card
    for name in ("held_out_perplexity", "novel_perplexity", "chat_perplexity"):
        assert str(report[name]) in card, name


@pytest.mark.parametrize("sentence", SENTENCES)
def test_loss_on_arabic_is_well_below_uniform(model: Any, tokenizer: Any, sentence: str) -> None:
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < math.log(len(tokenizer)) - 2


def test_word_order_matters_to_the_model(model: Any, tokenizer: Any) -> None:
    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            return float(model(input_ids=ids, labels=ids).loss)

    for sentence in SENTENCES:
        words = sentence.split()
        assert loss(sentence) < loss(" ".join(reversed(words)))


def test_a_turn_ends_with_the_control_token(model: Any, tokenizer: Any) -> None:
    """After a finished answer the end of the turn is far likelier than by chance."""
    messages = [
        {"role": "user", "content": "هل تعرف أين تقع المكتبة؟"},
        {"role": "assistant", "content": "لا أعرف."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("<|im_end|>\n")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        probabilities = model(input_ids=ids).logits[0, -1].softmax(-1)
    assert float(probabilities[tokenizer.eos_token_id]) > 0.1
