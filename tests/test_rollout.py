"""Shadow, canary and their ends: what the journal is told, and that no candidate gets more than the share at which it was found out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.catalog.model_config import ModelConfig
from app.control import rollout
from app.control.rollout import End, Rollout
from app.domain import Event, ModelView, Observation, RuntimeSettings, Verdict
from app.store.base import Journal
from app.store.open import open_journal
from app.telemetry.window import Window

CONFIG = ModelConfig.model_validate({
    "task": "classification", "rollout": {"canary": [0.05, 0.25], "min_samples": 20, "max_age_s": 120.0},
})  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = open_journal(str(tmp_path / "journal.db"))
    found.append(Event("model.deployed", "m", "1", data={"golden": "1", "sha256": "a" * 64}))
    recipe = {"version": "1.1", "parent": "1", "golden_sha256": "a" * 64, "recipe": [], "sha256": "b" * 64}
    found.append(Event("version.published", "m", "1.1", data=recipe))
    yield found
    found.close()


@dataclass
class Serving:
    """The data plane as the rollout sees it: it feeds the sensor with what two versions do, as their shares are."""

    journal: Journal
    window: Window = field(default_factory=lambda: Window(block_s=1.0))
    failing: bool = False
    agrees: bool = True
    candidate_cpu_s: float = 0.0005
    active: str = "1"
    loads: bool = True
    quiet: bool = False
    largest_share: float = 0.0

    def model(self, name: str) -> ModelView | None:
        split = self.journal.state().models["m"].split
        loaded = ("1", "1.1") if split is not None and self.loads else ("1",)
        failed = () if self.loads else (("1.1", "its file is corrupt"),)
        return ModelView("m", self.active, 1, RuntimeSettings(), True, 0, 0, loaded, 0.0, failed=failed)

    async def serve(self) -> None:
        turn = 0
        while True:
            split = self.journal.state().models["m"].split
            share = split.share if split is not None else 0.0
            self.largest_share = max(self.largest_share, share)
            for _ in range(0 if self.quiet else 60):
                turn += 1
                version = "1.1" if share and turn % round(1 / share) == 0 else "1"
                self._one(version, turn)
            if split is not None and self.loads:
                for _ in range(5):
                    self.window.compared("m", "1.1", self.agrees)
            await asyncio.sleep(0.02)

    def _one(self, version: str, turn: int) -> None:
        if version == "1.1" and self.failing:
            self.window.failed("m", version)
            return
        cpu_s = (self.candidate_cpu_s if version == "1.1" else 0.001) * (1 + 0.05 * (turn % 5))
        self.window.called("m", version, 1, 4096, cpu_s, cpu_s, 0.0)
        self.window.observe(Observation("m", version, 200, 2 * cpu_s, 0.0, 0.0, cpu_s, 0.0, 1, 1, cpu_s, 0.0))


def run(serving: Serving, monkeypatch: pytest.MonkeyPatch, config: ModelConfig = CONFIG, stop: Callable[[], bool] = lambda: False) -> End:
    monkeypatch.setattr(rollout, "LOOK_S", 0.02)
    monkeypatch.setattr(rollout, "SHADOW_S", 2.0)

    async def both() -> End:
        traffic = asyncio.create_task(serving.serve())
        try:
            await asyncio.sleep(0.3)
            return await Rollout(serving.journal, serving.window, serving).run("m", "1.1", config, "j", stop)
        finally:
            traffic.cancel()

    return asyncio.run(both())


def stages(journal: Journal) -> list[tuple[str, float]]:
    return [(event.data["stage"], event.data["share"]) for event in journal.read(0, 100, "m") if event.kind == "traffic.split"]


def test_a_good_candidate_goes_through_shadow_and_all_shares(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    end = run(Serving(journal), monkeypatch)
    assert end.verdict is Verdict.PASSED and "CPU time per row -5" in end.text.replace("−", "-")
    assert stages(journal) == [("shadow", 0.0), ("canary", 0.05), ("canary", 0.25)]
    assert journal.state().models["m"].split is not None, "the promotion that follows ends it"


def test_one_that_fails_requests_ends_at_its_first_share(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(journal, failing=True)
    end = run(serving, monkeypatch)
    assert end.verdict is Verdict.FAILED and "fails" in end.text
    assert serving.largest_share == 0.05 and journal.state().models["m"].split is None


def test_one_that_disagrees_with_golden_never_leaves_the_shadow(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(journal, agrees=False)
    end = run(serving, monkeypatch)
    assert end.verdict is Verdict.FAILED and "agrees with golden" in end.text
    assert serving.largest_share == 0.0 and stages(journal)[-1] == ("canary", 0.0)


def test_one_that_costs_more_is_not_promoted(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    end = run(Serving(journal, candidate_cpu_s=0.0016), monkeypatch)
    assert end.verdict is Verdict.FAILED and "slower" in end.text


def test_one_that_does_not_load_never_sees_a_request(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(journal, loads=False)
    end = run(serving, monkeypatch)
    assert (end.verdict, end.text) == (Verdict.FAILED, "its file is corrupt") and serving.largest_share == 0.0


def test_what_stays_undecided_ends_on_the_incumbent_and_too_little_traffic_needs_no_canary(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"min_samples": 20_000, "max_age_s": 1_000_000.0})})
    asked = iter([False] * 60 + [True] * 1000)
    end = run(Serving(journal), monkeypatch, many, lambda: next(asked))
    assert end.verdict is Verdict.ERROR and journal.state().models["m"].split is None
    rare = run(Serving(journal, quiet=True), monkeypatch)
    assert rare.verdict is Verdict.PASSED and rare.skipped and "too little traffic" in rare.text
