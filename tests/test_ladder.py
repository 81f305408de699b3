"""The ladder by a clock of its own: when it steps down, when up again, and that it never gets stuck. Engines are stand-ins with a queue."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from app.catalog.model_config import ModelConfig
from app.domain import Event, Generation, Mode, ModelState, Observation, RuntimeSettings
from app.serving.ladder import HOLD_S, SETTLED_S, Footing, Ladder
from app.serving.service import InferenceService
from app.serving.slot import Neighbours, Slot
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window

BUSY_S = 0.015
"""What waits takes so long that the version above has no room, and is not too much."""
ADMITTED = SimpleNamespace(model="m", signature=SimpleNamespace(inputs=("x",), outputs=("y",)))


@dataclass
class Stand:
    """One model with golden 1 and the rungs 1.1 and 1.2, and a clock that is moved by hand."""

    now: float = 1000.0
    events: list[Event] = field(default_factory=list)
    objective: dict[str, float] = field(default_factory=lambda: {"p95_ms": 50.0})

    def __post_init__(self) -> None:
        self.window = Window(clock=lambda: self.now)
        self.service = InferenceService(0.0, Metrics(), self.window)
        config = ModelConfig.model_validate({"objective": self.objective})
        self.slot = Slot("m", config, None)  # type: ignore[arg-type]
        for version in ("1", "1.1", "1.2"):
            engine = SimpleNamespace(
                alive=True, backlog_s=BUSY_S, queued=0, promise=lambda *promised: None, settings=RuntimeSettings(instances=1)
            )
            self.slot.versions[version] = SimpleNamespace(version=version, engine=engine, admitted=ADMITTED)  # type: ignore[assignment]
        self.slot.active = self.slot.versions["1"]
        self.service.slots["m"] = self.slot
        self.window.objective("m", 0.05)
        self.want = ModelState("m", "1", "sha", "1", "", Generation(1, 1), rungs=("1.1", "1.2"))
        self.ladder = Ladder(self.service, self.window, Metrics(), lambda _: self.want, self.events.append, lambda: self.now)
        self.metrics: Metrics = self.ladder._metrics

    @property
    def answers(self) -> str:
        """Who stands for the model; the one above it has no room here."""
        return self.slot.lease(None).version

    def second(self, offered: int, can: dict[str, int], lost: int = 429) -> None:
        """`offered` requests come; whoever answers refuses (or lets expire) what it cannot do."""
        most = can[self.answers]
        late = offered > most
        for number in range(offered):
            code = 200 if number < most else lost
            total_s = 0.2 if late else 0.01
            self.window.observe(
                Observation("m", self.answers, code, total_s, 0.0, 0.9 * total_s if late else 0.0, 0.001, 0.0, 1, 1, 0.001, 0.0)
            )
        for _ in range(4):
            self.now += 0.25
            self.ladder.glance(self.slot)
        self.ladder.look(self.slot)

    def beside(self, version: str, count: int, call_s: float) -> None:
        """So many requests of this second are answered by `version`, which does not stand for the model, in a call each."""
        for _ in range(count):
            self.window.observe(Observation("m", version, 200, 0.01, 0.0, 0.0, call_s, 0.0, 1, 1, call_s, 0.0))
            self.window.called("m", version, 1, 1, call_s, call_s, 0.0)

    def steps(self) -> list[tuple[str, str]]:
        return [(event.data["from"], event.data["version"]) for event in self.events]


CAN = {"1": 100, "1.1": 200, "1.2": 1000}


def test_what_steps_down_for_load_is_back_when_the_load_is_gone_and_says_up() -> None:
    stand = Stand()
    for _ in range(20):
        stand.second(300, CAN)
    assert stand.steps() == [("1", "1.1"), ("1.1", "1.2")]
    for _ in range(round(HOLD_S) + 8):
        stand.second(130, CAN)
    assert stand.steps()[2:] == [("1.2", "1.1")] and stand.events[-1].data["summary"].startswith("back to 1.1")
    counted = stand.metrics.counters["hone_ladder_steps"]
    assert (counted["m", "down"], counted["m", "up"]) == (2.0, 1.0)
    for _ in range(round(2 * HOLD_S) + 8):
        stand.second(60, CAN)
    assert stand.answers == "1" and stand.slot.rung is None


def test_a_rung_above_that_does_not_load_keeps_nobody_down() -> None:
    """The way up asked for the rung just above alone: without it the model stayed on the lowest for good."""
    stand = Stand()
    del stand.slot.versions["1.1"]
    for _ in range(4):
        stand.second(300, CAN)
    assert stand.steps() == [("1", "1.2")]
    for _ in range(round(2 * HOLD_S) + 8):
        stand.second(10, CAN)
    assert stand.steps()[1:] == [("1.2", "1")] and stand.slot.rung is None


def test_a_promotion_that_does_not_load_keeps_nobody_down() -> None:
    stand = Stand()
    for _ in range(4):
        stand.second(150, CAN)
    stand.want = replace(stand.want, desired="2")
    for _ in range(round(2 * HOLD_S) + 8):
        stand.second(10, CAN)
    assert stand.slot.rung is None and stand.answers == "1"


def test_in_observe_mode_nobody_steps_down() -> None:
    stand = Stand()
    stand.want = replace(stand.want, mode=Mode.OBSERVE)
    for _ in range(20):
        stand.second(300, CAN)
    assert stand.steps() == [] and stand.slot.rung is None


def test_a_rung_that_is_promoted_is_no_rung_any_more() -> None:
    stand = Stand()
    for _ in range(4):
        stand.second(150, CAN)
    assert stand.answers == "1.1"
    stand.want, stand.slot.active = replace(stand.want, desired="1.1", rungs=("1.2",)), stand.slot.versions["1.1"]
    stand.second(150, CAN)
    assert stand.slot.rung is None and len(stand.events) == 1


def test_a_rung_that_is_stopped_is_told_as_a_step_back() -> None:
    """A new golden, or a removal, stops it: the gauge stayed at 1, and the timeline had no way back."""
    stand = Stand()
    shown = stand.metrics.gauges["hone_ladder_rung"]
    for _ in range(4):
        stand.second(150, CAN)
    assert stand.steps() == [("1", "1.1")] and shown["m",] == 1.0
    stand.slot.let_go(stand.slot.versions["1.1"])
    stand.second(20, CAN)
    stand.second(20, CAN)
    assert stand.steps() == [("1", "1.1"), ("1.1", "1")] and shown["m",] == 0.0
    assert stand.events[-1].data["summary"] == "back to 1: 1.1 is no longer loaded"
    assert stand.metrics.counters["hone_ladder_steps"]["m", "up"] == 1.0
    stand.slot.active = None
    stand.ladder.look(stand.slot)
    assert ("m",) not in shown


def test_an_upper_version_that_was_never_full_is_tried_after_the_hold_off() -> None:
    stand = Stand()
    for _ in range(4):
        stand.second(150, CAN)
    stand.want, stand.slot.active = replace(stand.want, desired="2", golden="2", rungs=("1.1",)), stand.slot.versions["1"]
    stand.slot.versions["2"] = stand.slot.active = SimpleNamespace(  # type: ignore[assignment]
        version="2",
        engine=SimpleNamespace(
            alive=True, backlog_s=BUSY_S, queued=0, promise=lambda *promised: None, settings=RuntimeSettings(instances=1)
        ),
        admitted=ADMITTED,
    )
    for _ in range(round(HOLD_S) + 2):
        stand.second(150, {**CAN, "2": 300})
    assert stand.answers == "2" and "is not known" in stand.events[-1].data["summary"]


@pytest.mark.parametrize("lost", [429, 504])
def test_steady_load_that_golden_cannot_carry_is_at_most_four_steps_an_hour(lost: int) -> None:
    stand = Stand()
    golden: Any = stand.slot.versions["1"].engine
    golden.backlog_s, golden.queued = 0.1, 3  # by what calls took lately it can do 30 requests a second; in truth it does 10
    for _ in range(3600):
        stand.second(19, {"1": 10, "1.1": 20}, lost)
    assert stand.answers == "1.1" and len(stand.events) <= 4, stand.steps()


def test_the_hold_off_is_short_again_only_after_a_long_time_on_the_desired_version() -> None:
    stand = Stand()
    for _ in range(4):
        stand.second(150, CAN)
    footing = stand.ladder._footings["m"]
    footing.hold_s = 900.0
    for _ in range(round(SETTLED_S) + 10):
        stand.second(60, CAN)
    assert stand.answers == "1.1" and footing.hold_s == 900.0
    for _ in range(300 + round(SETTLED_S)):
        stand.second(60, CAN)
    assert stand.answers == "1" and footing.hold_s == HOLD_S


def test_deadlines_that_no_version_can_meet_are_no_load() -> None:
    stand = Stand()
    for _ in range(10):
        for number in range(100):
            code = 504 if number < 10 else 200
            stand.window.observe(Observation("m", "1", code, 0.01, 0.0, 0.001, 0.005, 0.0, 1, 1, 0.001, 0.0))
        stand.now += 1.0
        stand.ladder.look(stand.slot)
    assert not stand.events


def test_a_median_that_is_promised_can_be_missed() -> None:
    stand = Stand(objective={"p50_ms": 50.0})
    for _ in range(4):
        for _ in range(100):
            stand.window.observe(Observation("m", "1", 200, 0.2, 0.0, 0.18, 0.005, 0.0, 1, 1, 0.001, 0.0))
        stand.now += 1.0
        stand.ladder.look(stand.slot)
    assert stand.steps() == [("1", "1.1")]


def test_what_is_refused_while_stepped_down_counts_for_the_version_that_answers() -> None:
    stand = Stand()
    assert stand.service.label("m", None) == ("m", "1")
    stand.slot.rung = stand.slot.versions["1.1"]
    assert stand.service.label("m", None) == ("m", "1.1")


def test_what_one_callers_flood_is_refused_is_no_overload() -> None:
    stand = Stand()
    for _ in range(6):
        for _ in range(100):
            stand.window.observe(Observation("m", "1", 429, 0.001, 0.0, 0.0, 0.0, 0.0, 0, 1, 0.0, 0.0, limited=True))
        stand.second(50, {"1": 100})
    assert stand.answers == "1" and not stand.events


def test_the_version_above_answers_what_it_has_room_for() -> None:
    stand = Stand()
    for _ in range(20):
        stand.second(300, CAN)
    above, rung = stand.slot.versions["1.1"], stand.slot.versions["1.2"]
    assert stand.slot.rung is rung and stand.slot.neighbours == Neighbours(rung, above, None)
    waiting: Any = {version: loaded.engine for version, loaded in stand.slot.versions.items()}
    for on_above, on_rung, answers in (
        (0.0, 0.0, "1.1"),
        (0.004, 0.0, "1.1"),
        (0.004, 0.002, "1.2"),
        (0.0, 0.006, "1.2"),
        (0.02, 0.0, "1.2"),
    ):
        waiting["1.1"].backlog_s, waiting["1.2"].backlog_s = on_above, on_rung
        assert stand.slot.lease(None).version == answers, (on_above, on_rung)
    waiting["1.1"].backlog_s, waiting["1.2"].backlog_s = 0.002, 0.03
    stand.ladder.glance(stand.slot)
    waiting["1.2"].backlog_s = 0.0
    assert stand.slot.lease(None).version == "1.2", "a full server has nothing to spare"
    stand.now += 1.1
    stand.ladder.glance(stand.slot)
    assert stand.slot.lease(None).version == "1.1"
    waiting["1.1"].backlog_s, waiting["1.1"].alive = 0.0, False
    assert stand.slot.lease(None).version == "1.2"
    stand.ladder.look(stand.slot)
    assert stand.slot.neighbours == Neighbours(rung, stand.slot.versions["1"], None), "the next one up that lives"


def test_what_the_version_above_answers_counts_as_load_before_a_step_up() -> None:
    stand = Stand()
    for _ in range(4):
        stand.second(150, CAN)
    assert stand.answers == "1.1"
    for _ in range(round(HOLD_S) + 4):
        for _ in range(65):
            stand.window.observe(Observation("m", "1", 200, 0.01, 0.0, 0.0, 0.001, 0.0, 1, 1, 0.001, 0.0))
        stand.second(25, CAN)
    assert stand.answers == "1.1", "90 a second are more than 0.7 of the hundred that golden can do"


def test_what_was_full_while_others_had_the_cores_is_not_kept_down_by_that() -> None:
    """What it answers beside tells what it can do by now, though what comes is more than it did when it was full."""
    stand = Stand()
    for _ in range(4):
        stand.second(100, CAN | {"1": 30})
    assert stand.answers == "1.1" and stand.ladder._footings["m"].capacities["1"] < 50
    for _ in range(round(HOLD_S) + 4):
        stand.beside("1", 95, 0.002)
        stand.second(5, CAN)
    assert stand.answers == "1" and "below 70% of the" in stand.events[-1].data["summary"]


def test_what_answers_nearly_all_beside_may_stand_again_though_a_step_up_failed() -> None:
    """The host was busy when it was tried. What it answers beside, with next to nothing waiting, is what comes."""
    stand = Stand()
    for _ in range(4):
        stand.second(100, CAN | {"1": 30})
    for _ in range(round(HOLD_S) + 10):
        stand.beside("1", 45, 0.002)
        stand.second(15, CAN | {"1": 30})
        if stand.answers == "1":
            break
    for _ in range(5):
        stand.second(60, CAN | {"1": 30})
    assert stand.answers == "1.1" and stand.ladder._footings["m"].refuted
    for _ in range(round(2 * HOLD_S) + 40):
        stand.beside("1", 50, 0.002)
        stand.second(10, CAN)
    assert stand.answers == "1" and stand.events[-1].data["summary"].endswith("% of them")


def test_a_step_up_that_was_taken_back_knows_better_than_what_calls_take() -> None:
    """Each call is quick while the other version has most of them; all of them are too much for golden."""
    stand = Stand()
    for _ in range(3600):
        if stand.answers == "1":
            stand.second(60, CAN | {"1": 30})
        else:
            stand.beside("1", 25, 0.002)
            stand.second(35, CAN)
    assert stand.answers == "1.1" and len(stand.events) == 3, stand.steps()


def test_what_would_wait_too_long_is_answered_below_until_the_step() -> None:
    stand = Stand()
    stand.ladder.glance(stand.slot)
    stand.ladder.look(stand.slot)
    engine: Any = stand.slot.versions["1"].engine
    for backlog_s, answers in ((0.0, "1"), (0.024, "1"), (0.026, "1.1"), (0.01, "1")):
        engine.backlog_s = backlog_s
        assert stand.slot.lease(None).version == answers, backlog_s
    assert stand.slot.rung is None and not stand.events
    engine.backlog_s = 1.0
    other: Any = SimpleNamespace(version="1", engine=engine, admitted=ADMITTED)
    stand.slot.active, before = other, stand.slot.active
    assert stand.slot.lease(None) is other, "who has just come to stand has no neighbours until the next look"
    stand.slot.active = before
    stand.slot.let_go(stand.slot.versions["1.1"])
    assert stand.slot.neighbours is None and stand.slot.lease(None).version == "1"
    stand.want = replace(stand.want, rungs=())
    stand.ladder.look(stand.slot)
    assert stand.slot.lease(None).version == "1", "nobody may answer in its place"


def test_a_rung_that_is_known_to_be_too_small_for_what_comes_is_passed_over() -> None:
    stand = Stand()
    stand.ladder._footings.setdefault("m", Footing()).capacities["1.1"] = 200.0
    for _ in range(3):
        stand.second(300, CAN)
    assert stand.steps() == [("1", "1.2")]
