"""Twins: another spelling of the prompt, the same answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cpo_arabic.data.augment import (
    augment_records,
    loose_orthography,
    other_diacritics,
    other_digits,
    remembered,
    vocalisations,
    without_diacritics,
)
from cpo_arabic.data.records import PreferenceRecord, Turn
from cpo_arabic.errors import DataError


def record(prompt: str) -> PreferenceRecord:
    turns = (Turn("system", "أنت مساعد."), Turn("user", prompt))
    return PreferenceRecord(turns, "صحيح", ("خطأ",), ("خطأ آخر",), "f.jsonl", 1)


def test_diacritics_go_and_letters_stay() -> None:
    assert without_diacritics("كَتَبَ الوَلَدُ الدَّرْسَ") == "كتب الولد الدرس"


def test_a_hamza_is_no_diacritic_however_it_is_encoded() -> None:
    decomposed = unicodedata.normalize("NFD", "أَحمد آمن")
    assert without_diacritics(decomposed) == "أحمد آمن"


def test_words_take_the_one_vocalisation_that_the_data_knows() -> None:
    lexicon = vocalisations(["كَتَبَ الطّالِبُ", "رأيت الطّالِبَ", "هٰذا كُتُب وهذا كَتَب", "مُعَلّمٌ", "بلا تشكيل"])
    # Case endings differ and are left off; «كتب» is written in two ways and left out.
    assert lexicon == {"الطالب": "الطّالِب", "هذا": "هٰذا", "معلم": "مُعَلّم"}
    assert other_diacritics("هل كتب الطالب، معلم؟", lexicon) == "هل كتب الطّالِب، مُعَلّم؟"
    assert other_diacritics("هل كتبَ الطالب؟", lexicon) == "هل كتب الطالب؟"


def test_diacritics_go_on_or_off_by_what_the_rows_themselves_hold() -> None:
    rows = [record("ما مَعنى الكَلِمة؟"), record("ما الكلمة؟"), record("أين؟")]
    found = augment_records(rows, strategy="diacritics", ratio=1.0, seed=0)
    twins = {twin.turns[-1].content for twin in found.records[3:]}
    assert twins == {"ما معنى الكلمة؟", "ما الكَلِمة؟"}
    assert found.unchanged == 1
    for twin in found.records[3:]:
        assert twin.completions == rows[0].completions


def test_orthography_is_that_of_a_hurried_typist() -> None:
    assert loose_orthography("أين مدرسة أحمد في القرية؟") == "اين مدرسه احمد في القريه؟"


def test_digits_change_sides_and_back() -> None:
    assert other_digits("عام ١٩٦٩ و20") == "عام 1969 و٢٠"
    assert other_digits(other_digits("٠١٢345")) == "٠١٢345"


def test_the_share_asked_for_gets_twins_with_the_same_answers() -> None:
    records = [record(f"أين الكتاب رقم {n}؟") for n in range(20)]
    found = augment_records(records, strategy="orthography", ratio=0.25, seed=3)
    assert found.records[:20] == records
    assert found.twins == len(found.records) - 20 == 5
    for twin in found.records[20:]:
        original = next(r for r in records if r.turns[1].content[-3:] == twin.turns[1].content[-3:])
        assert replace(twin, turns=original.turns, source=original.source) == original
        assert twin.place == "f.jsonl (augmented):1"
        assert twin.turns[0] == original.turns[0]
        assert twin.turns[1] != original.turns[1]


def test_the_seed_alone_decides_who_gets_one() -> None:
    records = [record(f"أين {n}؟") for n in range(30)]
    draws = [
        augment_records(records, strategy="digits", ratio=0.2, seed=s).records[30:]
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_prompts_that_would_not_change_are_counted_and_get_no_twin() -> None:
    found = augment_records([record("بلا أرقام")] * 4, strategy="digits", ratio=1.0, seed=0)
    assert (found.twins, found.unchanged) == (0, 4)


@pytest.mark.parametrize("text", ["", "  ", "أين؟"])
def test_a_paraphrase_that_says_nothing_new_is_passed_over(text: str) -> None:
    found = augment_records(
        [record("أين؟")], strategy="paraphrase", ratio=1.0, seed=0,
        paraphrase=lambda texts: [text for _ in texts],
    )  # fmt: skip
    assert found.twins == 0


def test_a_text_is_rewritten_once_and_an_edited_file_counts(tmp_path: Path) -> None:
    asked: list[str] = []

    def rewrite(texts: Sequence[str]) -> list[str]:
        asked.extend(texts)
        return [f"{text}!" for text in texts]

    path = tmp_path / "new" / "kept.jsonl"
    assert remembered(rewrite, path)(["أ", "ب", "أ"]) == ["أ!", "ب!", "أ!"]
    assert remembered(rewrite, path)(["ب", "ج\u2028"]) == ["ب!", "ج\u2028!"]
    assert asked == ["أ", "ب", "ج\u2028"]
    path.write_text(path.read_text(encoding="utf-8").replace("أ!", "بيد إنسان"), encoding="utf-8")
    assert remembered(rewrite, path)(["أ", "ج\u2028"]) == ["بيد إنسان", "ج\u2028!"]
    path.write_text('{"text": "أ"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"kept\.jsonl:1: not a rewritten text"):
        remembered(rewrite, path)(["أ"])
