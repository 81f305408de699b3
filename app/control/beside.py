"""What answers beside the active version: the previous one on watch after a promotion, a trial that nobody holds any more, the ladder's rungs."""

from __future__ import annotations

import asyncio
from typing import Final

from app.catalog.model_config import ModelConfig
from app.control.bench import Bench
from app.control.commands import Commands
from app.control.patient import Patient, Watched
from app.control.rollout import compared
from app.control.rungs import cheaper_versions
from app.domain import JSON, Event, JobState, Mode, ModelState, ModelView, Split, State, Verdict
from app.store.base import Journal
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window
from optimizers.stats import least_samples

ORPHAN_S: Final = 60.0
"""A version on trial for whom no job is open loses its share after this long."""
SURE: Final = least_samples(0.99)
"""Answers held to golden's before a promoted version is confirmed: so many show 99 %."""


class Beside:
    """One per loop; it remembers what it saw in each model's Patient."""

    def __init__(self, window: Window, journal: Journal, commands: Commands, bench: Bench, metrics: Metrics, host_class: str) -> None:
        self._window, self._journal, self._commands, self._bench = window, journal, commands, bench
        self._metrics, self._host_class = metrics, host_class

    async def watch(
        self, view: ModelView, patient: Patient, want: ModelState, split: Split, config: ModelConfig, frozen: bool
    ) -> None:  # fmt: skip
        """The previous version still takes a share: both are compared, at the same time, until one thing is clear.

        Its time is what this process saw of it, by no clock that may jump, and stands still while a rung answers. While all change is frozen
        it only goes back: that costs nothing and a person who froze wants no harm; to confirm would end what is compared.
        """
        if view.active != want.desired:
            return
        watched, now = patient.watched, self._window.now()
        if watched.pair != (split.version, want.desired):
            watched = patient.watched = Watched((split.version, want.desired), self._window.cut(view.name), now)
        watched.seconds += 0.0 if view.rung else now - watched.looked_at
        watched.looked_at = now
        judgement = compared(self._window, view.name, split.version, view.active, (watched.since, watched.since), view, config, SURE)
        age = watched.seconds
        if judgement.verdict is Verdict.FAILED:
            self._metrics.count("hone_verdicts", "watch", "failed")
            self._metrics.count("hone_rollbacks", view.name, "watch")
            await asyncio.to_thread(self._commands.leave, view.name, "hone", f"watch: {judgement.text}", True)
        elif not frozen and (judgement.verdict is Verdict.PASSED or age > config.rollout.watch_s):
            passed = judgement.verdict is Verdict.PASSED
            self._metrics.count("hone_verdicts", "watch", "passed" if passed else "inconclusive")
            text = judgement.text if passed else f"nothing against it in {age:.0f} s ({judgement.text})"
            data: JSON = {"summary": f"beside {split.version}: {text}"}
            await asyncio.to_thread(self._journal.append, Event("version.confirmed", view.name, view.active, data=data))
            data = {"version": "", "share": 0.0, "stage": "watch", "summary": "the watch is over"}
            await asyncio.to_thread(self._journal.append, Event("traffic.split", view.name, "", data=data))

    async def ended_orphan(self, view: ModelView, patient: Patient, split: Split, state: State) -> bool:
        """A version on trial for whom no job is open any more (its holder died, or was refused at the last step) loses its share."""
        jobs = state.jobs.values()
        open_job = any(job.model == view.name and job.state is not JobState.FINISHED and split.version in job.candidates for job in jobs)
        now = self._window.now()
        if open_job or patient.orphan[0] != split.version:
            patient.orphan = ("", 0.0) if open_job else (split.version, now)
        if open_job or now - patient.orphan[1] < ORPHAN_S:
            return False
        patient.orphan = ("", 0.0)
        data = {"version": "", "share": 0.0, "stage": "canary", "summary": "the job whose candidate was on trial is over"}
        await asyncio.to_thread(self._journal.append, Event("traffic.split", view.name, "", data=data))
        return True

    async def set_ladder(self, view: ModelView, patient: Patient, want: ModelState, config: ModelConfig, state: State) -> None:
        """Which versions the data plane may step down to: proven here, clearly cheaper than the desired one, and free to serve alone."""
        by_person = (want.mode or config.mode) is not Mode.AUTO
        if state.frozen or not config.ladder or by_person or patient.ladder_for == (want.last_event, want.desired):
            return  # outside auto mode the envelope is a person's to set
        jobs = list(state.jobs.values())
        rungs = await asyncio.to_thread(cheaper_versions, self._bench.cards, want, config, self._host_class, jobs)
        patient.ladder_for = (want.last_event, want.desired)
        if rungs != want.rungs:
            data = {
                "rungs": list(rungs),
                "summary": f"under load, {' then '.join(rungs)} may answer" if rungs else "no version to step down to",
            }
            await asyncio.to_thread(self._journal.append, Event("ladder.set", view.name, view.active, data=data))
