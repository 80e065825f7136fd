"""No field without effect: each changes the run, or the configuration says that it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from cpo_arabic.config import ConfigError, CPOConfig
from cpo_arabic.config.fields import all_fields
from cpo_arabic.config.inert import INERT, inert_reason
from cpo_arabic.config.rules import Settled
from tests.config.liveness import OBJECTIVE, PROOFS, Proof

# Fields whose proof still waits for an observer that runs the rooms. It may only shrink.
PENDING = 84

# Declared inert by these settings; each is compared with the same field in a live setting.
INERT_BY = {
    "cpo.preference_weight": {"cpo.preference_weight": 0},
    "cpo.contrastive_weight": {"cpo.contrastive_weight": 0},
}


def identified(proof: Proof) -> str:
    return proof.path


def test_every_field_has_exactly_one_proof() -> None:
    assert [proof.path for proof in PROOFS] == list(all_fields())


def test_the_proofs_that_wait_for_a_room_are_counted() -> None:
    assert sum(proof.observe is None for proof in PROOFS) == PENDING


@pytest.mark.parametrize("proof", PROOFS, ids=identified)
def test_a_changed_field_is_live_where_its_proof_says(proof: Proof) -> None:
    before = CPOConfig().updated(proof.given)
    if proof.path == "cpo.reference_free":
        with pytest.raises(ConfigError):
            before.updated({proof.path: proof.value})
        return
    after = before.updated({proof.path: proof.value})
    assert before.get(proof.path) != after.get(proof.path)
    assert inert_reason(proof.path, Settled(after)) is None
    if proof.observe is not None:
        assert proof.observe(before) != proof.observe(after)


@pytest.mark.parametrize("proof", [p for p in PROOFS if p.given], ids=identified)
def test_without_its_setting_a_field_says_that_it_is_inert(proof: Proof) -> None:
    reason = inert_reason(proof.path, Settled(CPOConfig()))
    refused = False
    try:
        CPOConfig().updated({proof.path: proof.value})
    except ConfigError:
        refused = True
    assert reason is not None or refused or proof.path == "data.validation_split_percentage"


# One configuration per entry of the table in which it holds, by the names of its switches.
HOLDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("cpo.preference_weight", "cpo.contrastive_weight"): {
        "cpo.preference_weight": 0,
        "cpo.contrastive_weight": 0,
    },
    ("cpo.preference_weight",): {"cpo.preference_weight": 0},
    ("cpo.contrastive_weight",): {"cpo.contrastive_weight": 0},
    ("cpo.force_use_ref_model", "cpo.reference_model_name"): {},
    ("data.truncation",): {"data.truncation": False},
    ("optimization.use_lora",): {"optimization.use_lora": False},
    ("data.augmentation_strategy",): {
        "data.augment_data": True,
        "data.augmentation_strategy": "digits",
    },
    ("data.hard_negative_strategy",): {
        "data.create_hard_negatives": True,
        "data.hard_negative_strategy": "bm25",
    },
    ("data.validation_file",): {"data.validation_file": "v.jsonl"},
    ("data.dataset_name",): {},
    ("training.max_steps",): {"training.max_steps": 3},
    ("training.lr_scheduler_type",): {"training.lr_scheduler_type": "constant"},
    ("data.validation_file", "data.validation_split_percentage"): {
        "data.validation_file": None,
        "data.validation_split_percentage": 0.0,
    },
}
SPECIAL = {
    "cpo.temperature": {"cpo.loss_type": "ipo"},
    "data.train_file": {"data.dataset_name": "org/data"},
    "cpo.force_use_ref_model": {"cpo.reference_model_name": "org/ref"},
}


@pytest.mark.parametrize("number", range(len(INERT)))
def test_every_entry_of_the_table_holds_somewhere_and_not_everywhere(number: int) -> None:
    entry = INERT[number]
    own = SPECIAL.get(entry.fields[0]) if len(entry.fields) == 1 else None
    changes = own or HOLDS.get(entry.switches, {})
    config = CPOConfig().updated(changes)
    assert entry.holds(Settled(config)), entry
    reason = inert_reason(entry.fields[0], Settled(config))
    assert reason is not None and any(switch in reason.because for switch in entry.switches)
    proof = next(proof for proof in PROOFS if proof.path == entry.fields[0])
    live = CPOConfig().updated(proof.given)
    assert not entry.holds(Settled(live)), entry


def test_an_inert_field_changes_nothing_that_is_stated() -> None:
    """The declaration is checked from the other side: what is inert has no observable effect."""
    for proof in PROOFS:
        for changes in INERT_BY.values():
            config = CPOConfig().updated(changes)
            if proof.observe is not OBJECTIVE or inert_reason(proof.path, Settled(config)) is None:
                continue
            try:
                after = config.updated({proof.path: proof.value})
            except ConfigError:
                continue
            assert OBJECTIVE(config) == OBJECTIVE(after), proof.path


def test_the_table_names_real_fields() -> None:
    for entry in INERT:
        assert {*entry.fields, *entry.switches} <= set(all_fields())
        assert entry.when
