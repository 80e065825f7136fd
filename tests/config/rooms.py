"""What a run of a toy model shows, seen from outside: the observers of the proofs of liveness.

Each public function takes a resolved configuration and returns plain values that can be compared.
Most look at a run that is assembled by ``train`` itself and held just before its loop; libraries
that a test cannot use (the hub, quantised weights, Weights & Biases) are replaced by a record of
what they were asked for. :func:`build_world` writes the files that the runs read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cpo_arabic.config import CPOConfig
from cpo_arabic.data import tokenize as tokenising
from cpo_arabic.data.records import PreferenceRecord
from cpo_arabic.data.workers import start_worker, work_on
from cpo_arabic.errors import DataError, RunDirectoryError, TrainingError
from cpo_arabic.modeling import loading
from cpo_arabic.modeling.policy import Reference, causal_lm
from cpo_arabic.run import accelerator as run_accelerator
from cpo_arabic.run import data as run_data
from cpo_arabic.run import evaluation as run_evaluation
from cpo_arabic.run import model as run_model
from cpo_arabic.run import training as run_training
from cpo_arabic.training import plan
from cpo_arabic.training import trainer as loop
from cpo_arabic.training.metrics import MetricsFile
from cpo_arabic.training.observer import SilentObserver
from cpo_arabic.training.step import accumulate
from cpo_arabic.training.trainer import Trainer, total_of_means

DEMO = Path(__file__).resolve().parents[2] / "demo"
ROWS, HELD_OUT = 12, 5


# --- the world -----------------------------------------------------------------------------------


def build_world(folder: Path) -> None:
    """Two toy models, two tokenizers and small data sets, under relative names."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base-model")
    for seed, name in enumerate(("toy", "other")):
        _toy(len(tokenizer), seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "other-tokenizer")
    _forget_merges(folder / "other-tokenizer" / "tokenizer.json")
    lines = (DEMO / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    (folder / "data").mkdir()
    train = [_full(rows, number) for number in range(ROWS)]
    _write(folder / "data" / "cpo_train.jsonl", train)
    _write(folder / "data" / "cpo_validation.jsonl", [_full(rows, 30 + n) for n in range(HELD_OUT)])
    _write(folder / "other.jsonl", [_full(rows, 50 + n) for n in range(ROWS)])
    _write(folder / "test.jsonl", [_full(rows, 80 + n) for n in range(3)])
    _write(folder / "bad.jsonl", [*train, {"prompt": "سؤال", "chosen": ""}])


def _toy(vocabulary: int, seed: int) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            attention_dropout=0.3,
            tie_word_embeddings=True,
        )
    )


