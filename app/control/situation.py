"""What the planner must know of a model beside the diagnosis, gathered from the journal's state and model.yaml. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from time import time
from typing import Final

from app.catalog.model_config import ModelConfig
from app.control.builders import under_way
from app.control.diagnosis import Cause
from app.control.planner import Action, Remedy, Situation
from app.control.verification import SERVER_SIDE
from app.domain import Job, JobState, ModelState, ModelView, State, Verdict

DAY_S: Final = 86_400.0
VAIN: Final = frozenset({"refused", "nothing_changed", "not_applicable", "promoted"})
"""Outcomes after which the same recipe on the same golden brings nothing new."""


def situation_of(
    state: State, want: ModelState, view: ModelView, config: ModelConfig, cause: Cause, host_class: str, tried: Collection[Remedy], wait_s: float,
    switched: int = 0, workers: Collection[str] = (),
) -> Situation:  # fmt: skip
    """`tried` are this incident's remedies so far, `switched` how often the loop itself took another version within a day; `workers` are alive."""
    jobs = [job for job in state.jobs.values() if job.model == view.name]
    own = [job for job in jobs if job.actor == "hone" and job.requested_at > time() - DAY_S]
    latest = max(own, key=lambda job: job.requested_at, default=None)
    loud = latest is not None and latest.outcome == "inconclusive"  # the host was too busy to tell: it may be tried again
    spent = sum(float(job.report.get("cpu_s") or 0.0) for job in own)
    budget, golden_left = config.budget, want.golden in want.left
    working = under_way(state, view.name, workers)
    return Situation(
        active=view.active,
        golden=want.golden,
        previous=want.previous if want.previous not in want.left else "",
        proven=_proven(want, view.active, host_class, jobs),
        settings_before=view.active in dict(want.previous_settings),
        rungs=want.rungs if config.ladder else (),
        tried=frozenset() if cause is Cause.INPUT else _recipes_in_vain(jobs, want.golden_sha256),
        tried_actions=frozenset(remedy for remedy in tried if not (loud and remedy[0] in (Action.OPTIMIZE, Action.TUNE))),
        mode=want.mode or config.mode,
        frozen=state.frozen,
        jobs_open=len(working),
        jobs_waiting=sum(job.state is not JobState.FINISHED for job in jobs) - len(working),
        builds_left=0 if golden_left else budget.builds - sum(len(job.candidates) for job in own),
        swaps_left=budget.swaps - switched - sum(job.outcome == "promoted" and not _of_settings(job) for job in own),
        cpu_s_left=budget.job_cpu_s - spent,
        trainable=config.source is not None and config.samples.train is not None,
        wait_s=wait_s,
        mends=any(
            job.candidate == view.active
            and job.actor == "hone"
            and job.outcome == "promoted"
            and job.reason.startswith(f"{Cause.VERSION.value}:")
            for job in jobs
        ),
        onnx=view.kind == "onnx",
        torch=view.golden_kind == "torch",
    )


def _of_settings(job: Job) -> bool:
    """Whether it changes settings alone."""
    return all(step["method"] in SERVER_SIDE for recipe in job.tries for step in recipe)


def _proven(want: ModelState, active: str, host_class: str, jobs: Collection[Job]) -> list[str]:
    """Versions that passed on this class of host and may serve, the newest first; not those that were kept for a person to decide, who has not."""
    kept = {job.candidate for job in jobs if job.state is JobState.FINISHED and job.outcome in ("kept", "inconclusive")}
    return [
        built.version
        for built in reversed(want.built)
        if not built.removed
        and built.golden_sha256 == want.golden_sha256
        and built.version not in (active, *want.left)
        and built.parent not in want.left
        and (built.served or built.version not in kept)
        and dict(built.verdicts).get(host_class) is Verdict.PASSED
    ]


def _recipes_in_vain(jobs: Collection[Job], golden_sha256: str) -> frozenset[tuple[str, ...]]:
    ended = [job for job in jobs if job.golden_sha256 == golden_sha256 and job.state is JobState.FINISHED]
    vain = {tuple(str(step["method"]) for step in recipe) for job in ended if job.outcome in VAIN for recipe in job.tries}
    return frozenset(vain | {recipe for job in ended if job.outcome == "inconclusive" for recipe in _settled(job, time())})


def _settled(job: Job, now: float) -> Iterator[tuple[str, ...]]:
    """Of a job that ended undecided what was decided all the same: what was refused, and for a day what had too few samples, however quiet the host."""
    recipes = {one.get("version"): tuple(one.get("try") or ()) for one in job.report.get("built") or ()}
    for verdict in job.report.get("verdicts") or ():
        vain = verdict.get("verdict") == Verdict.FAILED.value or (verdict.get("too_few") and job.finished_at > now - DAY_S)
        if vain and verdict.get("version") in recipes:
            yield recipes[verdict["version"]]
