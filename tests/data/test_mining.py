"""Hard negatives: close in meaning, never right; and the file they are kept in."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cpo_arabic.data import mining
from cpo_arabic.data.mining import (
    Mined,
    cached,
    nearest_by_blocks,
    nearest_search,
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


@pytest.mark.parametrize("search", ["semantic", "bm25"])
def test_a_right_answer_of_another_row_with_the_same_prompt_is_never_a_negative(
    search: str,
) -> None:
    shared = "مدينة القاهرة هي الجواب عن سؤالين مختلفين."
    rows = [
        record("أي مدينة على النيل؟", "الخرطوم على النيل."),
        record("أي مدينة على النيل؟", shared),
        record("أي مدينة فيها الأهرام؟", shared),
        record("أي مدينة على دجلة؟", "بغداد مدينة على دجلة."),
    ]
    if search == "bm25":
        pytest.importorskip("bm25s")
    mined = (
        search_bm25(rows, per_row=4)
        if search == "bm25"
        else search_semantic(rows, embed, per_row=4)
    )
    assert shared not in [m.text for found in mined[:2] for m in found]
    assert shared in [m.text for m in mined[3]]


# --- exact search -------------------------------------------------------------------------------


def vectors(count: int, seed: int) -> np.ndarray:
    """Unit vectors, every second of them a repeated one."""
    generator = np.random.default_rng(seed)
    different = generator.standard_normal((max(1, count // 5), 16)).astype(np.float32)
    chosen = different[generator.integers(0, len(different), count)]
    chosen[::2] = generator.standard_normal((len(chosen[::2]), 16))
    return chosen / np.linalg.norm(chosen, axis=1, keepdims=True)


@pytest.mark.parametrize("count", [1, 12, 40])
def test_search_by_blocks_is_exact(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(mining, "KEYS", 17)
    queries, keys = vectors(9, 0), vectors(100, 1)
    found = nearest_by_blocks(queries, keys, count)
    for query, numbers in zip(queries, found, strict=True):
        assert len(set(numbers)) == count
        scores = keys.astype(np.float64) @ query
        assert np.allclose(np.sort(scores)[-count:], np.sort(scores[numbers]))


def test_faiss_and_numpy_mine_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    assert nearest_search() is not nearest_by_blocks
    rows = [record(f"سؤال {n}", f"جواب{n} رقم{n}") for n in range(600)]
    table = dict(zip([r.chosen for r in rows] + [r.prompt_text for r in rows],
                     vectors(1200, 2), strict=True))  # fmt: skip

    def search() -> list[list[Mined]]:
        return search_semantic(rows, lambda texts: np.array([table[t] for t in texts]), per_row=20)

    with_faiss = search()
    monkeypatch.setattr(mining, "nearest_search", lambda: nearest_by_blocks)
    monkeypatch.setattr(mining, "KEYS", 100)
    assert search() == with_faiss
    scores = [[m.score for m in found] for found in with_faiss]
    assert any(len(set(row)) < len(row) for row in scores), "no tie was tried"


def test_scores_of_all_candidates_are_never_held_at_once() -> None:
    queries, keys = np.ones((256, 4), np.float32), np.ones((200_000, 4), np.float32)
    tracemalloc.start()
    nearest_by_blocks(queries, keys, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < queries.shape[0] * keys.shape[0] * 4 / 1.5  # what one matrix of scores takes


def test_the_search_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    rows = [record(f"سؤال {n}", f"عاصمة {n}") for n in range(300)]
    search_semantic(rows, embed, per_row=1, progress=lambda *at: told.append(at))
    assert told == [(256, 600), (300, 600), (556, 600), (600, 600)]


def test_own_answers_that_are_blank_or_right_are_left_out() -> None:
    attempts = [
        [" ", RECORDS[1].chosen, RECORDS[0].chosen, "جواب", "آخر"],
        [" ", "جديد", "جواب خاطئ", "جواب", "ثان"],
    ]
    mined = own_answers(
        RECORDS, lambda rows, attempt: attempts[attempt], per_row=2, source="policy"
    )
    assert [[m.text for m in found] for found in mined] == [
        [], ["جديد"], ["جواب خاطئ"], ["جواب"], ["آخر", "ثان"],
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
