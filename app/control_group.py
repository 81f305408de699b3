"""A control group with a quota of the cores for processes that run already (cgroups(7), v1 and v2), for `hone demo --break quota`.

As a container's CPU limit that somebody lowers. It takes root, and a hierarchy in which groups may be made: not inside most containers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from app.errors import HoneError

PERIOD_US: Final = 100_000
REMOVED_S: Final = 30.0
"""Whoever just ended may count as a member for a while, longer on a busy machine."""
_NAME: Final = "hone-quota-"


def check_quota_possible(top: Path | None = None) -> None:
    """Raises HoneError where no such group can be made: beneath `top`, by default where the CPU controller's groups are."""
    with _made(top):
        pass


@contextmanager
def quota_of(pids: list[int], cores: float) -> Iterator[None]:
    """These processes, and those that they start, may take `cores` cores' worth of time; afterwards all go back to where the first one was.

    Raises HoneError where that is not possible.
    """
    with _made() as group:
        before = _place_of(pids[0], group.parent)
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{int(cores * PERIOD_US)} {PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD_US)))
        try:
            for pid in pids:
                _move(pid, group)
            yield
        finally:
            _empty(group, before)


def ancestor_with(pid: int, argument: str) -> int:
    """The topmost process above `pid` that was started with this argument, else `pid`."""
    found, at = pid, pid
    while at > 1:
        with contextlib.suppress(OSError):
            if argument in Path(f"/proc/{at}/cmdline").read_text().split("\0"):
                found = at
        at = _parent(at)
    return found


@contextmanager
def _made(top: Path | None = None) -> Iterator[Path]:
    """A group of our own, gone afterwards; and so is what somebody left who was killed. Raises HoneError."""
    try:
        top = top or _hierarchy()
        for left in top.glob(f"{_NAME}*"):
            if not Path(f"/proc/{left.name.removeprefix(_NAME)}").exists():
                _remove(left, top)
        group = top / f"{_NAME}{os.getpid()}"
        group.mkdir()
        if not any((group / name).exists() for name in ("cpu.max", "cpu.cfs_quota_us")):
            group.rmdir()
            raise HoneError(f"--break quota: {top} gives its groups no CPU limits")
    except OSError as error:
        raise HoneError(
            f"--break quota holds the running server to a part of a core, in a control group of its own: that takes root and a writable "
            f"/sys/fs/cgroup ({error})"
        ) from None
    try:
        yield group
    finally:
        _remove(group, top)


def _remove(group: Path, top: Path) -> None:
    """Raises HoneError where the kernel does not let it go."""
    until = time.monotonic() + REMOVED_S
    while True:
        try:
            _empty(group, top)
            return group.rmdir()
        except OSError as error:
            if time.monotonic() > until:
                raise HoneError(f"the control group {group} could not be removed ({error}): rmdir {group}") from None
        time.sleep(0.1)


def _empty(group: Path, to: Path) -> None:
    """All that is in `group` goes to the group `to`."""
    for _ in range(50):  # what one of them starts meanwhile is a member, too
        if not (left := (group / "cgroup.procs").read_text().split()):
            break
        for each in left:
            _move(int(each), to)


def _hierarchy() -> Path:
    """Where the CPU controller's groups are: of v1, or of v2 with the controller handed on. Raises OSError where it cannot be handed on."""
    unified: Path | None = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, tail = line.partition(" - ")
        kind, place = tail.split(), Path(mount.split()[4])
        if kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            return place
        if kind[0] == "cgroup2" and "cpu" in (place / "cgroup.controllers").read_text().split():
            unified = place
    if unified is None:
        raise OSError("no hierarchy of control groups has a CPU controller")
    if "cpu" not in (unified / "cgroup.subtree_control").read_text().split():
        (unified / "cgroup.subtree_control").write_text("+cpu")
    return unified


def _place_of(pid: int, top: Path) -> Path:
    """The group of `pid` in the hierarchy that is mounted at `top`; `top` itself where that group lies outside of what is mounted."""
    unified = (top / "cgroup.controllers").exists()
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers if unified else "cpu" in controllers.split(","):
            place = top / path.lstrip("/")
            return place if place.is_dir() else top
    return top


def _move(pid: int, group: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        (group / "cgroup.procs").write_text(str(pid))


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
