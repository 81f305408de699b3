"""State is a fold over the journal: `fold(state, event) -> state`, pure, for every kind of event there is.

It knows nothing of files or Redis. It never raises: unknown kinds and events that no longer apply (a promotion of a version
whose golden was replaced, the second claim of one attempt) change nothing but `seq`, so that log order settles every race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from app.domain import BuiltVersion, Event, Generation, Mode, ModelState, RemovedModel, RuntimeSettings, Split, State, Verdict
from app.errors import Conflict
from app.store import fold_jobs, merge
from app.store.codec import enum_or_none, settings_from_json, state_from_json
from app.store.kinds import SCHEMA, problem, version_of
from app.store.transient import closed, drop, opened, put, with_model

FOLD_VERSION: Final = 5
"""Changes whenever the same events fold to another state: snapshots of another version are not used."""
KEPT_REMOVED_MODELS: Final = 1000
KEPT_REMOVED_VERSIONS: Final = 200

SettingsByVersion = tuple[tuple[str, RuntimeSettings], ...]


def fold(state: State, event: Event) -> State:
    """The state after `event`. Events that were folded already change nothing."""
    if 0 < event.seq <= state.seq:
        return state
    after = _apply(state, event)
    model = after.models.get(event.model)
    if model is not None and model.last_event != event.seq:
        after = with_model(after, replace(model, last_event=event.seq))
    return replace(after, seq=event.seq, last="")


def fold_all(state: State, events: Iterable[Event]) -> State:
    """The same as folding one after the other, without a copy of every map for every event."""
    state = opened(state)
    for event in events:
        state = fold(state, event)
    return closed(state)


def generation_of(state: State, model: str) -> Generation:
    """The generation that the next change of `model` is held to; a model that is not there has one as well."""
    if model in state.models:
        return state.models[model].generation
    return Generation(state.epoch, state.removed[model].n if model in state.removed else 0)


def hold_to(expect: Generation | None, state: State, model: str) -> None:
    """Raise Conflict unless the model's generation is still the expected one."""
    found = generation_of(state, model)
    if expect is not None and found != expect:
        raise Conflict(
            f"model {model!r} has moved on: the change was decided at generation {expect.epoch}.{expect.n}, it is at "
            f"{found.epoch}.{found.n} now; look at it again and decide anew"
        )


def _apply(state: State, event: Event) -> State:
    handler = _HANDLERS.get(event.kind)
    if handler is None or event.schema > SCHEMA or problem(event):
        return state
    return handler(state, event)


def _changed(state: State, event: Event, model: ModelState) -> State:
    return with_model(state, replace(model, stamp=(state.epoch, event.seq), last_event=event.seq))


def _next(model: ModelState, state: State) -> Generation:
    return Generation(state.epoch, model.generation.n + 1)


# Models


def _model_deployed(state: State, event: Event) -> State:
    golden, sha256 = event.data["golden"], event.data["sha256"]
    model = state.models.get(event.model)
    if model is None:
        return _first_deployed(state, event, golden, sha256)
    if (model.golden, model.golden_sha256) == (golden, sha256):
        return state
    previous = _way_back(model, golden, sha256)
    renewed = replace(
        model,
        golden=golden,
        golden_sha256=sha256,
        desired=golden,
        previous=previous,
        generation=_next(model, state),
        settings=tuple(entry for entry in model.settings if entry[0] == previous),
        previous_settings=(),
        unloaded=False,
        split=None,
        rungs=(),
        left=(),
        changed="version",
    )
    why = f"golden changed from {model.golden} ({model.golden_sha256[:12]}) to {golden} ({sha256[:12]})"
    return fold_jobs.cancel_of_model(_changed(state, event, renewed), event, sha256, why)


def _first_deployed(state: State, event: Event, golden: str, sha256: str) -> State:
    generation = Generation(state.epoch, generation_of(state, event.model).n + 1)
    fresh = ModelState(event.model, golden, sha256, desired=golden, previous="", generation=generation)
    return _changed(replace(state, removed=drop(state.removed, event.model)), event, fresh)


def _way_back(model: ModelState, golden: str, sha256: str) -> str:
    """What was served before a new golden came: a built version of the old one is void, so then the old golden itself."""
    built = _find(model, model.desired)
    before = model.golden if built is not None and built.golden_sha256 != sha256 else model.desired
    return before if before != golden else ""


def _model_removed(state: State, event: Event) -> State:
    model = state.models.get(event.model)
    if model is None:
        return state
    removed = put(state.removed, event.model, RemovedModel(model.generation.n, (state.epoch, event.seq)))
    left = replace(state, models=drop(state.models, event.model), removed=removed)
    after = fold_jobs.cancel_of_model(left, event, None, "the model was removed")
    return _forget_oldest_removed(after)


def _forget_oldest_removed(state: State) -> State:
    if len(state.removed) <= KEPT_REMOVED_MODELS:
        return state
    oldest = next(iter(state.removed))
    jobs = type(state.jobs)({identity: job for identity, job in state.jobs.items() if job.model != oldest})
    return replace(state, removed=drop(state.removed, oldest), jobs=jobs)


