"""Who builds on this machine: a worker beside the server takes of the same cores, and is Hone's own doing; one elsewhere is neither."""

from __future__ import annotations

import os
import socket
import uuid

from app.domain import JobState, State
from app.store.clock import boot_id


def worker_name() -> str:
    """HOST-PID-six random digits: unique, and known again by `builders_here`."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def machine() -> str:
    """Which machine this is, the same in all of its containers; '' where the kernel does not say."""
    return boot_id()[:8]


def builders_here(state: State) -> dict[str, int]:
    """Jobs that are being built on this machine, each with its worker's process id: 0 for one in another container."""
    jobs = (job for job in state.jobs.values() if job.state is JobState.BUILDING)
    return {job.id: _pid(job.worker) for job in jobs if not job.machine or job.machine == machine()}


def _pid(worker: str) -> int:
    host, _, rest = worker.rpartition("-")[0].rpartition("-")
    return int(rest) if host == socket.gethostname() and rest.isdigit() else 0
