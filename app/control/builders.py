"""Who builds on this machine: a worker beside the server takes of the same cores, and is Hone's own doing; one elsewhere is neither."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Collection
from time import time
from typing import Final

from app.domain import Job, JobState, State
from app.store.base import Journal
from app.store.clock import boot_id

WORKERS: Final = "worker:"
"""Where each worker says on the board that it is alive."""
CLAIMED_S: Final = 60.0
"""A job that no worker has taken after so long waits for one to be started."""


def worker_name() -> str:
    """HOST-PID-six random digits: unique, and known again by `builders_here`."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def machine() -> str:
    """Which machine this is, the same in all of its containers; '' where the kernel does not say."""
    return boot_id()[:8]


def workers(journal: Journal, state: State) -> frozenset[str]:
    """Names of the workers that are alive, where there is a job that needs one."""
    if all(job.state not in (JobState.REQUESTED, JobState.BUILDING) for job in state.jobs.values()):
        return frozenset()
    return frozenset(key.removeprefix(WORKERS) for key in journal.board(WORKERS))


def builders_here(state: State, alive: Collection[str]) -> dict[str, int]:
    """Jobs that are being built on this machine, each with its worker's process id: 0 for one in another container."""
    jobs = (job for job in state.jobs.values() if job.state is JobState.BUILDING and job.worker in alive)
    return {job.id: _pid(job.worker) for job in jobs if not job.machine or job.machine == machine()}


def under_way(state: State, model: str, alive: Collection[str], now: float | None = None) -> list[Job]:
    """The model's jobs that somebody works on, or will in a moment. One that waits for a worker where there is none may wait for ever."""
    now = time() if now is None else now
    waits = (JobState.REQUESTED, JobState.BUILDING)
    jobs = [job for job in state.jobs.values() if job.model == model and job.state is not JobState.FINISHED]
    return [job for job in jobs if job.state not in waits or alive or now - job.requested_at < CLAIMED_S]


def _pid(worker: str) -> int:
    host, _, rest = worker.rpartition("-")[0].rpartition("-")
    return int(rest) if host == socket.gethostname() and rest.isdigit() else 0
