"""Records → token ids: the seam, budgets, special-token text, workers, cache."""

from __future__ import annotations

import copy
import json
import pickle
import random
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_arabic.data import tokenize as tokenize_module
from cpo_arabic.data.encoding import TextEncoder, words_stand_alone
from cpo_arabic.data.records import PreferenceRecord, ReadReport, Turn, iter_records
from cpo_arabic.data.text import text_key
from cpo_arabic.data.tokenize import PreferenceDataset, tokenize_records
from cpo_arabic.errors import DataError
from tests.data.conftest import record

LONG = "كلمة طويلة جدا في نص عربي " * 40


def tokenise(records: list[PreferenceRecord], tokenizer: Any, **options: Any) -> PreferenceDataset:
    lengths = {"max_length": 128, "max_prompt_length": 64, "max_target_length": 64}
    return tokenize_records(records, tokenizer, **{**lengths, **options})


def everything(dataset: PreferenceDataset, row: int = 0) -> tuple[list[int], list[list[int]]]:
    """The prompt and all candidates of a row."""
    number = len(dataset.lengths(row)[1])
    store = dataset.store
    return store.prompt_ids(row), [store.completion_ids(row, i) for i in range(number)]


# --- the seam -----------------------------------------------------------------------------------

AWKWARD = [
    "\n\nسطر جديد أولا",
    "\u0653 مدّة في البداية",
    "\u0651\u064e شدة وفتحة",
    "\u064e\u0651 فتحة وشدة",
    "ـــ تطويل ـــ",
    "مُحَمَّدٌ يَكْتُبُ",
    "٠١٢٣ و 0123",
    "\u200fعلامة اتجاه\u200f",
    " مسافة أولا",
    "ﻻ ﷲ",
    "😀 emoji",
]


@pytest.mark.parametrize("template", ["default", "chatml", "plain", "alpaca", "translation"])
@pytest.mark.parametrize("text", AWKWARD)
def test_what_is_tokenised_decodes_to_the_nfc_of_what_was_written(
    tokenizer: Any, template: str, text: str
) -> None:
    dataset = tokenise([record(text, chosen=text, easy=("لا",))], tokenizer, template=template)
    prompt, completions = everything(dataset)
    before = " " if template == "translation" else ""
    assert unicodedata.normalize("NFC", text) in tokenizer.decode(prompt)
    assert tokenizer.decode(completions[0][:-1]) == before + unicodedata.normalize("NFC", text)


_arabic = st.text(
    st.sampled_from("اأإآبتثجحخدذرزسشصضطظعغفقكلمنهويىةءئؤ ًٌٍَُِّْٰٕٔٓـ٠١٢٣0123،؛؟.\n\u200f\u200c<|>aZ"),
    min_size=1,
    max_size=40,
).filter(lambda text: bool(text.strip()))


