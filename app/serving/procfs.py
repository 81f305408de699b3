"""What /proc tells about runners and tasks: CPU time, state, memory, who is below whom. Cheap reads; a process that is gone reads as None.

It judges nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ThreadFacts:
    """State letter of proc(5) (R running or runnable, S asleep, D in the kernel, T stopped) and CPU seconds used."""

    state: str
    cpu_s: float


def _read(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return None
    finally:
        os.close(fd)


def facts(pid: int, tid: int = 0) -> ThreadFacts | None:
    """Of the whole process, or of one thread in it."""
    text = _read(f"/proc/{pid}/task/{tid}/stat" if tid else f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return ThreadFacts(fields[0].decode(), (int(fields[11]) + int(fields[12])) / _TICK)


def descendants(pid: int) -> list[int]:
    """`pid` and all processes below it, as far as the kernel tells (proc(5): children)."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for tid in os.listdir(f"/proc/{one}/task"):
                found += map(int, (_read(f"/proc/{one}/task/{tid}/children") or b"").split())
    return found


class OwnCpu:
    """CPU seconds of this process and of all that it started: runners, tasks, fresh runners; and of workers beside it while they are named.
    It only grows, also where some of them end."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._total_s = 0.0

    def read(self, runners: Iterable[int] = (), workers: Iterable[int] = ()) -> float:
        """For polls, off the event loop; what ended since the reading before is counted up to that one. `runners` are counted in any case.

        Of `workers`, with all below them, counts what they use from when they are first named.
        """
        pids = {*descendants(os.getpid()), *runners}
        for worker in workers:
            below = descendants(worker)
            if worker not in self._seen:
                self._seen |= {pid: found.cpu_s for pid in below if (found := facts(pid)) is not None}
            pids |= {*below}
        now = {pid: found.cpu_s for pid in pids if (found := facts(pid)) is not None}
        self._total_s += sum(max(0.0, cpu_s - self._seen.get(pid, 0.0)) for pid, cpu_s in now.items())
        self._seen = now
        return self._total_s


def states(pid: int) -> str:
    """State letters of all threads: 'R' in it means that something computes or waits for a core."""
    try:
        tids = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return ""
    found = (facts(pid, int(tid)) for tid in tids)
    return "".join(thread.state for thread in found if thread)


def private_bytes(pid: int) -> int | None:
    """Resident anonymous memory: what this process alone holds. Microseconds, for a sampler."""
    text = _read(f"/proc/{pid}/statm")
    if not text:
        return None
    _, resident, shared, *_ = map(int, text.split())
    return (resident - shared) * _PAGE


def pss_bytes(pid: int) -> int | None:
    """Proportional set size: private memory and the share of what is shared (walks the page tables: for polls, not for the hot path)."""
    text = _read(f"/proc/{pid}/smaps_rollup")
    if not text:
        return None
    for line in text.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) << 10
    return None


def oom_kills() -> int:
    """How often the kernel has killed for want of memory, on this host as far as we can see; 0 where it does not say."""
    text = _read("/proc/vmstat") or b""
    position = text.find(b"\noom_kill ")
    if position < 0:
        return 0
    return int(text[position + 10 :].split(b"\n", 1)[0])


def set_oom_score(pid: int, adjustment: int) -> None:
    """Best effort: without privileges the kernel lets it only rise (proc(5), oom_score_adj)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write(str(adjustment))
