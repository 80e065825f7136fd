"""The verbs that show data before it trains: ``data check`` and ``data preview``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cpo_arabic.cli.options import EXIT_REFUSED, ConfigArgument, JsonOption, SetOption
from cpo_arabic.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from cpo_arabic.config import CPOConfig
    from cpo_arabic.data.check import DataCheck
    from cpo_arabic.data.preview import Passage, Preview
    from cpo_arabic.data.records import PreferenceRecord
    from cpo_arabic.data.tokenize import PreferenceDataset

verbs = typer.Typer(
    name="data",
    help="Look at preference data before training on it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.add_typer(verbs)


# --- check --------------------------------------------------------------------------------------


@verbs.command("check")
def check(config: ConfigArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Report what CONFIG's data holds: rows, lengths, cuts, duplicates, biases.

    Reads and tokenises as training would, and writes nothing. Bad rows are listed, not met one by
    one; exit status 2 where there is one and data.on_bad_row is error.
    """
    from cpo_arabic.cli.show import print_json, stdout

    found, bad = run_check(_config(config, overrides))
    if as_json:
        print_json(found.as_data())
    else:
        show_check(found, stdout())
    if bad:
        raise typer.Exit(EXIT_REFUSED)


def run_check(config: CPOConfig) -> tuple[DataCheck, bool]:
    """Check a configuration's data; also say whether training would refuse a row of it."""
    from cpo_arabic.data.check import check_data
    from cpo_arabic.run import data as run_data
    from cpo_arabic.run.model import tokenizer_of

    strict = config.data.on_bad_row == "error"
    config.data.on_bad_row = "skip"
    tokenizer = tokenizer_of(config)
    records = run_data.read(config)
    splits = {"train": records.train, "validation": records.validation}
    splits["test"] = run_data.read_test(config)
    tokenised: dict[str, tuple[Sequence[PreferenceRecord], PreferenceDataset]] = {
        name: (rows, run_data.tokenize(config, rows, tokenizer))
        for name, rows in splits.items()
        if rows
    }
    refused = [
        f"{name}: {row.source}:{row.line}: {row.reason}"
        for name, (_, dataset) in tokenised.items()
        for row in dataset.report.refused
    ]
    found = check_data(tokenised, [*records.notes, *refused])
    skipped = any("bad rows skipped" in note for note in records.notes)
    return found, strict and bool(refused or skipped)


def show_check(found: DataCheck, console: Console) -> None:
    """Print a check: a table of facts, histograms, and what to look at."""
    from cpo_arabic.cli.show import safe

    for line in found.reading:
        console.print(Text(safe(line), style="dim"))
    console.print()
    console.print(_facts(found))
    for name, split in found.splits.items():
        console.print(_histograms(name, split.lengths))
    console.print(Text("Worth a look" if found.findings else "Nothing stands out", style="bold"))
    for line in found.findings:
        console.print(Text(f"  • {line}"))


def _facts(found: DataCheck) -> Table:
    table = Table(box=None, title="What is there", title_justify="left", title_style="bold")
    table.add_column("")
    for name in found.splits:
        table.add_column(name, justify="right")
    rows: dict[str, Any] = {
        "rows": lambda s: f"{s.rows:,}",
        "different prompts": lambda s: f"{s.prompts:,}",
        "rows repeated word for word": lambda s: f"{s.repeated_rows:,}",
        "negatives a row, easy + hard": lambda s: (
            f"{s.easy_negatives:.1f} + {s.hard_negatives:.1f}"
        ),
        "prompts truncated": lambda s: f"{s.prompts_truncated:,}",
        "completions cut (chosen)": lambda s: f"{s.completions_cut:,} ({s.chosen_cut:,})",
        "negatives alike after the cut": lambda s: f"{s.negatives_alike_after_cut:,}",
        "rows refused": lambda s: f"{s.refused:,}",
        "chosen longer than its negatives": lambda s: f"{s.chosen_longer:.0%}",
        "tokens, chosen / negatives": lambda s: f"{s.length_ratio:.2f}",
        "near-empty, chosen | negatives": lambda s: (
            f"{s.chosen.near_empty:,} | {s.negatives.near_empty:,}"
        ),
        "Latin letters": lambda s: f"{s.chosen.latin:.0%} | {s.negatives.latin:.0%}",
        "texts with diacritics": lambda s: (
            f"{s.chosen.diacritised:.0%} | {s.negatives.diacritised:.0%}"
        ),
        "texts with dialect words": lambda s: (
            f"{s.chosen.any_dialect:.0%} | {s.negatives.any_dialect:.0%}"
        ),
    }
    for label, value in rows.items():
        table.add_row(label, *(value(split) for split in found.splits.values()))
    table.add_row("prompts in more than one split", f"{found.prompts_on_both_sides:,}")
    return table


