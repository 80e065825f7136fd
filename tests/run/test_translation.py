"""Real post-edited translations, through what a translator would run: check, preview, training.

The data is a benchmark's and no part of the project; where it lies beside the repository
(``../shared/data``), this runs.
"""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path

import pytest

from cpo_arabic.cli import main
from cpo_arabic.config import load_config
from cpo_arabic.run.training import train
from cpo_arabic.training.metrics import MetricsFile
from cpo_arabic.training.observer import SilentObserver

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
TRAIN, HELD_OUT = (DATA / f"wmt24pp_ar_pairs.{part}.jsonl" for part in ("train", "dev"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRAIN.exists(), reason="../shared/data is not beside the project"),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The demo's small model under the overlay for translation."""
    path = tmp_path / "translation.yaml"
    path.write_text(
        f"extends: ['{ROOT / 'configs/demo.yaml'}',"
        f" '{ROOT / 'configs/overlays/translation.yaml'}']\n"
        f"model: {{name: '{ROOT / 'demo/base-model'}', max_length: 256}}\n"
        f"data: {{train_file: '{TRAIN}', validation_file: '{HELD_OUT}'}}\n"
        "cpo: {max_prompt_length: 128, max_target_length: 128}\n"
        f"training: {{output_dir: '{tmp_path / 'run'}', num_epochs: 1}}\n"
        "logging: {use_tensorboard: false}\n",
        encoding="utf-8",
    )
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cpo-arabic", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_check_counts_and_names_what_this_data_teaches(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "data", "check", str(config), "--json")
    found = json.loads(capsys.readouterr().out)
    splits = {"train": TRAIN, "validation": HELD_OUT}
    for name, path in splits.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        check = found["splits"][name]
        assert check["rows"] == len(rows)
        assert check["prompts"] == len({row["source"].strip() for row in rows})
        assert check["refused"] == 0
        assert check["easy_negatives"] == 1
        assert sum(check["lengths"]["chosen"]["histogram"]) == len(rows)
        assert check["chosen"]["any_dialect"] > check["negatives"]["any_dialect"] + 0.3
        assert check["chosen"]["latin"] < 0.1
    assert found["prompts_on_both_sides"] == 0
    assert "1357 rows as source, chosen, rejected" in found["reading"]
    assert any("dialect words stand mostly in chosen" in line for line in found["findings"])


def test_preview_shows_the_texts_with_their_own_direction(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "row.html"
    run(monkeypatch, "data", "preview", str(config), "--row", "0", "--html", str(page))
    row = json.loads(TRAIN.read_text(encoding="utf-8").split("\n")[0])
    passages = re.findall(
        r'<div class="text" dir="auto">(.*?)</div>', page.read_text(encoding="utf-8"), re.DOTALL
    )
    texts = [html.unescape(re.sub(r"<[^>]+>", "", passage)) for passage in passages]
    prompt, chosen, rejected = (text.replace("⏎", "") for text in texts)
    assert prompt == f"Translate this from English to Arabic:\nEnglish: {row['source']}\nArabic:"
    assert chosen == f" {row['chosen']}<|im_end|>"
    assert rejected == f" {row['rejected']}<|im_end|>"


def test_a_short_run_learns_to_prefer_the_post_edits(config: Path) -> None:
    overrides = ["data.max_samples=192", "data.padding=packed"]
    result = train(load_config(config, overrides).config, SilentObserver())
    records = MetricsFile(result.directory.metrics).read()
    held = [record for record in records if "eval_rewards/accuracies" in record]
    before, after = held[0], held[-1]
    assert before["step"] < after["step"] == 12
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"] + 0.05
    assert after["eval_loss"] < before["eval_loss"] - 0.3
