"""No field without effect: each changes the run, or the configuration says that it cannot."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cpo_arabic.config import ConfigError, CPOConfig
from cpo_arabic.config.advice import describe_objective
from cpo_arabic.config.fields import all_fields
from cpo_arabic.config.inert import INERT, inert_reason
from cpo_arabic.config.rules import Settled
from tests.config import rooms
from tests.config.liveness import FURTHER, PROOFS, SEEN, TOY, Proof

LIVE = [proof for proof in (*PROOFS, *FURTHER) if proof.seen != "refused"]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The files of the toy runs, as the working directory; one thread, for equal sums."""
    folder = tmp_path_factory.mktemp("world")
    rooms.build_world(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield
    torch.set_num_threads(threads)


def identified(proof: Proof) -> str:
    return f"{proof.path}-{proof.seen}"


def observer(name: str) -> Callable[[CPOConfig], Any]:
    found: Callable[[CPOConfig], Any] = getattr(rooms, name)
    return found


def toy(*changes: dict[str, Any]) -> CPOConfig:
    merged = dict(TOY)
    for each in changes:
        merged |= each
    return CPOConfig().updated(merged)


def test_every_field_has_exactly_one_proof() -> None:
    assert [proof.path for proof in PROOFS] == list(all_fields())


def test_every_observer_is_used_and_described() -> None:
    assert {proof.seen for proof in (*PROOFS, *FURTHER)} == set(SEEN)
    assert all(inspect.isfunction(getattr(rooms, name)) for name in SEEN if name != "refused")


@pytest.mark.parametrize("proof", LIVE, ids=identified)
def test_a_changed_field_changes_the_run(proof: Proof) -> None:
    before = toy(proof.given)
    after = before.updated({proof.path: proof.value})
    assert before.resolved().get(proof.path) != after.get(proof.path)
    assert inert_reason(proof.path, Settled(after)) is None
    look = observer(proof.seen)
    assert look(before) != look(after)


@pytest.mark.parametrize("name", sorted(set(SEEN) - {"refused"}))
def test_an_observer_sees_the_same_run_twice_as_the_same(name: str) -> None:
    """The control: what differs above does not differ by itself."""
    config = toy(next(proof.given for proof in LIVE if proof.seen == name))
    first = observer(name)(config)
    rooms.forget()
    assert observer(name)(config) == first


def test_reference_free_refuses_a_reference() -> None:
    proof = next(proof for proof in PROOFS if proof.seen == "refused")
    with pytest.raises(ConfigError, match="reference_free"):
        toy(proof.given, {proof.path: proof.value})


@pytest.mark.parametrize("proof", [p for p in PROOFS if p.given], ids=identified)
def test_without_its_setting_a_field_says_that_it_is_inert(proof: Proof) -> None:
    try:
        after = toy({proof.path: proof.value})
    except ConfigError:
        return
    # Elsewhere the setting only makes the effect small, quick or certain.
    live_anyway = {
        "model.attn_implementation",
        "optimization.bf16",
        "training.save_total_limit",
        "training.max_skipped_steps",
        "data.validation_split_percentage",
        "data.on_bad_row",
        "data.generate_during_eval",
        "data.augment_data",
        "cpo.negative_sampling_strategy",
    }
    assert inert_reason(proof.path, Settled(after)) is not None or proof.path in live_anyway


# One configuration per entry of the table in which it holds, by the names of its switches.
HOLDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("cpo.preference_weight", "cpo.contrastive_weight"): {
        "cpo.preference_weight": 0,
        "cpo.contrastive_weight": 0,
    },
    ("cpo.preference_weight",): {"cpo.preference_weight": 0},
    ("cpo.contrastive_weight",): {"cpo.contrastive_weight": 0},
    ("cpo.force_use_ref_model", "cpo.reference_model_name"): {},
    ("data.truncation",): {
        "data.truncation": False,
        "data.on_bad_row": "skip",
        "model.max_length": 512,
    },
    ("optimization.use_lora",): {"optimization.use_lora": False},
    ("data.augmentation_strategy",): {
        "data.augment_data": True,
        "data.augmentation_strategy": "digits",
    },
    ("data.hard_negative_strategy",): {
        "data.create_hard_negatives": True,
        "data.hard_negative_strategy": "bm25",
    },
    ("data.validation_file",): {"data.validation_file": "data/cpo_validation.jsonl"},
    ("data.dataset_name",): {},
    ("training.max_steps",): {"training.max_steps": 3},
    ("data.padding",): {"data.padding": "longest"},
    ("training.lr_scheduler_type",): {"training.lr_scheduler_type": "constant"},
    ("data.validation_file", "data.validation_split_percentage"): {
        "data.validation_file": None,
        "data.validation_split_percentage": 0.0,
    },
}
SPECIAL = {
    "cpo.temperature": {"cpo.loss_type": "ipo"},
    "data.train_file": {"data.dataset_name": "org/data"},
    "cpo.force_use_ref_model": {"cpo.reference_model_name": "other"},
}


INDIRECT = ("texts", "work", "refused")


def holding(number: int) -> CPOConfig:
    """A toy run in which the entry of the table holds."""
    entry = INERT[number]
    own = SPECIAL.get(entry.fields[0]) if len(entry.fields) == 1 else None
    return toy(own or HOLDS.get(entry.switches, {}))


@pytest.mark.parametrize("number", range(len(INERT)))
def test_every_entry_of_the_table_holds_somewhere_and_not_everywhere(number: int) -> None:
    entry, config = INERT[number], holding(number)
    assert entry.holds(Settled(config)), entry
    reason = inert_reason(entry.fields[0], Settled(config))
    assert reason is not None and any(switch in reason.because for switch in entry.switches)
    proof = next(proof for proof in PROOFS if proof.path == entry.fields[0])
    assert not entry.holds(Settled(toy(proof.given))), entry


@pytest.mark.parametrize("number", range(len(INERT)))
def test_an_inert_field_changes_nothing_that_is_trained_or_stated(number: int) -> None:
    """The declaration is checked from the other side, by the losses and gradient of a step."""
    entry, before = INERT[number], holding(number)
    for path in entry.fields:
        proof = next(proof for proof in PROOFS if proof.path == path)
        try:
            after = before.updated({path: proof.value})
        except ConfigError:
            continue  # refused, which is plainer still
        assert describe_objective(before) == describe_objective(after), path
        # What comes of it, where the observer looks at what is read or computed.
        look = rooms.step if proof.seen in INDIRECT else observer(proof.seen)
        if entry.switches[0] == "data.validation_file" and look is rooms.held_out:
            continue
        assert look(before) == look(after), path


def test_the_table_names_real_fields() -> None:
    for entry in INERT:
        assert {*entry.fields, *entry.switches} <= set(all_fields())
        assert entry.when
