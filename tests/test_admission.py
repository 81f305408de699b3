"""What is known of a version before it is loaded: the owner's word about rows holds for what was built from golden, too, where it forbids."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest

from app.catalog.cards import Cards
from app.catalog.model_config import Batching, ModelConfig
from app.catalog.repository import FoundModel, Repository
from app.catalog.state_folder import StateFolder
from app.domain import Generation, ModelState
from app.serving.admission import Admission
from tests.test_cards import GOLDEN, build, draft


@pytest.mark.parametrize(("word", "batched"), [("auto", True), ("independent", True), ("dependent", False)])
def test_a_built_version_is_served_row_by_row_where_the_owner_says_so(
    tmp_path: Path, word: Literal["auto", "independent", "dependent"], batched: bool
) -> None:
    state = StateFolder(tmp_path / "state").prepare()
    cards = Cards(state)
    cards.write_golden(GOLDEN)
    built = cards.publish("m", build(cards, "a"), draft("j1"))
    nobody: Any = None
    admission = Admission(Repository(tmp_path / "models"), state, cards, "here", 2, nobody)
    found = FoundModel("m", tmp_path / "models" / "m", config=ModelConfig(batching=Batching(rows=word)))
    want = ModelState("m", "1", "aa", "1", "", Generation(1, 1))
    admitted = asyncio.run(admission.admit(found, want, built.version))
    assert admitted.signature.batchable is batched and (admitted.settings.batch_limit > 1) is batched
    assert batched or "stated by the owner" in admitted.signature.rows_reason