def _model_loaded(state: State, event: Event) -> State:
    return _set_unloaded(state, event, False)


def _model_unloaded(state: State, event: Event) -> State:
    return _set_unloaded(state, event, True)


def _set_unloaded(state: State, event: Event, unloaded: bool) -> State:
    model = state.models.get(event.model)
    if model is None or model.unloaded is unloaded:
        return state
    return _changed(state, event, replace(model, unloaded=unloaded))


def _mode_changed(state: State, event: Event) -> State:
    model, mode = state.models.get(event.model), enum_or_none(Mode, event.data.get("mode"))
    if model is None or model.mode is mode:
        return state
    return _changed(state, event, replace(model, mode=mode))


# Desired version and settings


def _desired_changed(state: State, event: Event) -> State:
    model, version = state.models.get(event.model), version_of(event)
    if model is None or not _may_serve(model, version) or _overtaken(model, event):
        return state
    given = event.data.get("settings")
    settings = settings_from_json(given) if given is not None else model.settings_of(version)
    before = model
    if settings != model.settings_of(version):
        model = replace(_with_settings(model, version, settings, None), changed="settings")
    if version != model.desired:
        left = _left(model, event)
        rungs = tuple(rung for rung in model.rungs if rung not in left)
        split = _watched(model, event)
        model = replace(model, desired=version, previous=model.desired, split=split, left=left, rungs=rungs, changed="version")
        built = _find(model, version)
        model = model if built is None else _with_built(model, replace(built, served=True))
    return state if model is before else _changed(state, event, replace(model, generation=_next(model, state)))


def _overtaken(model: ModelState, event: Event) -> bool:
    """True of a rollback for faults that waited while the store was away, and leaves what is not desired any more."""
    data = event.data
    if not data.get("fault"):
        return False
    left, golden_sha256 = data.get("from") or model.desired, data.get("golden_sha256", model.golden_sha256)
    return (left, golden_sha256) != (model.desired, model.golden_sha256)


def _left(model: ModelState, event: Event) -> tuple[str, ...]:
    """A version that was left for faults is remembered; one that somebody desires again is forgiven."""
    left = tuple(version for version in model.left if version != version_of(event))
    return (*left, model.desired) if event.data.get("fault") else left


def _canary_ended(state: State, event: Event) -> State:
    """One that failed is neither stepped down to nor switched to, until somebody desires it."""
    model, version = state.models.get(event.model), version_of(event)
    if model is None or event.data.get("verdict") != Verdict.FAILED.value or version in (model.desired, model.golden, *model.left):
        return state
    if _find(model, version) is None or not _may_serve(model, version):
        return state
    rungs = tuple(rung for rung in model.rungs if rung != version)
    return _changed(state, event, replace(model, left=(*model.left, version), rungs=rungs))


def _watched(model: ModelState, event: Event) -> Split | None:
    """The previous version keeps a share of the traffic where whoever promoted wants the two compared."""
    share = event.data.get("watch_share")
    if isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share < 1:
        return Split(model.desired, float(share), "watch", event.at)
    return None


def _traffic_split(state: State, event: Event) -> State:
    model, version, share = state.models.get(event.model), event.data["version"], event.data["share"]
    if model is None:
        return state
    split = None
    if version and (share or event.data["stage"] == "shadow"):
        if version == model.desired or not _may_serve(model, version):
            return state
        same = model.split is not None and (model.split.version, model.split.stage) == (version, event.data["stage"])
        since = model.split.since if same and model.split is not None and event.data.get("keep_since") else event.at
        split = Split(version, float(share), event.data["stage"], since)
    return state if split == model.split else _changed(state, event, replace(model, split=split))


def _ladder_set(state: State, event: Event) -> State:
    model = state.models.get(event.model)
    if model is None:
        return state
    barred = (model.desired, *model.left)
    rungs = tuple(version for version in event.data["rungs"] if version not in barred and _may_serve(model, version))
    return state if rungs == model.rungs else _changed(state, event, replace(model, rungs=rungs))


def _settings_changed(state: State, event: Event) -> State:
    model, version = state.models.get(event.model), version_of(event)
    if model is None or not _may_serve(model, version):
        return state
    given, stood = event.data["settings"], event.data.get("from")
    settings = settings_from_json(given) if given is not None else None
    if settings == model.settings_of(version):
        return state
    renewed = _with_settings(model, version, settings, settings_from_json(stood) if stood is not None else None)
    return _changed(state, event, replace(renewed, generation=_next(model, state), changed="settings"))


def _with_settings(model: ModelState, version: str, settings: RuntimeSettings | None, stood: RuntimeSettings | None) -> ModelState:
    former = model.settings_of(version) or stood
    kept, kept_previous = _without(model.settings, version), _without(model.previous_settings, version)
    return replace(
        model,
        settings=(*kept, (version, settings)) if settings is not None else kept,
        previous_settings=(*kept_previous, (version, former)) if former is not None else kept_previous,
    )