def _forget_merges(path: Path) -> None:
    description = json.loads(path.read_text(encoding="utf-8"))
    merges = description["model"]["merges"]
    description["model"]["merges"] = merges[: len(merges) // 2]
    path.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")


def _full(rows: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """A row in which every column that a field may name says something of its own."""
    row, following = rows[number], rows[number + 100 : number + 106]
    answers = [other["chosen"] for other in following]
    prompt = row["prompt"] + " 12 \u0627\u0655"  # digits to rewrite; an alef not in NFC
    if number % 4 == 0:
        prompt = " ".join([prompt, *answers])  # over its budget
    return {
        "prompt": prompt,
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "system": "أجب بإيجاز.",
        "negatives": answers[:2],
        "hard_negatives": answers[2:4],
        "q": f"سؤال {number}",
        "good": answers[4],
        "bad": answers[5],
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """A folder of its own with the world's entries in it, as the working directory."""
    world = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="run-"))
    try:
        for entry in world.iterdir():
            (folder / entry.name).symlink_to(entry)
        with contextlib.chdir(folder):
            yield folder
    finally:
        shutil.rmtree(folder)


def _files(folder: Path) -> list[str]:
    """What was written there, without what is new in every run."""
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    names = [path.as_posix() for path in found if not (folder / path.parts[0]).is_symlink()]
    return sorted("tensorboard events" if "tfevents" in name else name for name in names)


# --- a run, assembled and held -------------------------------------------------------------------


class _HeldError(Exception):
    """Raised where the loop would begin."""


@dataclass
class Assembled:
    """A run that ``train`` has put together, with what was asked of others on the way."""

    trainer: Any = None
    asked: list[Any] = field(default_factory=list)
    tokenised: list[Any] = field(default_factory=list)
    at_once: list[int] = field(default_factory=list)
    tracked: list[Any] = field(default_factory=list)
    trial: list[Any] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class _Listener(SilentObserver):
    def __init__(self, told: list[str]) -> None:
        self.told = told

    def stage(self, text: str) -> None:
        self.told.append(text)

    def warning(self, text: str) -> None:
        self.told.append(f"warning: {text}")

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.told.append(f"evaluated {step}")

    def saved(self, step: int, folder: str) -> None:
        self.told.append(f"saved {step}")


@cache
def _assembled_once(written: str) -> Assembled:
    return _assemble(CPOConfig.model_validate_json(written))


def assembled(config: CPOConfig) -> Assembled:
    """The run of this configuration; equal ones are assembled once."""
    return _assembled_once(config.model_dump_json(exclude_unset=True))


def forget() -> None:
    """Nothing that was assembled or trained is taken from memory any more."""
    _assembled_once.cache_clear()
    _trained_once.cache_clear()


def _assemble(config: CPOConfig, prepare: Callable[[], None] = lambda: None) -> Assembled:
    made = Assembled()

    def hold(trainer: Trainer) -> None:
        made.trainer = trainer
        raise _HeldError

    with _place() as folder, _replaced(made), mock.patch.object(Trainer, "train", hold):
        prepare()
        with contextlib.suppress(_HeldError):
            run_training.train(config.resolved(), _Listener(made.told))
        made.files = _files(folder)
    return made


@contextlib.contextmanager
def _replaced(made: Assembled) -> Iterator[None]:
    """Records in the place of what a test cannot use."""
    real_tokenize, real_check = run_data.tokenize, run_training.check_learning
    real_accelerator = run_accelerator.Accelerator

    def tokenize(config: CPOConfig, records: Any, tokenizer: Any, **options: Any) -> Any:
        made.at_once.append(len(records) if isinstance(records, Sequence) else 1)
        seen: list[Any] = []
        made.tokenised.append(seen)
        if isinstance(records, Sequence):
            seen += map(_said, records)
        else:
            records = _watched(records, seen)
        return real_tokenize(config, records, tokenizer, **options)

    def check(engine: Any, batches: Any, *, learning_rate: float) -> None:
        made.trial.append([batch.group_rows.tolist() for batch in batches()])
        real_check(engine, batches, learning_rate=learning_rate)

    def accelerator(**options: Any) -> Any:
        made.tracked.append(options["log_with"])
        return real_accelerator(**{**options, "log_with": None})

    def trackers(self: Any, project: str, config: Any = None, init_kwargs: Any = None) -> None:
        mine = {name: init_kwargs.get(name, {}) for name in made.tracked[-1] or ()}
        kept = {n: {k: v for k, v in of.items() if k != "dir"} for n, of in mine.items()}
        made.tracked.append((project, kept))

    patches = [
        mock.patch.object(run_data, "tokenize", tokenize),
        mock.patch.object(run_training, "check_learning", check),
        mock.patch.object(run_accelerator, "Accelerator", accelerator),
        mock.patch.object(real_accelerator, "init_trackers", trackers),
        mock.patch.object(run_accelerator, "find_spec", lambda name: name),
        mock.patch.object(run_model, "check_quantization", lambda: None),
        mock.patch.object(loading, "check_quantization", lambda: None),
        mock.patch.object(tokenising, "WORTH_WORKERS", 1),
        mock.patch.object(tokenising, "BATCH_ROWS", 1),
        mock.patch.object(tokenising, "ProcessPoolExecutor", _pool(made)),
        *(_recorded(made, name) for name in ("AutoTokenizer", "AutoConfig")),
        mock.patch.object(loading, "AutoModelForCausalLM", _models(made)),
    ]
    with contextlib.ExitStack() as stack, _stand_in_hub():
        for patch in patches:
            stack.enter_context(patch)
        yield


def _said(record: PreferenceRecord) -> Any:
    turns = [turn.content for turn in record.turns]
    return turns, record.chosen, record.easy_negatives, record.hard_negatives


def _watched(records: Iterable[PreferenceRecord], seen: list[Any]) -> Iterator[PreferenceRecord]:
    for record in records:
        seen.append(_said(record))
        yield record


def _recorded(made: Assembled, name: str) -> Any:
    real = getattr(loading, name)

    def from_pretrained(source: str, **options: Any) -> Any:
        made.asked.append((name, source, sorted(options.items())))
        return real.from_pretrained(source, **options)

    return mock.patch.object(loading, name, types.SimpleNamespace(from_pretrained=from_pretrained))


def _models(made: Assembled) -> Any:
    real = loading.AutoModelForCausalLM

    def from_pretrained(source: str, *, config: Any, **options: Any) -> Any:
        quantised = options.pop("quantization_config", None)
        bits = quantised.to_dict() if quantised is not None else None
        shown = [(k, str(v)) for k, v in sorted(options.items())]
        made.asked.append(("model", source, shown, bits and str(sorted(bits.items(), key=str))))
        model = real.from_pretrained(source, config=config, **options)
        # A mask buffer such as old checkpoints bring.
        model.register_buffer("bias", torch.ones(1, dtype=torch.bool), persistent=False)
        return model

    return types.SimpleNamespace(from_pretrained=from_pretrained)


def _pool(made: Assembled) -> Any:
    class Pool:
        """A pool that works at once, in this process."""

        def __init__(self, workers: int, *, initargs: Any, **_: Any) -> None:
            made.processes.append(workers)
            start_worker(*initargs)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, work: Any, part: Any) -> Any:
            assert work is work_on
            result = work(part)
            return types.SimpleNamespace(result=lambda: result)

    return Pool


