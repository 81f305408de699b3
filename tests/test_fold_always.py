"""What must hold of a state after any story at all, and after a store lost its memory."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st

from app.domain import Event, Generation, JobState, ModelState, RuntimeSettings, State, Verdict
from app.store import merge
from app.store.codec import dumps, loads, state_from_json
from app.store.fold import fold, fold_all, generation_of
from tests.folded import FAST, SLOW, model_of
from tests.journal_story import OTHER_SHA, SHA, claimed, deployed, desired, job_event, published, requested, settings, told

# Loss and return


def test_a_journal_begun_anew_is_frozen_in_another_epoch() -> None:
    state = told(Event("journal.restarted", data={"reason": "damaged"}))
    assert (state.epoch, state.frozen) == (2, True)
    assert "damaged" in state.frozen_because


def test_what_was_lost_comes_back_in_a_new_epoch_and_frozen() -> None:
    known = told(deployed(), published("1.1"), desired("1.1"), requested("j1"), claimed("j1"))
    assert merge.behind(State(), known)
    after = merge.recovered(State(), known, "lost")
    assert (after.epoch, after.frozen) == (2, True)
    assert model_of(after) == replace(model_of(known), generation=Generation(2, 2))
    assert after.jobs == known.jobs
    assert not merge.behind(after, known)


def test_the_highest_known_state_wins_in_whatever_order_it_comes_back() -> None:
    early = told(deployed(), published("1.1"), deployed("other"))
    late = told(desired("1.1"), Event("model.removed", "other"), requested("j1"), state=early)
    for first, second in ((early, late), (late, early)):
        state = merge.recovered(State(), first, "lost")
        if merge.behind(state, second):
            state = merge.recovered(state, second, "lost")
        assert model_of(state).desired == "1.1"
        assert list(state.models) == ["m"]
        assert list(state.jobs) == ["j1"]


def test_what_was_decided_since_is_not_undone_by_a_memory() -> None:
    before = told(deployed(), published("1.1"), deployed("gone"))
    more = told(desired("1.1"), state=before)
    since = told(desired("1", settings=FAST), Event("model.removed", "gone"), state=replace(merge.recovered(State(), before, ""), seq=50))
    assert merge.behind(since, more), "the memory has an event that the recovery lacked"
    joined = merge.recovered(since, more, "")
    assert model_of(joined).settings_of("1") is not None
    assert "gone" not in joined.models


def test_an_old_memory_of_a_healthy_store_is_not_taken_for_a_loss() -> None:
    old = told(deployed(), requested("j1"))
    new = told(claimed("j1"), job_event("finished", "j1", outcome="kept"), published("1.1"), desired("1.1"), state=old)
    assert not merge.behind(new, old)
    assert merge.behind(old, new)


def test_a_fresh_store_that_overtook_the_memory_is_still_noticed() -> None:
    known = told(deployed(), published("1.1"), desired("1.1"))
    foreign = told(deployed(), *[Event("runner.died", "m")] * 10)
    assert foreign.seq > known.seq
    assert merge.behind(foreign, known)


def test_a_finished_job_stays_finished_and_one_of_another_golden_ends() -> None:
    running = told(deployed(), requested("j1"), claimed("j1"), requested("j2"))
    finished = told(job_event("finished", "j1", outcome="kept"), state=running)
    assert merge.recovered(running, finished, "").jobs["j1"].outcome == "kept"
    renewed = told(*[Event("x.y")] * 9, deployed("m", "2", OTHER_SHA))
    assert merge.recovered(renewed, running, "").jobs["j2"].outcome == "cancelled"


def test_a_restored_backup_is_not_outranked_by_memories() -> None:
    backup = told(deployed(), published("1.1"))
    now = told(desired("1.1"), deployed("new"), state=backup)
    after = replace(merge.restored(now, backup, 9, "restored"), seq=9)
    assert (after.epoch, after.frozen, model_of(after).desired) == (2, True, "1")
    assert not merge.behind(after, now)
    assert list(after.models) == ["m"]


# What holds after any story


CALMLY = how(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VERSIONS = st.sampled_from(["1", "2", "1.1", "1.2", "1.3"])
MODELS = st.sampled_from(["m", "n"])
SHAS = st.sampled_from([SHA, OTHER_SHA])
JOBS = st.sampled_from(["j1", "j2", "j3"])
SETTINGS = st.sampled_from([None, SLOW, FAST])
KINDS = st.sampled_from(["verifying", "cancel_asked"])
EVENTS = st.one_of(
    st.builds(deployed, MODELS, st.sampled_from(["1", "2"]), SHAS),
    st.builds(Event, st.sampled_from(["model.removed", "model.loaded", "model.unloaded", "loop.frozen", "loop.unfrozen", "x.y"]), MODELS),
    st.builds(published, VERSIONS, MODELS, SHAS, JOBS),
    st.builds(lambda version, model: Event("version.removed", model, version), VERSIONS, MODELS),
    st.builds(
        lambda version, model, verdict: Event("version.verified", model, version, data={"host_class": "h", "verdict": verdict}),
        VERSIONS,
        MODELS,
        st.sampled_from(list(Verdict)),
    ),
    st.builds(desired, VERSIONS, MODELS),
    st.builds(lambda version, model, value: desired(version, model, settings=value), VERSIONS, MODELS, SETTINGS),
    st.builds(settings, VERSIONS, SETTINGS, MODELS),
    st.builds(requested, JOBS, MODELS, SHAS),
    st.builds(claimed, JOBS, st.sampled_from(["w1", "w2"]), st.integers(1, 3)),
    st.builds(lambda job: job_event("built", job, candidates=["1.1"]), JOBS),
    st.builds(job_event, KINDS, JOBS),
    st.builds(lambda job: job_event("finished", job, outcome="kept", report={"a": 1}), JOBS),
    st.just(Event("journal.restarted", data={"reason": "test"})),
)
STORIES = st.lists(EVENTS, max_size=60).map(lambda events: [replace(event, seq=n, at=float(n)) for n, event in enumerate(events, 1)])


@CALMLY
@given(STORIES, st.integers(0, 60))
def test_folding_in_parts_is_folding_at_once(story: list[Event], cut: int) -> None:
    one_by_one = State()
    for event in story:
        one_by_one = fold(one_by_one, event)
    assert fold_all(fold_all(State(), story[:cut]), story[cut:]) == one_by_one


@CALMLY
@given(STORIES)
def test_what_always_holds(story: list[Event]) -> None:
    before = State()
    for event in story:
        after = fold(before, event)
        for name, model in after.models.items():
            assert model.previous != model.desired
            assert all(not built.removed for built in model.built if built.version == model.desired != model.golden)
            assert len({built.version for built in model.built}) == len(model.built)
            earlier = generation_of(before, name)
            assert (model.generation.epoch, model.generation.n) >= (earlier.epoch, earlier.n)
            served = (model.desired, model.settings_of(model.desired), model.golden_sha256)
            if name in before.models and served != _served(before.models[name]):
                assert model.generation.n == earlier.n + 1
        for identity, job in before.jobs.items():
            assert after.jobs[identity].attempt >= job.attempt
            if job.state is JobState.FINISHED:
                assert after.jobs[identity] == job
        for job in after.jobs.values():
            held = job.model in after.models and after.models[job.model].golden_sha256 == job.golden_sha256
            assert held or job.state is JobState.FINISHED
        before = after


def _served(model: ModelState) -> tuple[str, RuntimeSettings | None, str]:
    return model.desired, model.settings_of(model.desired), model.golden_sha256


@CALMLY
@given(STORIES)
def test_a_state_survives_being_written_down(story: list[Event]) -> None:
    state = fold_all(State(), story)
    assert state_from_json(loads(dumps(state))) == state


@CALMLY
@given(STORIES, st.integers(0, 60))
def test_a_memory_never_loses_to_a_store_that_lost_its_tail(story: list[Event], cut: int) -> None:
    known, cut_off = fold_all(State(), story), fold_all(State(), story[:cut])
    assert merge.behind(cut_off, known) == (cut < len(story))
    joined = merge.recovered(cut_off, known, "")
    assert {name: replace(model, generation=Generation(), last_event=0) for name, model in joined.models.items()} == {
        name: replace(model, generation=Generation(), last_event=0) for name, model in known.models.items()
    }
    assert joined.jobs == known.jobs
    assert not merge.behind(joined, known)
