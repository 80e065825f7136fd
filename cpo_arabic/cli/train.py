"""``cpo-arabic train`` and ``cpo-arabic evaluate``."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cpo_arabic.cli.options import ConfigArgument, JsonOption, SetOption
from cpo_arabic.cli.show import safe, show_findings, stderr, stdout

if TYPE_CHECKING:
    from cpo_arabic.training.trainer import StopRequest

SHOWN = (
    ("reward accuracy", "rewards/accuracies"),
    ("reward margin", "rewards/margins"),
    ("reward of chosen", "rewards/chosen"),
    ("reward of rejected", "rewards/rejected"),
    ("NLL of chosen, nats/token", "nll_loss"),
    ("preference loss", "preference_loss"),
    ("contrastive loss", "contrastive/loss"),
    ("contrastive accuracy", "contrastive/accuracy"),
    ("loss as optimised", "loss"),
)


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command("train")(train)
    app.command("evaluate")(evaluate)


def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in training.output_dir.")
    ] = False,
) -> None:
    """Train as CONFIG says; at the end, show what was learnt.

    The run directory (training.output_dir) gets config.yaml, metrics.jsonl, checkpoints, final/
    with the adapter or model, summary.json and curves.png. Ctrl-C or SIGTERM saves a checkpoint at
    the next step and stops; go on with --resume.
    """
    from cpo_arabic.config import load_config
    from cpo_arabic.config.advice import describe_objective

    loaded = load_config(config, overrides or [])
    console = stdout()
    with quiet_libraries():
        from cpo_arabic.run.training import train as run
        from cpo_arabic.training.trainer import StopRequest

        warnings = [f for f in loaded.findings if f.severity == "warning"]
        show_findings(warnings, stderr())
        _say(console, f"objective: {describe_objective(loaded.config)}")
        stop = StopRequest()
        with _stopping_on_signals(stop, stderr()), ProgressObserver(console) as observer:
            result = run(loaded.config, observer, resume=resume, stop=stop)
    if result.outcome.stopped_by is not None:
        _say(
            console,
            f"stopped at step {result.outcome.step}, checkpoint saved; go on with: "
            f"cpo-arabic train {config} --resume",
        )
        raise typer.Exit(128 + result.outcome.stopped_by)
    if result.summary:
        _show_summary(result.summary, console)
        _say(console, f"run directory  {result.directory.root}")
        _say(console, f"trained model  {result.directory.final}")
        _say(console, f"curves         {result.directory.curves}")


def evaluate(
    target: Annotated[
        Path,
        typer.Argument(help="A run directory, or the YAML file of a run.", metavar="CONFIG|RUN"),
    ],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a finished run on its held-out rows (or data.test_file), before against after."""
    with quiet_libraries():
        from cpo_arabic.run.evaluation import compare, config_of
        from cpo_arabic.training.observer import SilentObserver

        console = stdout()
        run_config = config_of(target, overrides or [])
        observer = SilentObserver() if as_json else ProgressObserver(console)
        found = compare(run_config, observer)
    if as_json:
        record = {"rows": found.rows, "before": found.before, "after": found.after}
        typer.echo(json.dumps(record, indent=2))
        return
    console.print(_comparison(f"{found.rows} held-out rows", found.before, found.after))


class ProgressObserver:
    """Draws a run on the terminal: stages, a bar with the terms, evaluations."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[terms]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None
        self._plain = not console.is_terminal

    def __enter__(self) -> ProgressObserver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def stage(self, text: str) -> None:
        """A line of its own."""
        _say(self.console, f"· {text}", "dim")

    def warning(self, text: str) -> None:
        """A line that stands out."""
        _say(self.console, f"warning: {text}", "yellow")

    def started(self, step: int, total_steps: int) -> None:
        """Starts the bar; without a terminal, lines stand in for it."""
        if not self._plain:
            self._progress.start()
        self._task = self._progress.add_task("", total=total_steps, completed=step, terms="")

    def stepped(self, step: int, record: dict[str, Any] | None) -> None:
        """Moves the bar."""
        terms = _terms(record) if record is not None else None
        if self._plain:
            total = int(self._progress.tasks[0].total or 1)
            if terms is not None and (step % max(1, total // 20) == 0 or step == total):
                self.console.print(f"step {step}/{total}  {terms}")
            return
        self._progress.update(self._task, completed=step)
        if terms is not None:
            self._progress.update(self._task, terms=terms)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """One line of held-out metrics."""
        self.console.print(
            Text(
                f"held out at step {step}: reward accuracy "
                f"{metrics['eval_rewards/accuracies']:.3f}, margin "
                f"{metrics['eval_rewards/margins']:.4f}, NLL of chosen "
                f"{metrics['eval_nll_loss']:.3f}",
                style="cyan",
            )
        )

    def saved(self, step: int, folder: str) -> None:
        """One line."""
        _say(self.console, f"saved step {step}: {folder}", "dim")


def _say(console: Console, line: str, style: str = "") -> None:
    """Prints a line that may hold paths and data: no markup, nothing that plays tricks."""
    console.print(Text(safe(line), style=style))


def _terms(record: dict[str, Any]) -> str:
    names = (
        ("loss", "loss", ".3f"),
        ("accuracy", "rewards/accuracies", ".2f"),
        ("nll", "nll_loss", ".2f"),
        ("contrastive", "contrastive/loss", ".2f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("full", "fill_ratio", ".0%"),
    )
    return "  ".join(f"{label} {record[key]:{how}}" for label, key, how in names if key in record)


def _show_summary(summary: dict[str, Any], console: Console) -> None:
    title = f"{summary['steps']} steps over {summary['train_rows']} rows; held-out metrics"
    if summary["held_out_after"]:
        console.print(_comparison(title, summary["held_out_before"], summary["held_out_after"]))


def _comparison(title: str, before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table(title=title)
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for label, key in SHOWN:
        old, new = before.get(f"eval_{key}"), after.get(f"eval_{key}")
        if new is None:
            continue
        change = "" if old is None else f"{new - old:+.4f}"
        table.add_row(label, "" if old is None else f"{old:.4f}", f"{new:.4f}", change)
    return table


@contextmanager
def _stopping_on_signals(stop: StopRequest, console: Console) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C ask for a stop at the next step; a second Ctrl-C is at once."""

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        console.print("stopping after this step; the checkpoint is being saved")

    old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the libraries' own bars and hints off the terminal; their errors still come."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