@settings(max_examples=1000, deadline=None)
@given(_arabic, _arabic, _arabic)
def test_any_arabic_text_keeps_one_prompt_prefix_and_decodes_to_its_nfc(
    prompt: str, chosen: str, rejected: str
) -> None:
    tokenizer = _shared_tokenizer()
    for template in ("default", "plain"):
        one = tokenise([record(prompt, chosen, (rejected,))], tokenizer, template=template,
                       max_length=1000, max_prompt_length=500, max_target_length=500,
                       on_bad_row="skip") if chosen != rejected else None  # fmt: skip
        if one is None or not len(one):
            continue
        ids, completions = everything(one)
        for completion, text in zip(completions, (chosen, rejected), strict=False):
            assert completion[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(completion[:-1]) == unicodedata.normalize("NFC", text)
        assert unicodedata.normalize("NFC", prompt) in tokenizer.decode(ids)
        other = tokenise([record(prompt, rejected, (chosen,))], tokenizer, template=template,
                         max_length=1000, max_prompt_length=500, max_target_length=500)  # fmt: skip
        assert everything(other)[0] == ids, "a sibling changed the prompt"


def _shared_tokenizer(cache: list[Any] = []) -> Any:  # noqa: B006  one tokenizer for all examples
    from transformers import AutoTokenizer

    if not cache:
        root = Path(__file__).resolve().parents[2]
        cache.append(AutoTokenizer.from_pretrained(root / "demo" / "base-model"))
    return cache[0]


def test_tokenising_the_joined_text_would_move_the_prompt(tokenizer: Any) -> None:
    """The negative control: the naive way fails where ours holds."""
    prompt, completion = "سؤال\n", "\nجواب"
    joined = tokenizer(prompt + completion)["input_ids"]
    alone = tokenizer(prompt)["input_ids"]
    assert joined[: len(alone)] != alone


# --- word by word -------------------------------------------------------------------------------

SPACED = st.lists(
    st.sampled_from([" ", " ", " ", "  ", "\n", "\t", "\r", "\u00a0", "\u2003", "\u0085", "\x1c"])
    | st.text("ابتكـَُّْٰٓأآىة٠٩12½²abé'،؟.!_\u0301\u200f", min_size=1, max_size=5)
    | st.sampled_from(["<|im_end|>", "<think>", "'s", "𝟗", "🦜"]),
    max_size=24,
).map("".join)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> TextEncoder:
    return TextEncoder.from_json(tokenizer.backend_tokenizer.to_str())


@settings(max_examples=1000, deadline=None)
@given(text=SPACED)
def test_encoding_word_by_word_gives_the_ids_of_the_whole_text(
    encoder: TextEncoder, text: str
) -> None:
    assert encoder.by_words
    whole = encoder.backend.encode(text, add_special_tokens=False).ids
    assert encoder(text) == whole
    assert encoder(text) == whole, "the second time words are looked up"


def test_words_are_not_taken_apart_where_they_do_not_stand_alone(
    tokenizer: Any, encoder: TextEncoder
) -> None:
    pieces = [token for piece in ("ا", " ", " ", " ب") for token in encoder(piece)]
    assert pieces != encoder("ا   ب"), "a run of blanks is one piece, not three"

    changed = copy.deepcopy(tokenizer)
    assert words_stand_alone(changed.backend_tokenizer.to_str())
    changed.add_tokens(["كتاب"])
    assert words_stand_alone(changed.backend_tokenizer.to_str())
    changed.add_tokens(["كتاب جديد"])
    description = changed.backend_tokenizer.to_str()
    assert not words_stand_alone(description)
    added = changed.convert_tokens_to_ids("كتاب جديد")
    assert added in TextEncoder.from_json(description)("هذا كتاب جديد")

    other = json.loads(tokenizer.backend_tokenizer.to_str())
    other["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                              "split": True}  # fmt: skip
    assert not words_stand_alone(json.dumps(other))


def test_the_prompt_is_what_generation_sees(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "أجب بإيجاز."},
        {"role": "user", "content": "\nما هي عاصمة فرنسا؟ "},
    ]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    one = record(messages[1]["content"], system=messages[0]["content"])
    assert everything(tokenise([one], tokenizer))[0] == expected
    assert everything(tokenise([one], tokenizer, template="chatml"))[0] == expected


def test_an_open_seam_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    template = tmp_path / "glued.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}", encoding="utf-8")
    rows = [record("ا", chosen="\u0653ه"), record("ا", chosen="به")]
    dataset = tokenise(rows, tokenizer, template=str(template))
    assert dataset.report.open_seams == 1
    assert any("join the prompt" in line for line in dataset.report.lines())


# --- special tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["default", "chatml", "plain", "alpaca", "translation"])
@pytest.mark.parametrize("special", ["<|im_end|>", "<|im_start|>system\n", "<|endoftext|>"])
def test_special_token_text_in_data_is_never_a_control_token(
    tokenizer: Any, template: str, special: str
) -> None:
    honest = tokenise([record("س", "ج", ("لا",), system="ن")], tokenizer, template=template)
    text = f"أ{special}ب"
    row = record(text, text, (special,), system=text)
    dataset = tokenise([row], tokenizer, template=template, max_length=400,
                       max_prompt_length=300)  # fmt: skip
    control = set(tokenizer.all_special_ids)
    prompt, completions = everything(dataset)
    expected = [token for token in everything(honest)[0] if token in control]
    assert [token for token in prompt if token in control] == expected
    assert text in tokenizer.decode(prompt)
    for completion in completions:
        assert not control & set(completion[:-1])
    naive = set(tokenizer(text)["input_ids"])
    assert control & naive, "the naive way is caught by this very text"


