"""Hard negatives: close in meaning, never right; and the file they are kept in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cpo_arabic.data.mining import (
    Mined,
    cached,
    own_answers,
    search_bm25,
    search_semantic,
    with_mined,
)
from cpo_arabic.data.records import PreferenceRecord, Turn
from cpo_arabic.errors import DataError


def record(prompt: str, chosen: str, *hard: str) -> PreferenceRecord:
    return PreferenceRecord((Turn("user", prompt),), chosen, ("لا أعرف.",), hard, "f.jsonl", 1)


RECORDS = [
    record("ما عاصمة فرنسا؟", "عاصمة فرنسا هي باريس على نهر السين."),
    record("ما هي عاصمة فرنسا اليوم؟", "باريس عاصمة فرنسا الحالية وأكبر مدنها."),
    record("ما عاصمة فرنسا؟", "باريس هي العاصمة الفرنسية منذ قرون."),
    record("كيف أطبخ الأرز؟", "اغسل الأرز ثم اطبخه في ماء مملّح على نار هادئة."),
    record("ما عاصمة مصر؟", "عاصمة مصر هي القاهرة على نهر النيل."),
]


def embed(texts: Sequence[str]) -> np.ndarray:
    """Bags of letters: enough to make «عاصمة» closer to «عاصمة» than to rice."""
    vectors = np.array([[t.count(c) for c in "ابتصمعفرنسيقهو"] for t in texts], np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_semantic_search_ranks_by_similarity_and_leaves_the_same_prompt_out() -> None:
    mined = search_semantic(RECORDS, embed, per_row=10)
    for own, found in zip(RECORDS, mined, strict=True):
        assert [m.score for m in found] == sorted((m.score for m in found), reverse=True)
        same_prompt = {r.chosen for r in RECORDS if r.prompt_key == own.prompt_key}
        assert not same_prompt & {m.text for m in found}
        others = [r.chosen for r in RECORDS if r.prompt_key != own.prompt_key]
        similarity = (embed([own.prompt_text]) @ embed(others).T)[0]
        assert found[0].text == others[int(similarity.argmax())]


def test_a_nearly_equal_answer_is_never_a_negative() -> None:
    twin = record("سؤال آخر تماما", RECORDS[0].chosen.replace(".", " ."))
    mined = search_semantic([*RECORDS, twin], embed, per_row=10)
    assert twin.chosen not in [m.text for m in mined[0]]


def test_bm25_finds_shared_words() -> None:
    pytest.importorskip("bm25s")
    mined = search_bm25(RECORDS, per_row=1)
    assert "مصر" in mined[0][0].text or "باريس عاصمة" in mined[0][0].text


def test_own_answers_that_are_blank_or_right_are_left_out() -> None:
    answers = [" ", RECORDS[1].chosen, "جواب خاطئ", "جواب", "آخر"]
    mined = own_answers(RECORDS, lambda rows: answers, per_row=2, source="policy")
    assert [[m.text for m in found] for found in mined] == [
        [], [], ["جواب خاطئ"], ["جواب"], ["آخر"],
    ]  # fmt: skip


def test_mined_texts_follow_a_row_s_own_hard_negatives_without_repeats() -> None:
    row = record("س", "ص", "خطأ")
    mined = [[Mined("خطأ", 2.0, "x"), Mined("ثان", 1.0, "x"), Mined("لا أعرف.", 1.0, "x")]]
    (joined,) = with_mined([row], mined)
    assert joined.hard_negatives == ("خطأ", "ثان")


def test_mining_is_done_once_and_an_edited_file_counts(tmp_path: Path) -> None:
    calls = []

    def mine() -> list[list[Mined]]:
        calls.append(1)
        return search_semantic(RECORDS, embed, per_row=1)

    first, path = cached(RECORDS, ["semantic", 1], tmp_path, mine)
    again, _ = cached(RECORDS, ["semantic", 1], tmp_path, mine)
    assert again == first
    assert len(calls) == 1
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0]["mined"] = [{"text": "من يد إنسان", "score": 1, "source": "hand"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    edited, _ = cached(RECORDS, ["semantic", 1], tmp_path, mine)
    assert edited[0][0].text == "من يد إنسان"
    cached(RECORDS, ["semantic", 2], tmp_path, mine)
    assert len(calls) == 2
    path.write_text("{}\n" * len(RECORDS), encoding="utf-8")
    with pytest.raises(DataError, match=rf"{path.name}:1"):
        cached(RECORDS, ["semantic", 1], tmp_path, mine)
