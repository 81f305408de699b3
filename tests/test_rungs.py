"""Which versions may answer under load in place of the desired one: read from real cards and proofs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.catalog.cards import BuiltCard, CardFile, Cards, Draft, GoldenCard, Proof, RowsProof
from app.catalog.model_config import ModelConfig
from app.catalog.state_folder import StateFolder
from app.control.rungs import cheaper_versions
from app.domain import BuiltVersion, Generation, Job, JobState, ModelState, Signature, Split, TensorSpec, Verdict

HERE = "x86_64-test"
CONFIG = ModelConfig.model_validate({"task": "classification", "samples": {"reference": "samples/reference.npz"}})
SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 2)),), True)
GOLDEN = GoldenCard("m", "1", "aa", (CardFile("model.onnx", 3, "bb"),), SIGNATURE, RowsProof(True, "rows alone = rows together"))


@pytest.fixture
def cards(tmp_path: Path) -> Cards:
    cards = Cards(StateFolder(tmp_path / "state").prepare())
    cards.write_golden(GOLDEN)
    for number, cost in ((1, 0.5), (2, 0.25)):
        folder = cards.state.scratch / str(number)
        folder.mkdir()
        (folder / "model.onnx").write_bytes(bytes(number))
        card: BuiltCard = cards.publish("m", folder, Draft(f"j{number}", 0, "1", "aa", "1", (), SIGNATURE, RowsProof(True, ""), "t"))
        batches = [{"batch": 1, "candidate": {"cpu_s": cost}, "incumbent": {"cpu_s": 1.0}}]
        cards.write_proof(card, Proof(HERE, card.sha256, "aa", Verdict.PASSED, latency={"latency": {"batches": batches}}))
    return cards


def want(**changes: Any) -> ModelState:
    built = tuple(BuiltVersion(f"1.{n}", "1", "aa", f"j{n}", (), "s", ((HERE, Verdict.PASSED),)) for n in (1, 2))
    return replace(ModelState("m", "1", "aa", "1", "", Generation(1, 1), built=built), **changes)


def test_each_rung_is_clearly_cheaper_than_the_one_before(cards: Cards) -> None:
    assert cheaper_versions(cards, want(), CONFIG, HERE) == ("1.1", "1.2")


def test_what_is_on_trial_or_was_left_gets_no_requests_by_the_ladder(cards: Cards) -> None:
    job = Job("j2", "m", "1", "aa", (), "", "auto", "hone", JobState.VERIFYING, 0.0, candidates=("1.2",))
    assert cheaper_versions(cards, want(), CONFIG, HERE, [job]) == ("1.1",)
    assert cheaper_versions(cards, want(), CONFIG, HERE, [replace(job, state=JobState.FINISHED)]) == ("1.1", "1.2")
    assert cheaper_versions(cards, want(split=Split("1.2", 0.05, "canary")), CONFIG, HERE) == ("1.1",)
    assert cheaper_versions(cards, want(left=("1.1",)), CONFIG, HERE) == ("1.2",)
