"""A proof made by hand on this host with this installation, without a server: what `hone verify --here` does before a runtime upgrade.

The proof lies beside the version's card under this host class's key; a server of that class finds it when it starts.
"""

from __future__ import annotations

from app.catalog.cards import BuiltCard, Cards
from app.catalog.repository import Repository
from app.catalog.state_folder import StateFolder
from app.control.bench import Bench
from app.control.verification import judged, proof_of, question
from app.domain import JSON, Event, RuntimeSettings
from app.errors import Conflict, NotFound
from app.settings import Settings
from app.store.open import open_journal
from optimizers.host import cpu_budget, host_class
from optimizers.task import TaskFailed, TaskLimits, run_task_sync


def prove_here(settings: Settings, model: str, version: str = "") -> JSON:
    """Judge `version` (default: the desired one) against golden here; writes proof and event. Raises NotFound, Conflict."""
    here = host_class().key
    state = StateFolder(settings.state)
    bench = Bench(Repository(settings.repository, settings.allowed_roots, settings.factories, state.unpacked), state, Cards(state))
    journal = open_journal(settings.journal)
    try:
        want = journal.state().models.get(model)
        if want is None:
            raise NotFound(f"the journal in {settings.state} knows no model {model!r}; name the server's folder with --state")
        chosen = version or want.desired
        piece = bench.workpiece(model, want.golden, want.golden_sha256)
        card = bench.card(piece, chosen)
        fallback = RuntimeSettings(cpu_budget().cores, 1, 16, 512)
        with bench.scratch() as folder:
            seconds = settings.proof_seconds
            request = question(bench, piece, want, chosen, here, fallback, folder, seconds, proof_only=True, lossless=False)
            limits = TaskLimits(seconds=seconds * 2, memory_bytes=settings.job_memory_bytes, nice=10, scratch=str(folder))
            try:
                report = run_task_sync("verify", request, limits)
            except TaskFailed as failure:
                raise Conflict(f"{model}:{chosen} cannot be judged here: {failure.text}") from None
        proof = proof_of(card, want.golden_sha256, here, report, bench.settings(piece, want, chosen, here, fallback))
        bench.cards.write_proof(card, proof)
        found = judged(chosen, report, False, piece.samples.owner_named)
        if isinstance(card, BuiltCard):
            data = {"version": chosen, "host_class": here, "verdict": found.verdict.value, "summary": found.summary}
            journal.append(Event("version.verified", model, chosen, actor="hone verify --here", data=data))
        return {"model": model, "version": chosen, "host_class": here, "verdict": found.verdict.value, "summary": found.summary}
    finally:
        journal.close()
