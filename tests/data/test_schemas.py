"""Conventions of other libraries: each is recognised by its columns and reported."""

from __future__ import annotations

from typing import Any

import pytest

from cpo_arabic.data.schemas import Columns, Draft, RowError, Turn, draft_row

Q, GOOD, BAD = "ما عاصمة اليابان؟", "طوكيو.", "بكين."
ASK = [{"role": "user", "content": Q}]
SYSTEM = {"role": "system", "content": "أجب بإيجاز."}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


FIXTURES: dict[str, dict[str, Any]] = {
    "prompt, chosen, rejected": {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    "TRL conversational": {"prompt": ASK, "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "TRL implicit": {"chosen": [*ASK, said(GOOD)], "rejected": [*ASK, said(BAD)]},
    "UltraFeedback-binarized": {
        "prompt": Q,
        "chosen": [*ASK, said(GOOD)],
        "rejected": [*ASK, said(BAD)],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
    "Argilla": {"instruction": Q, "chosen_response": GOOD, "rejected_response": BAD},
    "Argilla input": {"input": Q, "chosen": GOOD, "rejected": BAD},
    "ms-swift": {"messages": [*ASK, said(GOOD)], "rejected_response": BAD},
    "ms-swift messages": {"messages": [*ASK, said(GOOD)], "rejected_messages": [*ASK, said(BAD)]},
    "ms-swift query": {"query": Q, "response": GOOD, "rejected_response": BAD},
    "LLaMA-Factory alpaca": {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory sharegpt": {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "dialogue": {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}",
    },
    "scored list": {"prompt": Q, "responses": [BAD, GOOD], "scores": [1, 9]},
    "scored objects": {
        "instruction": Q,
        "completions": [
            {"response": BAD, "overall_score": "2.5"},
            {"response": GOOD, "overall_score": "9"},
            {"response": "لا أدري", "overall_score": "N/A"},
        ],
    },
}
NAMES = {
    "TRL conversational": "prompt, chosen, rejected",
    "TRL implicit": "implicit prompt",
    "Argilla input": "input, chosen, rejected",
    "ms-swift messages": "ms-swift",
    "ms-swift query": "ms-swift",
    "LLaMA-Factory alpaca": "LLaMA-Factory (alpaca)",
    "LLaMA-Factory sharegpt": "LLaMA-Factory (sharegpt)",
    "dialogue": "implicit prompt",
    "scored objects": "scored list",
}


@pytest.mark.parametrize("name", FIXTURES)
def test_each_convention_gives_the_same_preference(name: str) -> None:
    recognised, draft = draft_row(FIXTURES[name], Columns())
    assert draft == Draft([Turn("user", Q)], GOOD, [BAD])
    assert recognised == NAMES.get(name, name)


def test_nulls_beside_a_convention_do_not_hide_it() -> None:
    row = {**FIXTURES["ms-swift"], "prompt": None, "chosen": None, "negatives": None}
    assert draft_row(row, Columns())[0] == "ms-swift"


def test_rejected_may_be_a_list_of_texts_or_of_conversations() -> None:
    for rejected in (
        [BAD, "لا أدري."],
        [[said(BAD)], [said("لا أدري.")]],
        [said(BAD), said("لا أدري.")],
        [[*ASK, said(BAD)], [*ASK, said("لا أدري.")]],
    ):
        _, draft = draft_row({"prompt": Q, "chosen": GOOD, "rejected": rejected}, Columns())
        assert draft.easy == [BAD, "لا أدري."]


def test_shared_leading_turns_become_the_prompt() -> None:
    before = [SYSTEM, {"role": "user", "content": "مرحبا"}, said("أهلا"), *ASK]
    row = {"chosen": [*before, said(GOOD)], "rejected": [*before, said(BAD)]}
    _, draft = draft_row(row, Columns())
    assert [turn.role for turn in draft.turns] == ["system", "user", "assistant", "user"]


def test_history_and_input_of_llama_factory_are_honoured() -> None:
    row = {
        "instruction": "ترجم",
        "input": "sky",
        "history": [["ما معنى sea؟", "بحر"]],
        "chosen": "سماء",
        "rejected": "أرض",
        "system": "أنت مترجم.",
    }
    _, draft = draft_row(row, Columns())
    assert [turn.content for turn in draft.turns] == [
        "أنت مترجم.",
        "ما معنى sea؟",
        "بحر",
        "ترجم\nsky",
    ]


def test_of_a_scored_list_the_best_is_chosen_and_ties_with_it_are_no_negatives() -> None:
    row = {"prompt": Q, "responses": ["أ", "ب", "ج", "د"], "scores": [3, 5, 5, 1]}
    _, draft = draft_row(row, Columns())
    assert (draft.chosen, draft.easy) == ("ب", ["أ", "د"])


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"prompt": Q, "responses": ["أ", "ب"], "scores": [2, 2]}, "lower score"),
        ({"prompt": Q, "responses": ["أ", "ب"], "scores": [2]}, "number"),
        ({"prompt": Q, "responses": ["أ"], "scores": [2]}, "two responses"),
        ({"messages": ASK, "rejected_response": BAD}, "assistant"),
        ({"chosen": [*ASK, said(GOOD)], "rejected": [said(BAD)]}, "part before"),
        ({"prompt": "آخر", "chosen": [*ASK, said(GOOD)], "rejected": BAD}, "not the prompt"),
        ({"prompt": [said("أهلا")], "chosen": GOOD, "rejected": BAD}, "not the user"),
        ({"prompt": [{"role": "king", "content": Q}], "chosen": GOOD, "rejected": BAD}, "role"),
        ({"prompt": [*ASK, SYSTEM, *ASK], "chosen": GOOD, "rejected": BAD}, "first place"),
        ({"prompt": [], "chosen": GOOD, "rejected": BAD}, "list of messages"),
        ({"prompt": [SYSTEM, *ASK], "chosen": GOOD, "rejected": BAD, "system": "غيره"}, "differ"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": GOOD,
          "rejected": BAD}, "text parts"),
        ({"foo": 1, "bar": 2}, "Nearest schema"),
        ({"instruction": Q, "chosen_response": GOOD}, '"Argilla", which also needs rejected_resp'),
        ({"chosen": GOOD, "rejected": BAD}, "needs the column prompt"),
    ],
)  # fmt: skip
def test_a_row_that_fits_nothing_is_refused_in_words(row: dict[str, Any], word: str) -> None:
    with pytest.raises(RowError, match=word):
        draft_row(row, Columns())


def test_columns_the_user_named_are_not_guessed_around() -> None:
    with pytest.raises(RowError, match="needs the columns source"):
        draft_row(FIXTURES["ms-swift"], Columns(prompt="source"))
    with pytest.raises(RowError, match="needs the columns prompt, good"):
        draft_row({"instruction": Q, "chosen": GOOD, "rejected": BAD}, Columns(chosen="good"))