@contextlib.contextmanager
def _stand_in_hub() -> Iterator[None]:
    """``datasets`` with a hub whose rows say which data set, subset and split they are of."""

    def load_dataset(name: str, subset: str | None, *, split: str, revision: str | None) -> Any:
        return [
            {"prompt": f"{name} {subset} {split} {row}", "chosen": f"نعم {row}", "rejected": "لا"}
            for row in range(ROWS)
        ]

    known = sys.modules.get("datasets")
    sys.modules["datasets"] = types.SimpleNamespace(load_dataset=load_dataset)  # type: ignore[assignment]
    try:
        yield
    finally:
        if known is None:
            del sys.modules["datasets"]
        else:
            sys.modules["datasets"] = known


def _digest(value: Tensor) -> str:
    plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=8).hexdigest()


# --- observers: what is read ---------------------------------------------------------------------


def asked(config: CPOConfig) -> Any:
    return [one for one in assembled(config).asked if one[0] != "AutoTokenizer"]


def asked_tokenizer(config: CPOConfig) -> Any:
    return [one for one in assembled(config).asked if one[0] == "AutoTokenizer"]


def texts(config: CPOConfig) -> Any:
    return assembled(config).tokenised


def at_once(config: CPOConfig) -> Any:
    return assembled(config).at_once


def outcome(config: CPOConfig) -> Any:
    try:
        return batches(config)
    except DataError as error:
        return f"refused: {error}"


def batches(config: CPOConfig) -> Any:
    loader = assembled(config).trainer.loader
    return [
        (tuple(batch.input_ids.shape), _digest(batch.input_ids), batch.completion_lengths.tolist())
        for share in loader.shares(0, 0)
        for batch in share.batches
    ]


def drawn(config: CPOConfig) -> Any:
    source = assembled(config).trainer.loader.source
    return [source.group(row, 0).completion_keys for row in range(len(source))]


def steps(config: CPOConfig) -> Any:
    loader = assembled(config).trainer.loader
    schedule = loader.schedule
    places = map(schedule.epoch_of, range(schedule.total_steps))
    return [loader.windows(epoch)[window] for epoch, window in places]


def held_out(config: CPOConfig) -> Any:
    return [batch.group_rows.tolist() for batch in assembled(config).trainer.evaluation()]


def measured(config: CPOConfig) -> Any:
    made = Assembled()
    with _place(), _replaced(made), mock.patch.object(run_evaluation, "_measure", lambda *_: {}):
        (Path(config.training.output_dir) / "final").mkdir(parents=True)
        run_evaluation.compare(config.resolved(), SilentObserver())
    return made.tokenised


def tokenisers(config: CPOConfig) -> Any:
    return assembled(config).processes


def loaders(config: CPOConfig) -> Any:
    found: list[int] = []

    def record(dataset: Any, *, num_workers: int, **_: Any) -> Any:
        found.append(num_workers)
        return []

    with mock.patch.object(plan, "DataLoader", record):
        list(assembled(config).trainer.loader.shares(0, 0))
    return found


# --- observers: what is trained ------------------------------------------------------------------


