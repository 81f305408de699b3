"""Counts jobs as they end, each once and by the recipe that came out of it, in the one server that holds the control lease."""

from __future__ import annotations

from typing import Final

from app.domain import Job, JobState, State
from app.telemetry.metrics import Metrics

OUTCOMES: Final = (
    "promoted", "kept", "refused", "nothing_changed", "not_applicable", "failed", "cancelled", "inconclusive", "proven",
)  # fmt: skip


class JobTally:
    """Jobs that ended before this server held the lease, or while another did, are not its to count."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counted: set[str] | None = None
        self._own: set[str] = set()

    def ended(self, identity: str) -> None:
        """This server wrote the end of a job, so it counts it whatever became of the lease."""
        self._own.add(identity)

    def lapsed(self) -> None:
        """The lease was not held for a while: what ended meanwhile was counted elsewhere."""
        self._counted = None

    def count(self, state: State) -> None:
        finished = {job.id: job for job in state.jobs.values() if job.state is JobState.FINISHED}
        if self._counted is None:
            self._counted = set(finished) - self._own
        for job in state.jobs.values():
            if job.state is not JobState.FINISHED:
                self._begin_at_zero(job)
        for identity in finished.keys() - self._counted:
            job = finished[identity]
            label = label_of(job, state)
            self._metrics.count("hone_jobs", label, job.outcome)
            self._metrics.time("hone_job_duration_seconds", label, seconds=max(0.0, job.finished_at - job.requested_at))
        self._counted = set(finished)
        self._own.clear()

    def _begin_at_zero(self, job: Job) -> None:
        """A counter that is born at 1 hides its first job from Prometheus's increase()."""
        labels = _labels(job)
        for label in {*labels, " | ".join(labels)}:
            for outcome in OUTCOMES:
                self._metrics.count("hone_jobs", label, outcome, by=0.0)


def label_of(job: Job, state: State) -> str:
    """Methods of the recipe that the job's candidate was built by; all alternatives where none came out."""
    labels = _labels(job)
    model = state.models.get(job.model)
    for built in model.built if model is not None else ():
        if job.candidate and built.version == job.candidate and built.job == job.id:
            own = "+".join(str(step["method"]) for step in built.recipe)
            return next((label for label in labels if label == own or label.startswith(f"{own}+")), own)  # tune is no step of a version
    return " | ".join(labels)


def _labels(job: Job) -> list[str]:
    return list(dict.fromkeys("+".join(str(step["method"]) for step in recipe) for recipe in job.tries))