def _may_serve(model: ModelState, version: str) -> bool:
    """False for a version that is known to be gone or void; one that the journal never saw may be another golden."""
    built = _find(model, version) if version != model.golden else None
    return built is None or (not built.removed and built.golden_sha256 == model.golden_sha256)


def _without(settings: SettingsByVersion, version: str) -> SettingsByVersion:
    return tuple(entry for entry in settings if entry[0] != version)


# Built versions


def _version_published(state: State, event: Event) -> State:
    model, version, data = state.models.get(event.model), version_of(event), event.data
    if model is None or data["golden_sha256"] != model.golden_sha256 or version == model.golden or _find(model, version) is not None:
        return state
    if fold_jobs.is_finished(state, event.job):
        return state
    recipe = tuple(dict(step) for step in data["recipe"])
    size = int(data.get("bytes") or 0)
    built = BuiltVersion(version, data["parent"], data["golden_sha256"], event.job, recipe, data["sha256"], size_bytes=size)
    return _changed(state, event, replace(model, built=(*model.built, built)))


def _version_removed(state: State, event: Event) -> State:
    """A built one, or one that the user deployed and whose folder went: of those only the way back is known here."""
    model, version = state.models.get(event.model), version_of(event)
    if model is None or version in (model.desired, model.golden):
        return state
    built = _find(model, version)
    if version != model.previous if built is None else built.removed:
        return state
    gone = replace(
        _with_built(model, replace(built, removed=True)) if built is not None else model,
        previous="" if model.previous == version else model.previous,
        split=None if model.split is not None and model.split.version == version else model.split,
        rungs=tuple(rung for rung in model.rungs if rung != version),
        left=tuple(one for one in model.left if one != version),
        settings=_without(model.settings, version),
        previous_settings=_without(model.previous_settings, version),
    )
    return _changed(state, event, replace(gone, built=_bounded(gone.built)))


def _version_verified(state: State, event: Event) -> State:
    model, version = state.models.get(event.model), version_of(event)
    built = _find(model, version) if model is not None else None
    if model is None or built is None:
        return state
    host_class, verdict = event.data["host_class"], Verdict(event.data["verdict"])
    others = tuple(entry for entry in built.verdicts if entry[0] != host_class)
    return _changed(state, event, _with_built(model, replace(built, verdicts=(*others, (host_class, verdict)))))


def _find(model: ModelState, version: str) -> BuiltVersion | None:
    for built in reversed(model.built):  # events speak of the latest
        if built.version == version:
            return built
    return None


def _with_built(model: ModelState, renewed: BuiltVersion) -> ModelState:
    return replace(model, built=tuple(renewed if built.version == renewed.version else built for built in model.built))


def _bounded(built: tuple[BuiltVersion, ...]) -> tuple[BuiltVersion, ...]:
    """The oldest removed ones are forgotten, the newest stay: their names must not be given again."""
    removed = [version.version for version in built if version.removed]
    forgotten = set(removed[: max(0, len(removed) - KEPT_REMOVED_VERSIONS)])
    return tuple(version for version in built if version.version not in forgotten)


# The loop and the journal itself


def _loop_frozen(state: State, event: Event) -> State:
    return replace(state, frozen=True, frozen_because=str(event.data.get("reason") or f"frozen by {event.actor}"))


def _loop_unfrozen(state: State, event: Event) -> State:
    return replace(state, frozen=False, frozen_because="")


def _journal_restarted(state: State, event: Event) -> State:
    why = f"the journal was begun anew: {event.data.get('reason') or 'no reason given'}"
    return merge.in_epoch(replace(state, frozen=True, frozen_because=why), state.epoch + 1)


def _journal_recovered(state: State, event: Event) -> State:
    return merge.recovered(state, state_from_json(event.data["state"]), "the journal had lost events; the last known state was put back")


def _journal_restored(state: State, event: Event) -> State:
    return merge.restored(state, state_from_json(event.data["state"]), event.seq, "the journal was restored from a backup")


_HANDLERS: Final[dict[str, Callable[[State, Event], State]]] = {
    "model.deployed": _model_deployed,
    "model.removed": _model_removed,
    "model.loaded": _model_loaded,
    "model.unloaded": _model_unloaded,
    "mode.changed": _mode_changed,
    "desired.changed": _desired_changed,
    "settings.changed": _settings_changed,
    "traffic.split": _traffic_split,
    "canary.ended": _canary_ended,
    "ladder.set": _ladder_set,
    "version.published": _version_published,
    "version.removed": _version_removed,
    "version.verified": _version_verified,
    "job.requested": fold_jobs.requested,
    "job.claimed": fold_jobs.claimed,
    "job.built": fold_jobs.built,
    "job.verifying": fold_jobs.verifying,
    "job.cancel_asked": fold_jobs.cancel_asked,
    "job.finished": fold_jobs.finished,
    "loop.frozen": _loop_frozen,
    "loop.unfrozen": _loop_unfrozen,
    "journal.restarted": _journal_restarted,
    "journal.recovered": _journal_recovered,
    "journal.restored": _journal_restored,
}
