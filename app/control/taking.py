"""How a version that passed takes over: its canary, the promotion, and the way back where it does not come to serve; or why it waits for a person.

It judges nothing; each step is an event, so that whoever holds the lease next goes on after a crash.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final

from app.catalog.cards import BuiltCard, Cards
from app.control.bench import Workpiece
from app.control.commands import Commands
from app.control.rollout import Rollout
from app.control.steps import target_of
from app.control.verification import Judged, held_back, may_promote_alone
from app.domain import JSON, Job, JobState, ModelState, RuntimeSettings, State, Verdict
from app.errors import Conflict, NotAllowed
from app.store.base import Journal
from app.telemetry.metrics import Metrics
from optimizers.host import parse_target
from optimizers.task import Failure, TaskFailed

ACTIVATION_S: Final = 180.0


class Taking:
    """One per server; of jobs whose golden is still the model's: all else raises Conflict."""

    def __init__(
        self, journal: Journal, commands: Commands, cards: Cards, host_class: str, rollout: Rollout, metrics: Metrics, replica: str
    ) -> None:  # fmt: skip
        self._journal, self._commands, self._cards = journal, commands, cards
        self._host_class, self._rollout, self._metrics, self._replica = host_class, rollout, metrics, replica
        self.seen = State()
        """The newest state that anybody read here: a canary asks often whether something hinders it."""

    async def want(self, job: Job) -> ModelState:
        state = (await asyncio.to_thread(self._journal.state)).models.get(job.model)
        if state is None or state.golden_sha256 != job.golden_sha256:
            raise Conflict(f"golden of {job.model!r} changed or the model is gone while job {job.id} ran; nothing is published")
        return state

    async def take(
        self, job: Job, piece: Workpiece, winner: Judged, settings: RuntimeSettings | None, report: JSON, stop: asyncio.Event
    ) -> tuple[str, str, JSON]:
        """Promote the winner, or leave it for a person to."""
        await self.want(job)
        waits = may_promote_alone(winner) if job.promote == "auto" else "promotion was asked to be manual"
        waits = waits or await self._made_for_others(job, winner.version)
        waits = waits or await self.held_back(job, piece)
        if waits:
            return "kept", winner.version, report | {"waits": waits}

        def hindered() -> str:
            if not stop.is_set():
                return held_back(self.seen, job.model, piece.config)
            now = self.seen.jobs.get(job.id)  # ended with its golden or its model, which is told there
            return str((now.report if now is not None and now.state is JobState.FINISHED else {}).get("reason") or "the job was cancelled")

        promoted = None
        try:
            end = await self._rollout.run(job.model, winner.version, piece.config, job.id, hindered)
            report["canary"] = end.text
            if stop.is_set():
                raise TaskFailed(Failure.CANCELLED, f"cancelled during its canary, {end.text}")
            if not end.skipped:
                self._metrics.count("hone_verdicts", "canary", end.verdict.value)
            if end.verdict is Verdict.FAILED:
                return "refused", "", report | {"reason": f"canary: {end.text}"}
            if (await self.want(job)).desired == winner.version:
                return "promoted", winner.version, report | {"reason": "somebody promoted it during its canary"}
            if waits := await self.held_back(job, piece):
                return "kept", winner.version, report | {"waits": waits}
            if end.verdict is not Verdict.PASSED:
                waits = f"the canary stayed undecided ({end.text}); it is proven, promote it by hand"
                return "kept", winner.version, report | {"waits": waits}
            await self.want(job)
            share = 0.0 if end.skipped else piece.config.rollout.watch_share
            reason = f"job {job.id}: {winner.summary}"
            try:
                promoted = await asyncio.to_thread(
                    self._commands.promote, job.model, winner.version, "hone", reason, False, settings, share
                )  # fmt: skip
            except NotAllowed as error:
                return "kept", winner.version, report | {"waits": str(error)}
        finally:
            if promoted is None:
                await self._rollout.clear(job.model, winner.version, job.id)
        return await self._taken(job, winner.version, promoted.seq, report)

    async def end_trials(self, job: Job) -> None:
        """Take back what the job's candidates have on trial, where nobody judges it any more."""
        for version in job.candidates:
            await self._rollout.clear(job.model, version, job.id)

    async def held_back(self, job: Job, piece: Workpiece) -> str:
        """`held_back`, by what the journal says at this moment."""
        self.seen = await asyncio.to_thread(self._journal.state)
        return held_back(self.seen, job.model, piece.config)

    async def _made_for_others(self, job: Job, version: str) -> str:
        """Why a version that was built for another class of hosts does not take over here by itself; '' where it was not."""
        card = await asyncio.to_thread(self._cards.card, job.model, version)
        target = target_of(job.tries[card.draft.try_index]) if isinstance(card, BuiltCard) else ""
        if not target or parse_target(target).key == self._host_class:
            return ""
        return f"it was made for {target}, and is unproven there: run hone verify {job.model}:{version} on such a host"

    async def already_taken(self, job: Job) -> tuple[str, str, JSON] | None:
        """The end of a job whose winner was promoted by an earlier holder of the lease, who did not live to say so."""
        want = await self.want(job)
        if want.desired not in job.candidates:
            return None
        for event in await asyncio.to_thread(self._journal.read, 0, 1000, job.model, True):
            if event.kind == "desired.changed" and event.version == want.desired:
                return await self._taken(job, want.desired, event.seq, await asyncio.to_thread(self._told_before, want))
        return None

    def _told_before(self, want: ModelState) -> JSON:
        """The report on a version that was judged and promoted already, as its proof has it."""
        proof = self._cards.proof(self._cards.card(want.name, want.desired), want.golden_sha256, self._host_class)
        verdicts = [] if proof is None else [{"version": want.desired, "verdict": proof.verdict.value, "summary": proof.summary}]
        return {"verdicts": verdicts, "notes": ["promoted before the server was started again"]}

    async def _taken(self, job: Job, version: str, since: int, report: JSON) -> tuple[str, str, JSON]:
        """Wait until the promoted version serves; where it does not, go back to the one before."""
        if await self._activated(job.model, version, since):
            return "promoted", version, report
        await self._undo(job, version)
        reason = f"version {version} passed, but did not load; the version before goes on serving"
        return "failed", version, report | {"reason": reason}

    async def _undo(self, job: Job, version: str) -> None:
        want = await self.want(job)
        if want.desired == version and want.previous:
            await asyncio.to_thread(self._commands.leave, job.model, "hone", f"version {version} did not load")

    async def _activated(self, model: str, version: str, since: int) -> bool:
        """Wait, bounded, for this server's data plane to say, later than event `since`, that it serves `version`, or that it does not load.
        Another, which may lack its files, goes on with the one before, and says so."""
        after, until = since, monotonic() + ACTIVATION_S
        while monotonic() < until:
            for event in await asyncio.to_thread(self._journal.read, after, 500, model):
                after = event.seq
                if event.version != version or event.data.get("replica", self._replica) != self._replica:
                    continue
                if event.kind in ("version.activated", "version.failed"):
                    return event.kind == "version.activated"
            await asyncio.to_thread(self._journal.wait, after, 1.0)
        return False