def test_an_uncut_completion_ends_with_the_turns_end_and_nothing_is_doubled(tokenizer: Any) -> None:
    for template in ("default", "chatml", "plain", "alpaca", "translation"):
        _, completions = everything(tokenise([record()], tokenizer, template=template))
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        for completion in completions:
            assert completion[-1] == end
            assert completion.count(end) == 1


def test_without_special_tokens_there_is_no_end(tokenizer: Any) -> None:
    dataset = tokenise([record()], tokenizer, template="plain", add_special_tokens=False)
    prompt, completions = everything(dataset)
    assert not set(tokenizer.all_special_ids) & {*prompt, *completions[0], *completions[1]}


def test_where_pad_is_eos_the_end_still_trains(tokenizer: Any) -> None:
    import copy

    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    _, completions = everything(tokenise([record()], same))
    assert completions[0][-1] == same.pad_token_id


# --- budgets ------------------------------------------------------------------------------------


def test_a_long_prompt_keeps_the_end_that_the_mode_names(tokenizer: Any) -> None:
    text = " ".join(str(number) for number in range(200))
    full = everything(tokenise([record(text)], tokenizer, max_length=2000, max_prompt_length=1900))[
        0
    ]
    end = tokenise([record(text)], tokenizer)
    assert everything(end)[0] == full[-64:]
    assert end.report.prompts_truncated == 1
    start = everything(tokenise([record(text)], tokenizer, truncation_mode="keep_start"))[0]
    tail = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
    assert len(start) == 64
    assert start[-len(tail) :] == tail
    assert start[: 64 - len(tail)] == full[: 64 - len(tail)]


def test_each_completion_is_cut_by_itself_and_loses_its_end(tokenizer: Any) -> None:
    dataset = tokenise([record(chosen="قصير", easy=(LONG, "لا"))], tokenizer)
    _, (chosen, long, short) = everything(dataset)
    assert chosen[-1] == short[-1] == tokenizer.eos_token_id
    assert len(long) == 64
    assert long[-1] != tokenizer.eos_token_id
    assert dataset.report.completions_cut == 1
    assert dataset.report.chosen_cut == 0


def test_a_long_sibling_shortens_nobody(tokenizer: Any) -> None:
    chosen = " ".join(["جواب"] * 20)
    alone = everything(tokenise([record(chosen=chosen)], tokenizer))[1][0]
    beside = everything(tokenise([record(chosen=chosen, easy=(LONG,))], tokenizer))[1][0]
    assert alone == beside


def test_a_completion_one_token_over_loses_only_its_end(tokenizer: Any) -> None:
    whole = everything(tokenise([record()], tokenizer))[1][0]
    dataset = tokenise([record()], tokenizer, max_target_length=len(whole) - 1)
    assert everything(dataset)[1][0] == whole[:-1]
    assert dataset.report.chosen_cut == 1
    exact = tokenise([record()], tokenizer, max_target_length=len(whole))
    assert everything(exact)[1][0] == whole


def test_max_length_binds_the_completion_by_what_the_prompt_leaves(tokenizer: Any) -> None:
    dataset = tokenise([record(LONG, LONG, (LONG + "لا", "لا"))], tokenizer, max_length=70)
    prompt, completions = everything(dataset)
    assert len(prompt) == 64
    assert len(completions[0]) == 6


def test_negatives_equal_to_chosen_after_the_cut_are_dropped_and_counted(tokenizer: Any) -> None:
    dataset = tokenise([record(chosen=LONG + "أ", easy=(LONG + "ب", "لا"))], tokenizer)
    assert len(everything(dataset)[1]) == 2
    assert dataset.report.negatives_alike_after_cut == 1
    assert dataset.pool_sizes(0) == (1, 0)
    with pytest.raises(DataError, match=r"memory:1: chosen and every negative are equal"):
        tokenise([record(chosen=LONG + "أ", easy=(LONG + "ب",))], tokenizer)


