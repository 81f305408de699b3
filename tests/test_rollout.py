"""Shadow, canary and their ends: what the journal is told, and that no candidate gets more than the share at which it was found out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

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
    fails_at: float = 0.0
    no_room_until: float = 0.0
    quiet: bool = False
    largest_share: float = 0.0
    memory: tuple[tuple[str, int], ...] = ()
    rung: bool = False
    """A cheaper version answers, or beside it the incumbent, at `beside_cpu_s` a call; those on trial answer nothing."""
    beside_cpu_s: float = 0.0

    def model(self, name: str) -> ModelView | None:
        split = self.journal.state().models["m"].split
        no_room = ("1.1",) if monotonic() < self.no_room_until else ()
        loaded = ("1", "1.1") if split is not None and self.loads and not no_room else ("1",)
        why = "no memory" if no_room else "" if self.loads or monotonic() < self.fails_at else "its file is corrupt"
        failed = (("1.1", why),) if why else ()
        return ModelView(
            "m", self.active, 1, RuntimeSettings(), True, 0, 0, loaded, 0.0,
            rung="1.9" if self.rung else "", failed=failed, memory=self.memory, no_room=no_room,
        )  # fmt: skip

    async def serve(self) -> None:
        turn = 0
        while True:
            split = self.journal.state().models["m"].split
            share = split.share if split is not None else 0.0
            self.largest_share = max(self.largest_share, share)
            for _ in range(0 if self.quiet else 60):
                turn += 1
                version = "1.1" if share and turn % round(1 / share) == 0 else "1"
                if self.rung:
                    version = "1" if self.beside_cpu_s else "1.9"
                self._one(version, turn)
            if split is not None and self.loads and not self.rung:
                for _ in range(5):
                    self.window.compared("m", "1.1", self.agrees)
            await asyncio.sleep(0.02)

    def _one(self, version: str, turn: int) -> None:
        if version == "1.1" and self.failing:
            self.window.failed("m", version)
            return
        usual = (self.beside_cpu_s if self.rung else 0.0) or 0.001
        cpu_s = (self.candidate_cpu_s if version == "1.1" else usual) * (1 + 0.05 * (turn % 5))
        self.window.called("m", version, 1, 4096, cpu_s, cpu_s, 0.0)
        self.window.observe(Observation("m", version, 200, 2 * cpu_s, 0.0, 0.0, cpu_s, 0.0, 1, 1, cpu_s, 0.0))


def run(serving: Serving, monkeypatch: pytest.MonkeyPatch, config: ModelConfig = CONFIG, stop: Callable[[], str] = lambda: "") -> End:
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


@pytest.mark.parametrize(("incumbent_mib", "verdict"), [(100, Verdict.FAILED), (200, Verdict.PASSED)])
def test_one_that_takes_more_memory_than_is_promised_and_than_the_incumbent_is_not_promoted(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, incumbent_mib: int, verdict: Verdict
) -> None:
    config = CONFIG.model_copy(update={"objective": CONFIG.objective.model_copy(update={"memory_mb": 128})})
    end = run(Serving(journal, memory=(("1", incumbent_mib << 20), ("1.1", 150 << 20))), monkeypatch, config)
    assert end.verdict is verdict and ("takes 150 MiB of memory" in end.text) == (verdict is Verdict.FAILED)


def test_one_that_does_not_load_never_sees_a_request(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(journal, loads=False)
    end = run(serving, monkeypatch)
    assert (end.verdict, end.text) == (Verdict.FAILED, "its file is corrupt") and serving.largest_share == 0.0


def test_one_that_takes_all_its_time_to_load_and_then_fails_is_refused(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data plane says so a moment after the timeout; whoever gave up before would leave the version for a person to promote."""
    config = CONFIG.model_copy(update={"limits": CONFIG.limits.model_copy(update={"load_timeout_s": 0.2})})
    end = run(Serving(journal, loads=False, fails_at=monotonic() + 0.5), monkeypatch, config)
    assert end == End(Verdict.FAILED, "its file is corrupt")


@pytest.mark.parametrize(("comes_after", "verdict"), [(0.2, Verdict.PASSED), (60.0, Verdict.INCONCLUSIVE)])
def test_want_of_room_is_waited_for_and_is_no_fault_of_the_candidate(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, comes_after: float, verdict: Verdict
) -> None:
    monkeypatch.setattr(rollout, "LOAD_SLACK_S", 0.5)
    config = CONFIG.model_copy(update={"limits": CONFIG.limits.model_copy(update={"load_timeout_s": 0.5})})
    end = run(Serving(journal, no_room_until=monotonic() + 0.3 + comes_after), monkeypatch, config)
    assert end.verdict is verdict and (end.text == "no memory") == (verdict is Verdict.INCONCLUSIVE)
    assert journal.state().models["m"].left == ()


def test_what_stays_undecided_ends_on_the_incumbent_and_too_little_traffic_needs_no_canary(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"min_samples": 20_000, "max_age_s": 1_000_000.0})})
    asked = iter([""] * 60 + ["all change is frozen"] * 1000)
    end = run(Serving(journal), monkeypatch, many, lambda: next(asked))
    assert end.verdict is Verdict.INCONCLUSIVE and "frozen" in end.text and journal.state().models["m"].split is None
    rare = run(Serving(journal, quiet=True), monkeypatch)
    assert rare.verdict is Verdict.PASSED and rare.skipped and "too little traffic" in rare.text