def _histograms(name: str, lengths: dict[str, Any]) -> Table:
    """Quantiles, and a bar a bin under the bin's upper bound."""
    from cpo_arabic.data.check import EDGES

    bounds = [str(edge) if edge < 1000 else f"{edge // 1000}k" for edge in EDGES[1:]] + ["more"]
    table = Table(
        box=None, title=f"Tokens, {name}", title_justify="left", title_style="bold", padding=(0, 1)
    )
    table.add_column("below", no_wrap=True)
    for heading in ("median", "p99", "most"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(" ".join(bounds), no_wrap=True)
    marks = "▁▂▃▄▅▆▇█"
    for label, found in lengths.items():
        most = max(found.histogram) or 1
        bars = " ".join(
            (marks[max(0, round(8 * count / most) - 1)] if count else "·").rjust(len(bound))
            for count, bound in zip(found.histogram, bounds, strict=True)
        )
        table.add_row(label, str(found.median), str(found.p99), str(found.most), bars)
    return table


# --- preview ------------------------------------------------------------------------------------


@verbs.command("preview")
def preview(
    config: ConfigArgument,
    overrides: SetOption = None,
    row: Annotated[int, typer.Option("--row", min=0, help="Row of the split, from 0.")] = 0,
    split: Annotated[
        str, typer.Option("--split", help="train or validation.", metavar="SPLIT")
    ] = "train",
    epoch: Annotated[
        int, typer.Option("--epoch", min=0, help="Epoch whose negatives are drawn.")
    ] = 0,
    to_html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to open or send.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show one row's exact tokens: what is prompt, what trains, what is cut.

    Text stays in logical order here; the page of --html lets the browser lay it out.
    """
    from cpo_arabic.cli.show import print_json, stdout
    from cpo_arabic.data.preview import as_html

    found = run_preview(_config(config, overrides), row=row, split=split, epoch=epoch)
    if to_html is not None:
        try:
            to_html.write_text(as_html(found), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{to_html}: cannot be written: {error.strerror}.") from None
    if as_json:
        print_json(found.as_data())
    elif to_html is not None:
        stdout().print(Text(f"wrote {to_html}"))
    else:
        show_preview(found, stdout())


def run_preview(config: CPOConfig, *, row: int, split: str, epoch: int) -> Preview:
    """Lay out the group that a row gives in an epoch, exactly as training draws it."""
    from cpo_arabic.data.encoding import Budgets
    from cpo_arabic.data.preview import label_of, preview_group
    from cpo_arabic.data.templates import load_template
    from cpo_arabic.run import data as run_data
    from cpo_arabic.run.model import tokenizer_of

    records = run_data.read(config)
    splits = {"train": records.train, "validation": records.validation}
    if split not in splits:
        raise DataError(f'--split "{split}" is neither train nor validation.')
    tokenizer = tokenizer_of(config)
    if not splits[split]:
        raise DataError(f"the split {split} has no row.")
    if split == "train":
        splits[split] = _enriched(config, records.train)
    dataset = run_data.tokenize(config, splits[split], tokenizer)
    if row >= len(dataset):
        raise DataError(f"--row {row}: {split} has {len(dataset)} rows, numbered from 0.")
    groups = run_data.groups(config, dataset)
    places = {record.place: record for record in splits[split]}
    record = places[dataset.place(row)]
    drawn = []
    for other, candidate in dataset.references(
        row,
        epoch=epoch,
        seed=groups.seed,
        num_negatives=groups.num_negatives,
        strategy=groups.strategy,
        hard_negative_ratio=groups.hard_negative_ratio,
    ):
        key = dataset.completion_keys(other)[candidate]
        source = places[dataset.place(other)]
        label, text = label_of(source, key)
        drawn.append((label if other == row else f"from {_short(source)}: {label}", text))
    data, cpo = config.data, config.cpo
    template = load_template(
        data.conversation_template, tokenizer, add_special_tokens=data.add_special_tokens
    )
    budgets = Budgets(
        cpo.max_length,
        cpo.max_prompt_length,
        cpo.max_target_length,
        cpo.truncation_mode,
        data.truncation,
    )
    return preview_group(record, drawn, tokenizer, template, budgets)


def _enriched(config: CPOConfig, rows: list[PreferenceRecord]) -> list[PreferenceRecord]:
    """The rows with mined negatives and twins; what was mined stays in data.cache_dir alone."""
    from cpo_arabic.run.enrich import enrich
    from cpo_arabic.training.observer import SilentObserver

    with tempfile.TemporaryDirectory() as scratch:
        if config.data.cache_dir is None:
            config = config.updated({"data.cache_dir": scratch})
        return enrich(config, rows, SilentObserver())


def _short(record: PreferenceRecord) -> str:
    return f"{Path(record.source).name}:{record.line}"


_STYLES = {
    "prompt": ("grey70", "grey50"),
    "trains": ("green", "bright_green"),
    "cut": ("red", "red"),
}


def show_preview(found: Preview, console: Console) -> None:
    """Print a preview; neighbouring tokens differ in shade."""
    legend = Text.assemble(
        ("prompt", "grey70"), "  ", ("trains", "green"), "  ", ("cut", "red strike"), "  ",
        ("control token", "magenta"),
    )  # fmt: skip
    console.print(Text(found.place, style="bold"), legend)
    for passage in (found.prompt, *found.completions):
        console.print()
        console.print(_passage(passage))


def _passage(passage: Passage) -> Text:
    from cpo_arabic.data.preview import shown

    cut = passage.whole - passage.kept
    note = f" {passage.kept} tokens" + (f", {cut} cut" if cut else "") + "\n"
    text = Text.assemble((passage.label, "bold"), (note, "dim"))
    for number, piece in enumerate(passage.pieces):
        style = "magenta" if piece.control else _STYLES[piece.kind][number % 2]
        text.append(shown(piece.text), style=f"{style} strike" if piece.kind == "cut" else style)
    return text


def _config(path: Path, overrides: list[str] | None) -> CPOConfig:
    from cpo_arabic.config import load_config

    return load_config(path, overrides or []).config
