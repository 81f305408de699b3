"""What the admin side shows of a running server: status, models, versions, jobs, the timeline and why things are as they are.

It reads what fleet, journal, cards and loop know into JSON-able facts, and changes nothing; what may be asked for is app.operations'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from time import monotonic
from typing import Final

from app import __version__
from app.catalog.cards import BuiltCard, Card, Cards, GoldenCard, Proof
from app.control.loop import Loop
from app.domain import JSON, Event, Job, JobState, ModelState
from app.errors import NotFound
from app.serving.fleet import Fleet
from app.serving.service import InferenceService
from app.serving.slot import Loaded, Slot
from app.store.base import Journal
from optimizers.plot import curves_svg

EXPLAINING: Final = frozenset({
    "model.deployed", "desired.changed", "settings.changed", "version.failed", "version.confirmed", "canary.ended", "suspicion.raised",
    "diagnosis.made", "plan.made", "runner.restarted", "recovery.verified", "job.finished", "ladder.stepped", "version.verified",
})  # fmt: skip
"""Events that say why a model is served as it is."""
STORY: Final = 30
_INCIDENT: Final = frozenset({"suspicion.raised", "diagnosis.made", "plan.made", "recovery.verified"})


def what_led_here(events: Sequence[Event]) -> list[Event]:
    """`events` without the looks for which nothing was done, but for the newest of those: on a busy host there are many, also in one incident."""
    idle: list[list[Event]] = []
    look: list[Event] = []
    acted = False
    for event in (event for event in events if event.kind in _INCIDENT):
        look.append(event)
        if event.kind == "plan.made":
            done = event.data.get("action", "nothing") != "nothing"
            acted = acted or done
            idle += [] if done else [look]
            look = []
        elif event.kind == "recovery.verified":
            if not acted:
                idle[-1:] = [[*(idle[-1] if idle else ()), *look]]
            look, acted = [], False
    left_out = {event.seq for one in idle[:-1] for event in one}
    return [event for event in events if event.seq not in left_out]


class ServerViews:
    """Everything that a person may see. Blocking work runs in threads. `host`: facts of this server that stay."""

    def __init__(self, service: InferenceService, fleet: Fleet, journal: Journal, cards: Cards, loop: Loop, host: JSON) -> None:
        self._service, self._fleet, self._journal, self._cards = service, fleet, journal, cards
        self._loop, self._host = loop, host
        self._started = monotonic()

    def status(self) -> JSON:
        workers = [value for key, value in self._fleet.board.items() if key.startswith("worker:")]
        return {
            "version": __version__,
            "ready": self._fleet.ready,
            "uptime_s": round(monotonic() - self._started, 1),
            "host": self._host | {"decides": self._loop.leads(), "now": self._loop.host.to_json()},
            "frozen": self._fleet.state.frozen,
            "frozen_because": self._fleet.state.frozen_because,
            "store_error": self._fleet.store_error,
            "repository_error": self._fleet.repository_error,
            "warnings": self._fleet.warnings,
            "workers": workers,
            "models": self.models(),
            "jobs": self.jobs("", True),
        }

    def models(self) -> list[JSON]:
        return [self.slot_facts(slot) for slot in sorted(self._service.slots.values(), key=lambda slot: slot.name)]

    def model(self, name: str) -> JSON:
        slot = self._service.slot(name)
        return self.slot_facts(slot) | {
            "objective": slot.config.objective.model_dump(exclude_none=True),
            "description": slot.config.description,
            "jobs": self.jobs(name, False)[:20],
        }

    async def versions(self, name: str) -> list[JSON]:
        """Lineage: golden first, then others that were deployed and what was built, each with its proof on this class of host."""
        slot = self._service.slot(name)
        want = self._fleet.state.models.get(name)
        if want is None:
            return []
        return await asyncio.to_thread(self._lineage, slot, want)

    def jobs(self, model: str, open_only: bool) -> list[JSON]:
        jobs = sorted(self._fleet.state.jobs.values(), key=lambda job: job.requested_at, reverse=True)
        chosen = [j for j in jobs if model in ("", j.model) and not (open_only and j.state is JobState.FINISHED)]
        return [self.job_facts(job) for job in chosen]

    def job(self, identity: str) -> JSON:
        job = self._fleet.state.jobs.get(identity)
        if job is None:
            raise NotFound(f"no job {identity!r}; GET /admin/jobs lists them")
        return self.job_facts(job) | {"report": job.report}

    async def timeline(self, model: str, after: int, limit: int, newest_first: bool) -> list[JSON]:
        events = await asyncio.to_thread(self._journal.read, after, limit, model, newest_first)
        return [asdict(event) for event in events]

    async def explain(self, name: str) -> JSON:
        """Why the active version is the active one: its lineage, proof, what led to it, and what is wrong now."""
        slot = self._service.slot(name)
        lineage = {one["version"]: one for one in await self.versions(name)}
        events = await asyncio.to_thread(self._journal.read, 0, 400, name, True)
        chain: list[JSON] = []
        version = slot.active.version if slot.active is not None else slot.desired
        while version and version in lineage and version not in [one["version"] for one in chain]:
            chain.append(lineage[version])
            version = lineage[version]["parent"]
        told = what_led_here([event for event in reversed(events) if event.kind in EXPLAINING])
        return self.slot_facts(slot) | {"lineage": chain, "story": [asdict(event) for event in told[-STORY:]]}

    async def curves(self, name: str, version: str) -> str:
        """A picture of what each layer costs when it alone is cut (SVG), where a method that built `version` measured that. Raises NotFound."""
        self._service.slot(name)
        card = await asyncio.to_thread(self._cards.card, name, version)
        steps = card.draft.facts if isinstance(card, BuiltCard) else ()
        measured = next((step for step in steps if step.get("curves")), None)
        if measured is None:
            raise NotFound(
                f"no step that built version {version!r} of {name!r} cut layers one by one; sensitivity-pruning does, and rank=sensitivity"
            )
        return curves_svg(measured["curves"], f"{name}:{version}, {measured['method']}: each layer cut alone")

    async def news(self, after: int, timeout_s: float) -> int | None:
        return await self._fleet.news(after, timeout_s)

    def slot_facts(self, slot: Slot) -> JSON:
        want = self._fleet.state.models.get(slot.name)
        active = slot.active
        state = "unloaded" if slot.unloaded else "ready" if slot.ready else "loading" if slot.loading else "unavailable"
        return {
            "name": slot.name,
            "state": state,
            "reason": (slot.trouble or slot.misfit) if state == "ready" else slot.reason,
            "task": slot.config.task,
            "mode": (want.mode if want is not None and want.mode is not None else slot.config.mode).value,
            "golden": slot.golden,
            "desired": want.desired if want is not None else slot.desired,
            "active": active.version if active else "",
            "previous": want.previous if want is not None else "",
            "generation": active.generation if active else 0,
            "settings": asdict(active.settings) if active else {},
            "loaded": [loaded_facts(loaded) for loaded in slot.versions.values()],
            "failed": dict(slot.failed),
            "captured": len(slot.reservoir),
            "split": asdict(want.split) if want is not None and want.split is not None else None,
            "rungs": list(want.rungs) if want is not None else [],
            "stepped_down_to": slot.rung.version if slot.rung is not None else "",
            "loop": self._loop.told(slot.name),
            "last_event": want.last_event if want is not None else 0,
            "latest": self._fleet.latest.get(slot.name),
        }

    def job_facts(self, job: Job) -> JSON:
        said = asdict(job)
        del said["report"]
        progress = self._fleet.board.get(f"job:{job.id}")
        return said | {"state": job.state.value, "progress": progress if job.state is not JobState.FINISHED else None}

    def _lineage(self, slot: Slot, want: ModelState) -> list[JSON]:
        earlier = sorted((version for version in slot.known if version.isdigit() and version != want.golden), key=int, reverse=True)
        rows = []
        for version in (want.golden, *earlier):
            card = self._cards.golden(want.name, version)
            told = self._deployed(slot, want, version)
            rows.append(told | self._with_card(want, card) if card is not None else told)
        return rows + [self._built(slot, want, card) for card in self._cards.built(want.name)]

    def _deployed(self, slot: Slot, want: ModelState, version: str) -> JSON:
        """What is known without a card, which a version that never loaded does not have."""
        state, reason = slot.state_of(version)
        return {
            "version": version,
            "golden": version == want.golden,
            "parent": "",
            "recipe": [],
            "why": "deployed",
            "job": "",
            "state": state.value,
            "reason": reason,
            "active": slot.active is not None and slot.active.version == version,
        }

    def _built(self, slot: Slot, want: ModelState, card: BuiltCard) -> JSON:
        draft = card.draft
        known = next((b for b in want.built if b.version == card.version), None)
        told = self._deployed(slot, want, card.version) | {
            "parent": draft.parent,
            "recipe": [step.get("method") for step in draft.recipe],
            "why": draft.why,
            "job": draft.job,
        }
        if known is not None and known.removed:
            told["state"] = "REMOVED"
        return told | self._with_card(want, card)

    def _with_card(self, want: ModelState, card: Card) -> JSON:
        proof = self._cards.proof(card, want.golden_sha256, str(self._host["host_class"]))
        return {
            "bytes": card.bytes,
            "sha256": card.sha256,
            "stale": isinstance(card, BuiltCard) and card.draft.golden_sha256 != want.golden_sha256,
            "batching": card.rows.reason,
            "notes": _found_at_deploy(card),
            "proof": _proof(proof),
            "proven_on": [p.host_class for p in self._cards.proofs(card, want.golden_sha256)],
        }


def _found_at_deploy(card: Card) -> list[str]:
    """What the inspection of a golden has to tell people: weights that are listed as inputs, graph levels that compute something else."""
    if not isinstance(card, GoldenCard):
        return []
    serving = card.facts.get("serving") or {}
    level = [f"served at graph level {serving['graph_level']}: {serving['reason']}"] if serving.get("graph_level", "all") != "all" else []
    return [*(str(note) for note in card.facts.get("notes") or ()), *level]


def loaded_facts(loaded: Loaded) -> JSON:
    engine = loaded.engine
    return {
        "version": loaded.version,
        "state": loaded.state.value,
        "generation": loaded.generation,
        "alive": engine.alive,
        "pid": engine.pid,
        "queued": engine.queued,
        "inflight": engine.inflight,
        "memory_bytes": loaded.memory_bytes,
        "load_s": round(loaded.took_s, 3),
        "pinned": loaded.pinned,
        "notes": list(loaded.notes),
        "batching": loaded.admitted.signature.batchable,
    }


def _proof(proof: Proof | None) -> JSON | None:
    if proof is None:
        return None
    return {
        "host_class": proof.host_class,
        "verdict": proof.verdict.value,
        "summary": proof.summary,
        "fidelity": proof.fidelity,
        "latency": proof.latency.get("latency") or {},
        "capacity": proof.latency.get("capacity") or {},
        "settings": asdict(proof.settings) if proof.settings else None,
        "quietness": proof.quietness,
        "measured_at": proof.measured_at,
    }
