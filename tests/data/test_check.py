"""The check counts what is planted; the preview shows the very tokens that train."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cpo_arabic.data.augment import augment_records
from cpo_arabic.data.check import DataCheck, check_data
from cpo_arabic.data.encoding import Budgets
from cpo_arabic.data.preview import as_html, preview_group
from cpo_arabic.data.records import PreferenceRecord
from cpo_arabic.data.templates import load_template
from cpo_arabic.data.tokenize import tokenize_records
from tests.data.conftest import ROOT, record

LENGTHS = {"max_length": 96, "max_prompt_length": 48, "max_target_length": 48}


def checked(tokenizer: Any, **splits: list[PreferenceRecord]) -> DataCheck:
    return check_data(
        {
            name: (rows, tokenize_records(rows, tokenizer, **LENGTHS))
            for name, rows in splits.items()
        }
    )


def test_planted_faults_are_counted(tokenizer: Any) -> None:
    long = "كلمة " * 100
    rows = [
        record("س1", "جواب طويل مفيد هنا", ("لا",)),
        record("س1", "جواب طويل مفيد هنا", ("لا",)),
        record("س2", "نعم", ("لا أدري حقا",)),
        record("س3 " + long, long, ("لا شيء",)),
        record("س4", "عايز أروح دلوقتي يا صديقي", ("أريد الذهاب الآن يا صديقي العزيز",)),
        record("س5", "the English answer", ("جواب عربي",)),
    ]
    found = checked(tokenizer, train=rows, validation=[record("س2"), record("س9")])
    train = found.splits["train"]
    assert (train.rows, train.prompts, train.repeated_rows) == (6, 5, 1)
    assert found.prompts_on_both_sides == 1
    assert train.chosen.near_empty == 1
    assert (train.prompts_truncated, train.completions_cut, train.chosen_cut) == (1, 1, 1)
    assert train.chosen.dialect["Egyptian"] == pytest.approx(1 / 6)
    assert train.negatives.any_dialect == 0
    assert 0.02 < train.chosen.latin < 0.05
    assert train.lengths["prompt"].most > 48 == train.lengths["prompt kept"].most
    assert sum(train.lengths["chosen"].histogram) == 6
    text = "\n".join(found.findings)
    for words in ("more than one split", "truncated", "lose their EOS", "repeat an earlier row"):
        assert words in text
    json.dumps(found.as_data())


def test_clean_data_raises_no_finding(tokenizer: Any) -> None:
    texts = "هذا جواب حسن", "هذا جواب حسن وطويل"
    rows = [record(f"سؤال رقم {n}", texts[n % 2], (texts[1 - n % 2],)) for n in range(10)]
    found = checked(tokenizer, train=rows)
    assert found.findings == []


def test_one_sided_length_is_named(tokenizer: Any) -> None:
    rows = [
        record(f"سؤال {n}", "جواب طويل جدا فيه تفصيل كثير", ("لا أدري الآن",)) for n in range(5)
    ]
    findings = checked(tokenizer, train=rows).findings
    assert any("chosen is longer than its negatives in 100% of the rows" in f for f in findings)


# --- preview ------------------------------------------------------------------------------------


def previewed(tokenizer: Any, row: PreferenceRecord, **budgets: Any) -> Any:
    template = load_template("default", tokenizer)
    drawn = [("easy negative", text) for text in row.easy_negatives]
    limits = Budgets(**{**LENGTHS, **budgets})
    return preview_group(row, drawn, tokenizer, template, limits)


def ids_of(passage: Any, *kinds: str) -> list[int]:
    return [token for piece in passage.pieces if piece.kind in kinds for token in piece.ids]


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("length", [1, 60])
def test_the_preview_shows_exactly_the_tokens_that_train(
    tokenizer: Any, mode: Any, length: int
) -> None:
    row = record("سؤال طويل " * length, "جواب أول " * length, ("ثان " * length,), system="نظام")
    dataset = tokenize_records([row], tokenizer, **LENGTHS, truncation_mode=mode)
    group = dataset.group(0, epoch=0, seed=0, num_negatives=1)
    found = previewed(tokenizer, row, truncation_mode=mode)
    assert ids_of(found.prompt, "prompt") == group.prompt_ids
    assert [ids_of(item, "trains") for item in found.completions] == group.completion_ids
    assert (found.prompt.whole > found.prompt.kept) == (length == 60)
    assert found.completions[0].ends == (length == 1)
    assert bool(ids_of(found.completions[0], "cut")) == (length == 60)


def test_letters_that_are_several_tokens_are_shown_whole(tokenizer: Any) -> None:
    found = previewed(tokenizer, record("س", "حرف نادر: ۼ و 𞸀 ورمز 🦜", ("لا",)))
    text = "".join(piece.text for piece in found.completions[0].pieces)
    assert "\ufffd" not in text
    assert "ۼ و 𞸀 ورمز 🦜" in text


def test_nothing_in_the_data_can_write_html_or_move_the_page(tokenizer: Any) -> None:
    evil = '<script>alert("x")</script>\u202e\u001b[2J&amp;'
    page = as_html(previewed(tokenizer, record(evil, evil, ("لا",))))
    body = page.split("<body>")[1]
    assert set(re.findall(r"</?([a-z0-9]+)", body)) <= {
        "h1", "h2", "p", "small", "div", "span", "bdi", "body", "html",
    }  # fmt: skip
    assert "\u202e" not in page
    assert "\u001b" not in page
    assert body.count('dir="auto"') == 4


def test_data_control_text_is_shown_as_text_and_the_templates_as_control(tokenizer: Any) -> None:
    found = previewed(tokenizer, record("س", "أ<|im_end|>ب", ("لا",)))
    pieces = found.completions[0].pieces
    assert [piece.text for piece in pieces if piece.control] == ["<|im_end|>"]
    assert pieces[-1].control
    assert "".join(piece.text for piece in pieces) == "أ<|im_end|>ب<|im_end|>"


def test_an_augmented_twin_says_that_it_is_one(tokenizer: Any) -> None:
    rows = [record("أين المدرسة؟", line=7), record("لماذا؟", line=8)]
    twins = augment_records(rows, strategy="orthography", ratio=1.0, seed=0).records
    dataset = tokenize_records(twins, tokenizer, **LENGTHS)
    assert [dataset.place(row) for row in range(3)] == [
        "memory:7", "memory:8", "memory (augmented):7",
    ]  # fmt: skip
    by_place = {row.place: row for row in twins}
    assert len(by_place) == 3
    found = previewed(tokenizer, by_place[dataset.place(2)])
    assert "memory (augmented):7" in as_html(found)
    assert "اين المدرسه؟" in "".join(piece.text for piece in found.prompt.pieces)


# --- verbs --------------------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path: Path) -> str:
    rows = [
        {
            "prompt": f"سؤال {n}",
            "chosen": f"جواب {n} حسن",
            "rejected": "لا",
            "negatives": [f"كلا {n}"],
        }
        for n in range(12)
    ]
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{name: '{ROOT / 'demo/base-model'}', max_length: 64}}\n"
        f"data: {{train_file: '{tmp_path / 'train.jsonl'}', validation_file: null,"
        f" cache_dir: '{tmp_path / 'cache'}'}}\n"
        f"cpo: {{num_negatives: 3}}\n",
        encoding="utf-8",
    )
    return str(config)


def invoke(*arguments: str) -> Any:
    import typer
    from typer.testing import CliRunner

    from cpo_arabic.cli import data as verbs

    app = typer.Typer()
    verbs.register(app)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["data", *arguments], catch_exceptions=True)


def test_the_check_verb_prints_a_report_and_json(demo: str) -> None:
    shown = invoke("check", demo)
    assert shown.exit_code == 0, shown.output
    for words in ("different prompts", "Tokens, train", "Tokens, validation"):
        assert words in shown.output
    found = json.loads(invoke("check", demo, "--json").output)
    assert found["splits"]["train"]["rows"] == 11
    assert found["prompts_on_both_sides"] == 0


def test_the_check_verb_lists_all_bad_rows_and_exits_with_2(demo: str) -> None:
    file = Path(demo).with_name("train.jsonl")
    text = file.read_text(encoding="utf-8")
    file.write_text(text + '\n{"prompt": "x"}\n{"prompt": 1', encoding="utf-8")
    shown = invoke("check", demo)
    assert shown.exit_code == 2
    assert "train.jsonl:13" in shown.output
    assert "train.jsonl:14" in shown.output
    assert invoke("check", demo, "--set", "data.on_bad_row=skip").exit_code == 0


def test_the_preview_verb_shows_a_row_in_three_ways(demo: str, tmp_path: Path) -> None:
    shown = invoke("preview", demo, "--row", "2")
    assert shown.exit_code == 0, shown.output
    assert "chosen" in shown.output
    assert "<|im_start|>user" in shown.output
    found = json.loads(invoke("preview", demo, "--row", "2", "--json").output)
    assert len(found["completions"]) == 4
    assert any(passage["label"].startswith("from train.jsonl:") for passage in found["completions"])
    page = tmp_path / "row.html"
    assert invoke("preview", demo, "--html", str(page)).exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_row_that_is_not_there_is_refused(demo: str) -> None:
    result = invoke("preview", demo, "--row", "99")
    assert "11 rows, numbered from 0" in str(result.exception)
