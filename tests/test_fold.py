"""What the journal's events mean: every kind of a model, its versions, settings and traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.domain import Event, Generation, Mode, RuntimeSettings, State, Verdict
from app.errors import Conflict
from app.store.codec import dumps, loads, state_from_json
from app.store.fold import KEPT_REMOVED_MODELS, KEPT_REMOVED_VERSIONS, fold, generation_of, hold_to
from app.store.kinds import checked
from tests.folded import FAST, SLOW, model_of
from tests.journal_story import OTHER_SHA, SHA, deployed, desired, job_event, published, requested, settings, told

# Models


def test_a_first_deploy_desires_golden() -> None:
    model = model_of(told(deployed()))
    assert (model.golden, model.golden_sha256, model.desired, model.previous) == ("1", SHA, "1", "")
    assert model.generation == Generation(1, 1)


def test_deploying_the_same_golden_again_changes_nothing() -> None:
    once = told(deployed(), published("1.1"), desired("1.1"))
    again = told(deployed(), state=once)
    assert model_of(again) == replace(model_of(once), last_event=4)


def test_a_new_golden_is_desired_and_voids_what_was_built() -> None:
    state = told(deployed(), published("1.1"), desired("1.1"), settings("1.1", FAST), deployed("m", "2", OTHER_SHA))
    model = model_of(state)
    assert (model.golden, model.desired, model.generation.n) == ("2", "2", 4)
    assert model.previous == "1", "the built version is void, so the way back is the old golden"
    assert model.settings == ()
    assert model_of(told(desired("1.1"), state=state)).desired == "2"
    assert model_of(told(desired("1"), state=state)).desired == "1"


def test_a_new_golden_that_was_changed_in_place_leaves_no_way_back() -> None:
    model = model_of(told(deployed(), deployed("m", "1", OTHER_SHA)))
    assert (model.desired, model.previous, model.golden_sha256, model.generation.n) == ("1", "", OTHER_SHA, 2)


def test_an_old_golden_that_returns_makes_its_built_versions_valid_again() -> None:
    state = told(deployed(), published("1.1"), deployed("m", "2", OTHER_SHA), deployed("m", "1", SHA), desired("1.1"))
    assert model_of(state).desired == "1.1"


def test_a_name_that_returns_goes_on_counting() -> None:
    state = told(deployed(), published("1.1"), desired("1.1"), Event("model.removed", "m"))
    assert "m" not in state.models
    assert generation_of(state, "m") == Generation(1, 2)
    assert model_of(told(deployed(), state=state)).generation == Generation(1, 3)


def test_load_unload_and_mode() -> None:
    state = told(deployed(), Event("model.unloaded", "m"), Event("mode.changed", "m", data={"mode": "approve"}))
    assert model_of(state).unloaded
    assert model_of(state).mode is Mode.APPROVE
    state = told(Event("model.loaded", "m"), Event("mode.changed", "m", data={"mode": None}), state=state)
    assert not model_of(state).unloaded
    assert model_of(state).mode is None


def test_removed_models_are_remembered_up_to_a_bound() -> None:
    state = State()
    for number in range(KEPT_REMOVED_MODELS + 3):
        name = f"m{number}"
        state = told(deployed(name), requested(f"j{number}", name), Event("model.removed", name), state=state)
    assert len(state.removed) == KEPT_REMOVED_MODELS
    assert "m2" not in state.removed
    assert "j2" not in state.jobs


# Desired version


def test_promotion_and_rollback_are_the_same_path() -> None:
    state = told(deployed(), published("1.1"), desired("1.1"))
    assert (model_of(state).desired, model_of(state).previous, model_of(state).generation.n) == ("1.1", "1", 2)
    state = told(desired("1"), state=state)
    assert (model_of(state).desired, model_of(state).previous, model_of(state).generation.n) == ("1", "1.1", 3)


def test_desiring_what_is_desired_is_no_new_generation() -> None:
    assert model_of(told(deployed(), desired("1"))).generation.n == 1


def test_desired_with_settings_is_one_generation() -> None:
    model = model_of(told(deployed(), published("1.1"), desired("1.1", settings=FAST)))
    assert model.generation.n == 2
    assert model.settings_of("1.1") == RuntimeSettings(intra_op_threads=2, batch_limit=16, session_options=(("a", "1"),))


@pytest.mark.parametrize("late", [desired("1.1"), settings("1.1", FAST)])
def test_a_removed_version_cannot_be_desired_or_set(late: Event) -> None:
    state = told(deployed(), published("1.1"), Event("version.removed", "m", "1.1"), late)
    assert model_of(state).generation.n == 1


def test_a_change_is_held_to_its_generation() -> None:
    state = told(deployed(), published("1.1"), desired("1.1"))
    hold_to(Generation(1, 2), state, "m")
    with pytest.raises(Conflict, match=r"decided at generation 1\.1, it is at 1\.2 now"):
        hold_to(Generation(1, 1), state, "m")


# Settings


def test_settings_are_undone_like_a_swap() -> None:
    state = told(deployed(), settings("1", SLOW), settings("1", FAST))
    model = model_of(state)
    assert model.generation.n == 3
    assert dict(model.previous_settings)["1"] == RuntimeSettings(batch_limit=4)
    state = told(settings("1", SLOW), state=state)
    assert model_of(state).settings_of("1") == RuntimeSettings(batch_limit=4)
    assert dict(model_of(state).previous_settings)["1"].batch_limit == 16


def test_first_settings_remember_what_stood_where_the_event_says_it() -> None:
    model = model_of(told(deployed(), settings("1", FAST, stood=SLOW)))
    assert dict(model.previous_settings)["1"].batch_limit == 4


def test_settings_null_goes_back_to_the_proof() -> None:
    model = model_of(told(deployed(), settings("1", FAST), settings("1", None)))
    assert model.settings_of("1") is None
    assert model.generation.n == 3


def test_equal_settings_are_no_new_generation() -> None:
    assert model_of(told(deployed(), settings("1", FAST), settings("1", FAST))).generation.n == 2


# Built versions


def test_a_published_version_gets_verdicts_per_host_class() -> None:
    verify = {"version": "1.1", "host_class": "vnni", "verdict": "passed", "summary": ""}
    state = told(deployed(), published("1.1", job="j1"), Event("version.verified", "m", "1.1", data=verify))
    state = told(Event("version.verified", "m", "1.1", data={**verify, "host_class": "avx2", "verdict": "failed"}), state=state)
    state = told(Event("version.verified", "m", "1.1", data={**verify, "verdict": "inconclusive"}), state=state)
    (built,) = model_of(state).built
    assert dict(built.verdicts) == {"avx2": Verdict.FAILED, "vnni": Verdict.INCONCLUSIVE}
    assert (built.parent, built.job, built.size_bytes) == ("1", "j1", 7)


def test_a_version_is_published_once() -> None:
    first = told(deployed(), published("1.1", job="j1"))
    assert model_of(told(published("1.1", job="j2"), state=first)).built == model_of(first).built


@pytest.mark.parametrize(
    "story",
    [
        [published("1.1")],
        [deployed("m", "2", OTHER_SHA), published("1.1")],
        [deployed(), requested("j1"), job_event("cancel_asked", "j1"), published("1.1", job="j1")],
        [deployed(), requested("j1"), deployed("m", "1", OTHER_SHA), deployed(), published("1.1", job="j1")],
        [deployed(), published("1")],
    ],
    ids=["no model", "another golden", "cancelled job", "golden changed and back", "named as golden"],
)
def test_nothing_is_published_late(story: list[Event]) -> None:
    state = told(*story)
    assert all(not model.built for model in state.models.values())


def test_removing_a_version_takes_its_settings_and_the_way_back() -> None:
    state = told(deployed(), published("1.1"), desired("1.1"), settings("1.1", FAST), desired("1"), Event("version.removed", "m", "1.1"))
    model = model_of(state)
    assert (model.previous, model.settings, model.built[0].removed) == ("", (), True)


def test_the_desired_version_is_not_removed() -> None:
    state = told(deployed(), published("1.1"), desired("1.1"), Event("version.removed", "m", "1.1"))
    assert not model_of(state).built[0].removed


def test_names_of_removed_versions_stay_known_up_to_a_bound() -> None:
    state = told(deployed())
    for number in range(KEPT_REMOVED_VERSIONS + 5):
        state = told(published(f"1.{number}"), Event("version.removed", "m", f"1.{number}"), state=state)
    kept = [built.version for built in model_of(state).built]
    assert len(kept) == KEPT_REMOVED_VERSIONS
    assert kept[-1] == f"1.{KEPT_REMOVED_VERSIONS + 4}"


# The loop, the journal itself, and what is not understood


def test_freeze_and_its_reason() -> None:
    state = told(Event("loop.frozen", actor="ann"))
    assert (state.frozen, state.frozen_because) == (True, "frozen by ann")
    state = told(Event("loop.unfrozen"), state=state)
    assert (state.frozen, state.frozen_because) == (False, "")


def test_unknown_kinds_later_schemas_and_milestones_only_move_on() -> None:
    state = told(deployed())
    for event in (
        Event("moon.landed", "m"),
        replace(desired("9"), schema=99),
        Event("runner.died", "m", data={"reason": "oom"}),
        Event("version.activated", "m", "1"),
        Event("server.started", data={"host_class": "x", "cores": 2}),
    ):
        after = told(event, state=state)
        assert (after.seq, after.jobs) == (state.seq + 1, state.jobs)
        assert replace(model_of(after), last_event=0) == replace(model_of(state), last_event=0)


@pytest.mark.parametrize(
    "event",
    [
        Event("model.deployed", "m", data={"golden": 1, "sha256": SHA}),
        Event("model.deployed", data={"golden": "1", "sha256": SHA}),
        Event("desired.changed", "m"),
        Event("desired.changed", "m", "1", data={"settings": {"instances": "two"}}),
        Event("settings.changed", "m", "1"),
        Event("settings.changed", "m", "1", data={"settings": {"session_options": 5}}),
        Event("version.published", "m", "1.1", data={"parent": "1", "golden_sha256": SHA, "sha256": SHA, "recipe": "graph"}),
        Event("version.verified", "m", "1.1", data={"host_class": "x", "verdict": "splendid"}),
        Event("mode.changed", "m", data={"mode": "wild"}),
        Event("job.requested", "m", "", "j", data={"golden": "1", "golden_sha256": SHA, "tries": [{"method": "x"}]}),
        Event("job.claimed", "m", "", "j", data={"worker": "w", "attempt": 0}),
        Event("job.claimed", "m", "", "", data={"worker": "w", "attempt": 1}),
        Event("job.built", "m", "", "j", data={"candidates": [1]}),
        Event("job.verifying", "m", "", "j", data={"judging": 0}),
        Event("job.finished", "m", "", "j", data={"outcome": "kept", "report": []}),
        Event("journal.recovered", data={"state": {"seq": "x"}}),
        Event("", "m"),
    ],
    ids=lambda event: event.kind,
)
def test_a_malformed_event_is_refused_when_written_and_harmless_when_read(event: Event) -> None:
    with pytest.raises(ValueError, match=r"need|must|data\.state"):
        checked(event)
    state = told(deployed(), published("1.1"), requested("j"))
    after = told(event, state=state)
    assert replace(model_of(after), last_event=0) == replace(model_of(state), last_event=0)
    assert after.jobs == state.jobs


def test_an_event_that_was_folded_is_not_folded_twice() -> None:
    state = told(deployed(), published("1.1"), desired("1.1"))
    assert fold(state, replace(desired("1"), seq=3)) is state


# Traffic, ladder and what was left


def split(version: str, share: float, stage: str = "canary", **data: object) -> Event:
    return Event("traffic.split", "m", version, data={"version": version, "share": share, "stage": stage, **data}, at=5.0)


def test_a_candidate_on_trial_gets_its_share_and_loses_it_with_any_change_of_the_desired_version() -> None:
    story = [deployed(), published("1.1")]
    on_trial = model_of(told(*story, split("1.1", 0.05)))
    assert on_trial.split is not None and (on_trial.split.version, on_trial.split.share, on_trial.split.stage) == ("1.1", 0.05, "canary")
    assert model_of(told(*story, split("1.1", 0.0, "shadow"))).split is not None
    for end in (split("", 0.0), desired("1.1"), Event("version.removed", "m", "1.1", data={"version": "1.1"})):
        assert model_of(told(*story, split("1.1", 0.05), end)).split is None, end.kind
    assert model_of(told(*story, split("1", 0.05))).split is None, "the desired version needs no share"
    assert model_of(told(*story, split("1.1", 0.05), deployed("m", "2", OTHER_SHA))).split is None


def test_after_a_promotion_that_is_watched_the_previous_version_keeps_its_share() -> None:
    watched = desired("1.1", watch_share=0.05)
    model = model_of(told(deployed(), published("1.1"), watched))
    assert model.split is not None and (model.split.version, model.split.share, model.split.stage) == ("1", 0.05, "watch")


def test_rungs_are_other_versions_that_may_serve_and_go_with_them() -> None:
    ladder = Event("ladder.set", "m", data={"rungs": ["1", "1.1", "1.2"]})
    story = [deployed(), published("1.1"), published("1.2"), ladder]
    assert model_of(told(*story)).rungs == ("1.1", "1.2")
    assert model_of(told(*story, Event("version.removed", "m", "1.1", data={"version": "1.1"}))).rungs == ("1.2",)
    assert model_of(told(*story, deployed("m", "2", OTHER_SHA))).rungs == ()


def test_what_was_left_for_faults_is_remembered_until_somebody_wants_it_again() -> None:
    back = desired("1", fault=True)
    left = model_of(told(deployed(), published("1.1"), desired("1.1"), back))
    assert (left.desired, left.previous, left.left) == ("1", "1.1", ("1.1",))
    assert model_of(told(deployed(), published("1.1"), desired("1.1"), back, desired("1.1"))).left == ()


@pytest.mark.parametrize(
    ("meanwhile", "late"),
    [
        ([deployed("m", "2", OTHER_SHA)], {"from": "1.1"}),
        ([published("1.2"), desired("1.2")], {"from": "1.1"}),
        ([deployed("m", "2", OTHER_SHA), deployed("m", "2", "d" * 64)], {"from": "2", "golden_sha256": OTHER_SHA}),
    ],
    ids=["a new golden", "a promotion", "a golden changed in place"],
)
def test_a_rollback_for_faults_that_comes_late_leaves_only_what_it_was_meant_for(meanwhile: list[Event], late: dict[str, str]) -> None:
    """The store was away, and somebody else changed the model before what waited was written."""
    before = told(deployed(), published("1.1"), desired("1.1"), *meanwhile)
    after = told(desired("1", fault=True, **late), state=before)
    assert model_of(after) == replace(model_of(before), last_event=after.seq)


def test_the_new_parts_of_a_state_survive_being_written_down() -> None:
    ladder = Event("ladder.set", "m", data={"rungs": ["1.1"]})
    state = told(deployed(), published("1.1"), split("1.1", 0.25), ladder)
    assert state_from_json(loads(dumps(state))) == state