def test_a_trial_waits_until_the_watch_over_the_version_before_is_over(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append(Event("traffic.split", "m", "1.1", data={"version": "1.1", "share": 0.05, "stage": "watch"}))
    asked = 0

    def stop() -> str:
        nonlocal asked
        asked += 1
        if asked == 5:
            assert stages(journal) == [("watch", 0.05)]
            journal.append(Event("traffic.split", "m", "", data={"version": "", "share": 0.0, "stage": "watch"}))
        return ""

    assert run(Serving(journal), monkeypatch, stop=stop).verdict is Verdict.PASSED
    assert stages(journal)[:3] == [("watch", 0.05), ("watch", 0.0), ("shadow", 0.0)]


@dataclass
class Load:
    """A rung answers until it was looked so many `times`; meanwhile the clock goes on by `jump` seconds each time."""

    serving: Serving
    monkeypatch: pytest.MonkeyPatch
    times: int = 10
    jump: float = 200.0
    looked: int = 0
    ahead: float = 0.0

    def __post_init__(self) -> None:
        self.monkeypatch.setattr(rollout, "monotonic", lambda: monotonic() + self.ahead)

    def looks(self) -> None:
        self.looked += 1
        self.serving.rung = self.looked < self.times
        self.ahead += self.jump if self.serving.rung and self.looked > 1 else 0.0


@pytest.mark.parametrize("watched", [False, True])
def test_while_a_rung_answers_no_trial_begins(journal: Journal, monkeypatch: pytest.MonkeyPatch, watched: bool) -> None:
    """Else it went in without one, since the version that a rung stands for answers next to nothing; nor is the watch before it over by then."""
    if watched:
        journal.append(Event("traffic.split", "m", "1.1", data={"version": "1.1", "share": 0.05, "stage": "watch"}))
    load = Load(Serving(journal, rung=True), monkeypatch)

    def stop() -> str:
        load.looks()
        if load.serving.rung:
            assert stages(journal) == [("watch", 0.05)] * watched
        elif watched and load.looked == 10:
            journal.append(Event("traffic.split", "m", "", data={"version": "", "share": 0.0, "stage": "watch"}))
        return ""

    end = run(load.serving, monkeypatch, stop=stop)
    assert end.verdict is Verdict.PASSED and not end.skipped
    assert stages(journal)[-3:] == [("shadow", 0.0), ("canary", 0.05), ("canary", 0.25)]


@pytest.mark.parametrize("stage", ["shadow", "canary"])
def test_the_time_on_a_rung_is_none_of_the_trials(journal: Journal, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    load = Load(Serving(journal), monkeypatch)

    def stop() -> str:
        split = journal.state().models["m"].split
        if load.looked or (split is not None and split.stage == stage):
            load.looks()
        return ""

    assert run(load.serving, monkeypatch, stop=stop).verdict is Verdict.PASSED
    assert load.looked > 10 and load.ahead > CONFIG.rollout.max_age_s


def test_what_the_incumbent_answered_beside_a_rung_is_not_held_against_the_candidate(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On cores that are full each of its calls costs more: the candidate, which was asked nothing then, would look cheap beside them."""
    load = Load(Serving(journal, candidate_cpu_s=0.0016, beside_cpu_s=0.01), monkeypatch, times=100)

    def stop() -> str:
        split = journal.state().models["m"].split
        if load.looked or (split is not None and split.stage == "canary"):
            load.looks()
        return ""

    end = run(load.serving, monkeypatch, stop=stop)
    assert end.verdict is Verdict.FAILED and end.text.startswith("at 5%: it is slower") and load.looked > 100


def test_what_must_not_go_on_never_begins_and_ends_in_the_shadow(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(Serving(journal), monkeypatch, stop=lambda: "frozen") == End(Verdict.INCONCLUSIVE, "frozen", True) and stages(journal) == []
    asked = iter([""] * 4)
    end = run(Serving(journal), monkeypatch, stop=lambda: next(asked, "frozen"))
    assert end == End(Verdict.INCONCLUSIVE, "frozen") and max(share for _, share in stages(journal)) == 0.0


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, Verdict.PASSED), (1.4, Verdict.FAILED)])
def test_costs_are_compared_between_calls_that_rested_alike(journal: Journal, factor: float, verdict: Verdict) -> None:
    """The incumbent's calls follow each other, most of the candidate's come after a rest: by all calls alike it would cost half as much again."""
    now = [1000.0]
    window = Window(clock=lambda: now[0])
    costs = ((0.001, 0.001), (0.1, 0.0016))
    for version, counts, times in (("1", (300, 30), 1.0), ("1.1", (50, 70), factor)):
        for count, (rested_s, cpu_s) in zip(counts, costs, strict=True):
            for turn in range(count):
                takes_s = cpu_s * times * (1 + 0.02 * (turn % 5))
                now[0] += rested_s + takes_s
                window.called("m", version, 1, 4096, takes_s, takes_s, 0.0)
                window.observe(Observation("m", version, 200, 2 * takes_s, 0.0, 0.0, takes_s, 0.0, 1, 1, takes_s, 0.0))
    view = Serving(journal).model("m")
    assert view is not None
    found = rollout.compared(window, "m", "1", "1.1", (0.0, 0.0), view, CONFIG, 0)
    assert found.verdict is verdict, found.text
    assert abs(found.numbers["cpu_ratio"]["estimate"] - factor) < 0.03