def weights(config: CPOConfig) -> Any:
    policy = assembled(config).trainer.engine.bare
    return {
        name: (str(p.dtype), tuple(p.shape), p.requires_grad, _digest(p))
        for name, p in policy.named_parameters()
    }


def rates(config: CPOConfig) -> Any:
    trainer = assembled(config).trainer
    return [trainer.learning_rate(step) for step in range(trainer.total_steps)]


def step(config: CPOConfig) -> Any:
    return _first_step(config)["objective"]


def work(config: CPOConfig) -> Any:
    return _first_step(config)["work"]


def _first_step(config: CPOConfig) -> dict[str, Any]:
    """Objective and work of the first optimizer step, nothing updated."""
    trainer = assembled(config).trainer
    engine, policy = trainer.engine, trainer.engine.bare
    calls: list[str] = []
    kinds: set[str] = set()

    def ran(_module: Any, _inputs: Any, output: Tensor) -> None:
        calls.append("layer")
        kinds.add(str(output.dtype))

    modules = causal_lm(policy.model).modules()
    hooks = [m.register_forward_hook(ran) for m in modules if type(m).__name__ == "Qwen2MLP"]
    scores, attend = Reference.log_probs, nn.functional.scaled_dot_product_attention

    def scored(self: Any, batch: Any) -> Any:
        calls.append("reference")
        return scores(self, batch)

    def attended(*arguments: Any, **options: Any) -> Any:
        calls.append("scaled_dot_product_attention")
        return attend(*arguments, **options)

    engine.policy.train()
    share = next(iter(trainer.loader.shares(0, 0)))
    with (
        mock.patch.object(Reference, "log_probs", scored),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", attended),
    ):
        sums, _ = accumulate(engine, share, 0)
    for hook in hooks:
        hook.remove()
    means = sums.means()
    gradient = {n: _digest(p.grad) for n, p in trainer.parameters.items() if p.grad is not None}
    policy.zero_grad()
    assert all(map(math.isfinite, means.values()))
    return {
        "objective": (means, total_of_means(means, engine.objective), gradient),
        "work": ({name: calls.count(name) for name in sorted(set(calls))}, sorted(kinds)),
    }


def compiled(config: CPOConfig) -> Any:
    return assembled(config).trainer.engine.bare.decoder._compiled_call_impl is not None


def buffers(config: CPOConfig) -> Any:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    policy = _assemble(config).trainer.engine.bare
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(policy)
        return sorted(str(buffer.dtype) for buffer in wrapped.modules_buffers)
    finally:
        distributed.destroy_process_group()


def trial(config: CPOConfig) -> Any:
    return assembled(config).trial


# --- observers: what is left behind --------------------------------------------------------------


def trained(config: CPOConfig) -> Any:
    return _trained_once(config.model_dump_json(exclude_unset=True))


@cache
def _trained_once(written: str) -> Any:
    config = CPOConfig.model_validate_json(written)
    with _place() as folder:
        result = run_training.train(config.resolved(), SilentObserver())
        records = MetricsFile(result.directory.metrics).read()
        for record in records:
            for clock in ("tokens_per_second", "eval_runtime"):
                record.pop(clock, None)
        final = sorted(result.directory.final.glob("*.safetensors"))
        kept = {name: _digest(w) for path in final for name, w in load_file(path).items()}
        return records, kept, _files(folder)


def skipping(config: CPOConfig) -> Any:
    """Every gradient is infinite."""
    real = loop.accumulate
    taken: list[int] = []

    def poisoned(engine: Any, share: Any, number: int) -> Any:
        found = real(engine, share, number)
        next(iter(engine.bare.trainable().values())).grad.fill_(float("inf"))
        taken.append(number)
        return found

    with (
        _place(),
        mock.patch.object(loop, "accumulate", poisoned),
        contextlib.suppress(TrainingError),
    ):
        run_training.train(config.resolved(), SilentObserver())
    return taken


def used_folder(config: CPOConfig) -> Any:
    def use() -> None:
        (Path(config.training.output_dir) / "checkpoint-1").mkdir(parents=True)

    try:
        return _assemble(config, use).files
    except RunDirectoryError as error:
        return f"refused: {error}"


def folder(config: CPOConfig) -> Any:
    return assembled(config).files


def trackers(config: CPOConfig) -> Any:
    return assembled(config).tracked


def messages(config: CPOConfig) -> Any:
    return assembled(config).told