def test_truncation_false_refuses_instead_of_cutting(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"memory:1: its prompt has \d+ tokens"):
        tokenise([record(LONG)], tokenizer, truncation=False)
    with pytest.raises(DataError, match=r"a completion has \d+ tokens, its budget is 64"):
        tokenise([record(chosen=LONG)], tokenizer, truncation=False)
    rows = [record(LONG, line=4), record(line=5)]
    kept = tokenise(rows, tokenizer, truncation=False, on_bad_row="skip")
    assert len(kept) == 1
    assert [row.line for row in kept.report.refused] == [4]
    with pytest.raises(DataError, match="no row is left"):
        tokenise(rows[:1], tokenizer, truncation=False, on_bad_row="skip")


# --- groups -------------------------------------------------------------------------------------


def test_a_group_is_chosen_first_with_hashes_of_its_texts(tokenizer: Any) -> None:
    rows = [record("س", "أ", ("ب",), ("ج",)), record("ص", "د", ("هـ",))]
    dataset = tokenise(rows, tokenizer)
    group = dataset.group(0, epoch=0, seed=0, num_negatives=2, strategy="hard",
                          hard_negative_ratio=0.5)  # fmt: skip
    texts = [tokenizer.decode(ids[:-1]) for ids in group.completion_ids]
    assert texts == ["أ", "ج", "ب"]
    assert group.completion_keys == [text_key(text) for text in texts]
    assert group.prompt_key == text_key("س")
    assert group.row == 0
    assert dataset.lengths(0) == (len(group.prompt_ids), [2, 2, 2])


def test_a_borrowed_negative_answers_to_the_borrowers_budget(tokenizer: Any) -> None:
    rows = [record(LONG, "أ", ("ب",)), record("ص", LONG, ("لا " + LONG,))]
    dataset = tokenise(rows, tokenizer, max_length=80)
    group = dataset.group(0, epoch=0, seed=0, num_negatives=2)
    assert len(group.completion_ids) == 3
    assert max(len(ids) for ids in group.completion_ids) == 16


# --- workers and cache --------------------------------------------------------------------------


def some_records(count: int) -> list[PreferenceRecord]:
    generator = random.Random(5)
    words = ["كتاب", "قلم", "مدرسة", "بيت", "شمس", "قمر", "بحر", "جبل", "سماء", "طعام"]

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(1, 12)))

    return [
        PreferenceRecord(
            (Turn("user", f"{text()} {row}"),), f"أ {text()}", (f"ب {text()}",), (), "m", row
        )
        for row in range(count)
    ]


def same(left: PreferenceDataset, right: PreferenceDataset) -> bool:
    return len(left) == len(right) and all(
        everything(left, row) == everything(right, row) and left.place(row) == right.place(row)
        for row in range(len(left))
    )


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_module, "WORTH_WORKERS", 100)
    monkeypatch.setattr(tokenize_module, "BATCH_ROWS", 50)
    records = some_records(330)
    one = tokenise(records, tokenizer, num_workers=1)
    two = tokenise(records, tokenizer, num_workers=2)
    assert same(one, two)
    assert one.report == two.report


def test_the_cache_gives_back_the_same_tokens_and_counts(tokenizer: Any, tmp_path: Path) -> None:
    records = [*some_records(700), record(LONG)]
    plain = tokenise(records, tokenizer)
    written = tokenise(records, tokenizer, cache_dir=tmp_path)
    read = tokenise(records, tokenizer, cache_dir=tmp_path)
    assert not written.report.from_cache
    assert read.report.from_cache
    assert read.report.prompts_truncated == 1
    assert same(plain, written)
    assert same(plain, read)
    assert [entry.name[:7] for entry in tmp_path.iterdir()] == ["tokens-"]


