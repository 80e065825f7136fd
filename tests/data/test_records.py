# ruff: noqa: E501  (the documented formats are quoted line for line)
"""Files → records: the documented formats, every refusal, the split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpo_arabic.data.records import (
    Columns,
    PreferenceRecord,
    in_validation,
    iter_records,
    limit_records,
    read_records,
    split_records,
)
from cpo_arabic.errors import DataError
from tests.data.conftest import pair, record

Jsonl = Callable[[list[Any]], str]

DOCUMENTED = {
    "pairwise": """\
{"prompt": "ما هي عاصمة فرنسا؟", "chosen": "عاصمة فرنسا هي باريس، وهي أكبر مدينة في البلاد.", "rejected": "باريس."}
{"prompt": "اشرح مفهوم الذكاء الاصطناعي", "chosen": "الذكاء الاصطناعي هو مجال علمي.", "rejected": "الذكاء الاصطناعي شيء معقد."}
""",
    "multi-negative": """\
{
  "prompt": "ما هي عاصمة فرنسا؟",
  "chosen": "عاصمة فرنسا هي باريس، وهي أكبر مدينة في البلاد ومركزها السياسي والثقافي.",
  "rejected": "باريس.",
  "negatives": [
    "لا أعرف.",
    "فرنسا ليس لها عاصمة.",
    "مدينة ليون."
  ]
}
""",
    "hard negatives": """\
{
  "prompt": "اشرح مفهوم الذكاء الاصطناعي",
  "chosen": "الذكاء الاصطناعي هو مجال علمي يهدف إلى إنشاء أنظمة قادرة على أداء مهام.",
  "rejected": "الذكاء الاصطناعي شيء معقد.",
  "hard_negatives": [
    "الذكاء الاصطناعي هو نوع من الكمبيوتر.",
    "الذكاء الاصطناعي يعني الروبوتات الذكية فقط."
  ]
}
""",
}


@pytest.mark.parametrize(
    ("name", "rows", "easy", "hard"),
    [("pairwise", 2, 1, 0), ("multi-negative", 1, 4, 0), ("hard negatives", 1, 1, 2)],
)
def test_each_documented_format_loads_as_printed(
    tmp_path: Path, name: str, rows: int, easy: int, hard: int
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(DOCUMENTED[name], encoding="utf-8")
    records = read_records(str(path)).records
    assert len(records) == rows
    assert (len(records[0].easy_negatives), len(records[0].hard_negatives)) == (easy, hard)
    assert records[0].turns[-1].role == "user"
    assert records[0].line == 1


def test_the_documented_formats_may_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(DOCUMENTED.values()), encoding="utf-8")
    assert [item.line for item in read_records(str(path)).records] == [1, 2, 3, 13]


def test_texts_are_kept_as_written(jsonl: Jsonl) -> None:
    chosen = "\n  نصٌّ مُشكّلٌ ـــ ١٢٣\u200f  "
    kept = read_records(jsonl([pair(chosen=chosen)])).records[0]
    assert kept.chosen == chosen


def test_a_system_column_opens_the_conversation(jsonl: Jsonl) -> None:
    records = read_records(jsonl([pair(system="أجب بإيجاز."), pair(1, system="")])).records
    assert [turn.role for turn in records[0].turns] == ["system", "user"]
    assert [turn.role for turn in records[1].turns] == ["user"]
    path = jsonl([pair(system="أجب بإيجاز.")])
    without = read_records(path, columns=Columns(system=None)).records[0]
    assert [turn.role for turn in without.turns] == ["user"]


def test_columns_have_the_names_the_user_gives(jsonl: Jsonl) -> None:
    row = {"q": "سؤال", "good": "جواب", "bad": "لا", "more": ["كلا"], "hardest": ["ربما"]}
    columns = Columns("q", "good", "bad", None, "more", "hardest")
    loaded = read_records(jsonl([row]), columns=columns).records[0]
    assert loaded.completions == ("جواب", "لا", "كلا", "ربما")


# --- refusals -----------------------------------------------------------------------------------


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_records(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
    message = refusal(str(tmp_path / "trian.jsonl"))
    assert "no such file" in message
    assert "train.jsonl?" in message


def test_a_missing_default_file_is_not_sought_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal("data/cpo_train.jsonl")
    assert "no such file" in refusal("data/cpo_train")


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "[]"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content, encoding="utf-8")
    message = refusal(str(path))
    assert "empty" in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": ...}, ["rejected", "Columns found: prompt, chosen"]),
        ({"chosen": ...}, ["chosen", "Columns found: prompt, rejected"]),
        ({"chosen": None}, ['"chosen" is null', "Columns found"]),
        ({"prompt": 5}, ['"prompt"', "number"]),
        ({"chosen": True}, ['"chosen"', "boolean"]),
        ({"rejected": {"a": 1}}, ['"rejected"', "role and content"]),
        ({"rejected": []}, ['"rejected"', "empty list"]),
        ({"negatives": "نص"}, ['"negatives"', "list"]),
        ({"negatives": [1]}, ['"negatives"', "number"]),
        ({"negatives": [""]}, ["blank"]),
        ({"hard_negatives": ["\u00a0\n"]}, ["blank"]),
        ({"system": 7}, ['"system"']),
        ({"prompt": "  "}, ["blank"]),
        ({"chosen": ""}, ["chosen", "blank"]),
        ({"rejected": " \t"}, ["blank"]),
        ({"rejected": "العاصمة رقم 0 مدينة كبيرة."}, ["equals the chosen"]),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_reason(
    jsonl: Jsonl, change: dict[str, Any], words: list[str]
) -> None:
    row = {key: value for key, value in {**pair(), **change}.items() if value is not ...}
    path = jsonl([pair(9), row])
    message = refusal(path)
    assert message.startswith(f"{path}:2: ")
    for word in words:
        assert word in message
    kept = read_records(path, on_bad_row="skip")
    assert len(kept.records) == 1
    assert [skipped.line for skipped in kept.report.skipped] == [2]
    assert any("1 bad rows skipped" in line for line in kept.report.lines())


def test_a_misspelt_column_is_guessed(jsonl: Jsonl) -> None:
    row = pair()
    row["rejceted"] = row.pop("rejected")
    assert 'Did you mean "rejceted"?' in refusal(jsonl([row]))


def test_no_row_left_after_skipping_is_refused(jsonl: Jsonl) -> None:
    assert "no row is left" in refusal(jsonl([pair(chosen="")]), on_bad_row="skip")


def test_control_characters_of_the_data_never_reach_a_message(jsonl: Jsonl) -> None:
    row = {"\u001b[31mprompt\u202e": "x", "chosen": "a", "rejected": "b"}
    message = refusal(jsonl([row]))
    assert "\u001b" not in message
    assert "\u202e" not in message
    assert "\\u{001b}" in message


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', "UTF-8"),
        (b'{"prompt": "x", "chosen": "a", "rejected": "\\udfff"}', "surrogate"),
        (b'{"prompt": "x", "chosen": "a", "rejected": "b", "score": NaN}', "NaN"),
        (b'{"prompt": "x", "prompt": "y", "chosen": "a", "rejected": "b"}', "twice"),
        (b'{"prompt": "x", "chosen": "a", "rej', "cut off"),
    ],
)
def test_broken_bytes_are_refused_with_their_line_and_may_be_skipped(
    tmp_path: Path, bad: bytes, word: str
) -> None:
    path = tmp_path / "data.jsonl"
    good = [json.dumps(pair(number), ensure_ascii=False).encode() for number in range(2)]
    path.write_bytes(b"\n".join([good[0], bad, good[1]]))
    message = refusal(str(path))
    assert f"{path}:2: " in message
    assert word in message
    kept = read_records(str(path), on_bad_row="skip")
    assert [item.line for item in kept.records] == [1, 3]
    assert [item.line for item in kept.report.skipped] == [2]


# --- duplicates ---------------------------------------------------------------------------------


def test_negatives_equal_to_chosen_or_each_other_are_dropped_and_counted(jsonl: Jsonl) -> None:
    row = pair(
        chosen="آمن",
        rejected="  \u0627\u0653من ",  # the same after NFC and stripping
        negatives=["كلا", "كلا ", "لا", "صعب"],
        hard_negatives=["صعب", "آمن\n"],
    )
    loaded = read_records(jsonl([row]))
    assert loaded.records[0].easy_negatives == ("كلا", "لا")
    assert loaded.records[0].hard_negatives == ("صعب",)
    assert loaded.report.negatives_like_chosen == 2
    assert loaded.report.negatives_repeated == 2


# --- split and limit ----------------------------------------------------------------------------


def many(count: int, prompts: int) -> list[PreferenceRecord]:
    return [record(f"سؤال {number % prompts}", line=number) for number in range(count)]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_no_prompt_is_on_both_sides_of_a_split(fraction: float) -> None:
    records = many(200, 60)
    train, validation = split_records(records, fraction, seed=3)
    assert len(train) + len(validation) == 200
    assert not {item.prompt_key for item in train} & {item.prompt_key for item in validation}
    assert len(validation) == pytest.approx(200 * fraction, abs=4)


def test_the_split_depends_on_seed_and_prompts_alone() -> None:
    records = many(100, 40)
    _, first = split_records(records, 0.2, seed=1)
    _, again = split_records(list(reversed(records)), 0.2, seed=1)
    _, other = split_records(records, 0.2, seed=2)
    assert {item.prompt_key for item in first} == {item.prompt_key for item in again}
    assert {item.prompt_key for item in first} != {item.prompt_key for item in other}


def test_prompts_that_differ_only_in_unicode_form_stay_together() -> None:
    records = [record("آ"), record("\u0627\u0653 "), record("ب"), record("ج")]
    train, validation = split_records(records, 0.5, seed=0)
    sides = [records[0] in train, records[1] in train]
    assert sides[0] == sides[1]
    assert validation


def test_a_split_of_zero_keeps_all_and_a_percentage_is_refused() -> None:
    assert split_records(many(4, 4), 0, seed=0)[1] == []
    with pytest.raises(DataError, match=r"write 0\.1 for 10 %"):
        split_records(many(4, 4), 10, seed=0)
    with pytest.raises(DataError, match="two different prompts"):
        split_records(many(4, 1), 0.5, seed=0)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_a_stream_holds_out_its_share_of_the_prompts(fraction: float) -> None:
    records = many(4000, 4000)
    held = [in_validation(item, fraction, seed=3) for item in records]
    deviation = (fraction * (1 - fraction) * len(records)) ** 0.5
    assert sum(held) == pytest.approx(fraction * len(records), abs=4 * deviation)
    wider = [in_validation(item, min(1.0, fraction + 0.05), seed=3) for item in records]
    assert all(more for few, more in zip(held, wider, strict=True) if few)


def test_a_stream_puts_equal_prompts_on_one_side_whatever_their_order() -> None:
    records = many(600, 200)
    sides = {item.line: in_validation(item, 0.3, seed=1) for item in records}
    backwards = {item.line: in_validation(item, 0.3, seed=1) for item in reversed(records)}
    assert sides == backwards
    by_prompt: dict[int, set[bool]] = {}
    for item in records:
        by_prompt.setdefault(item.prompt_key, set()).add(sides[item.line])
    assert all(len(side) == 1 for side in by_prompt.values())
    assert in_validation(record("آ"), 0.5, 0) == in_validation(record("\u0627\u0653 "), 0.5, 0)
    other = {item.line: in_validation(item, 0.3, seed=2) for item in records}
    assert sides != other
    assert not any(in_validation(item, 0.0, seed=1) for item in records)


def test_max_samples_is_a_seeded_choice() -> None:
    records = many(50, 50)
    first = limit_records(records, 10, seed=1)
    assert len(first) == 10
    assert first == limit_records(records, 10, seed=1)
    assert first != limit_records(records, 10, seed=2)
    assert first != records[:10]
    assert limit_records(records, 99, seed=1) == records


def test_records_stream_without_reading_the_whole_file(jsonl: Jsonl) -> None:
    path = jsonl([pair(1), {"broken": 1}])
    stream = iter_records(path)
    assert next(stream).line == 1
    with pytest.raises(DataError, match=":2: "):
        next(stream)


def test_normalisation_touches_the_prompt_and_not_what_is_learnt(jsonl: Jsonl) -> None:
    row = pair(prompt="مــرحبا\u200f  بك", chosen="أهــلا", rejected="كــلا")
    path = jsonl([row])
    light = read_records(path, normalization="light").records[0]
    assert light.turns[0].content == "مرحبا بك"
    assert light.chosen == "أهــلا"
    asked = read_records(path, normalization="light", normalize_completions=True).records[0]
    assert asked.completions == ("أهلا", "كلا")
    assert read_records(path).records[0].turns[0].content == row["prompt"]