def test_whatever_the_tokens_depend_on_makes_another_cache_entry(
    tokenizer: Any, tmp_path: Path
) -> None:
    records = some_records(5)
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["كتاب"])
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}", encoding="utf-8")
    calls: list[tuple[list[PreferenceRecord], Any, dict[str, Any]]] = [
        (records, tokenizer, {}),
        (records[:4], tokenizer, {}),
        ([*records[:4], record()], tokenizer, {}),
        (records, changed, {}),
        (records, tokenizer, {"template": "plain"}),
        (records, tokenizer, {"template": str(template)}),
        (records, tokenizer, {"max_length": 100}),
        (records, tokenizer, {"max_target_length": 10}),
        (records, tokenizer, {"max_prompt_length": 10}),
        (records, tokenizer, {"max_prompt_length": 10, "truncation_mode": "keep_start"}),
        (records, tokenizer, {"add_special_tokens": False}),
    ]
    for number, (rows, with_tokenizer, options) in enumerate(calls, start=1):
        dataset = tokenise(rows, with_tokenizer, cache_dir=tmp_path / "cache", **options)
        assert not dataset.report.from_cache, options
        assert len(list((tmp_path / "cache").iterdir())) == number
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}", encoding="utf-8")
    again = tokenise(records, tokenizer, cache_dir=tmp_path / "cache", template=str(template))
    assert not again.report.from_cache


def test_a_damaged_cache_entry_is_written_anew(tokenizer: Any, tmp_path: Path) -> None:
    records = some_records(20)
    first = tokenise(records, tokenizer, cache_dir=tmp_path)
    file = next(tmp_path.glob("tokens-*/tokens.arrow"))
    file.write_bytes(file.read_bytes()[:-200])
    again = tokenise(records, tokenizer, cache_dir=tmp_path)
    assert not again.report.from_cache
    assert same(again, tokenise(records, tokenizer))
    assert len(first) == 20


def test_a_stream_is_tokenised_without_a_list_and_cached_under_the_key_given(
    tokenizer: Any, tmp_path: Path
) -> None:
    records = some_records(30)
    streamed = tokenise(iter(records), tokenizer, cache_dir=tmp_path, cache_key="k")  # type: ignore[arg-type]
    assert same(streamed, tokenise(records, tokenizer))
    untouched = tokenise(iter([]), tokenizer, cache_dir=tmp_path, cache_key="k")  # type: ignore[arg-type]
    assert untouched.report.from_cache
    assert len(untouched) == 30


def test_an_open_cache_is_mapped_again_and_not_copied_by_another_process(
    tokenizer: Any, tmp_path: Path
) -> None:
    records = some_records(700)
    written = tokenise(records, tokenizer, cache_dir=tmp_path)
    sent = pickle.dumps(written.store)
    assert len(sent) < 1000
    assert same(replace(written, store=pickle.loads(sent)), written)
    in_memory = tokenise(records, tokenizer)
    assert same(replace(written, store=pickle.loads(pickle.dumps(in_memory.store))), written)


def test_what_reading_a_stream_met_is_said_even_from_the_cache(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "س", "chosen": "ج", "rejected": "لا", "negatives": ["ج"]}
    path.write_text(json.dumps(good) + '\n{"prompt": "x"}\n', encoding="utf-8")
    for _ in range(2):
        reading = ReadReport()
        rows = iter_records(str(path), on_bad_row="skip", report=reading)
        dataset = tokenise(
            rows,
            tokenizer,
            cache_dir=tmp_path / "cache",
            cache_key="k",
            reading=reading,  # type: ignore[arg-type]
        )
        said = "\n".join(dataset.report.lines())
        assert "1 bad rows skipped" in said
        assert f"{path}:2: needs the columns" in said
        assert "1 negatives equal to the chosen text dropped" in said


def test_a_row_that_the_template_refuses_is_named_and_may_be_skipped(
    tokenizer: Any, tmp_path: Path
) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}\n{% endfor %}",
        encoding="utf-8",
    )
    rows = [record(line=1), record(system="أجب", line=2), record(line=3)]
    with pytest.raises(DataError, match=r"memory:2: .*no system.*data\.on_bad_row: skip"):
        tokenise(rows, tokenizer, template=str(template))
    kept = tokenise(rows, tokenizer, template=str(template), on_bad_row="skip")
    assert [kept.place(row) for row in range(len(kept))] == ["memory:1", "memory:3"]
    assert [row.line for row in kept.report.refused] == [2]
