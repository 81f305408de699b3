"""A quota for processes that run already: they are held back, what they start is too, and afterwards all are back where they were."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.control_group import ancestor_with, check_quota_possible, quota_of
from app.errors import HoneError
from app.serving import procfs
from app.telemetry.hostfacts import HostSensor

BUSY = "import sys, subprocess\nif len(sys.argv) > 2: subprocess.Popen([sys.executable, *sys.argv[2:]])\nwhile True: pass"


def _possible() -> bool:
    try:
        check_quota_possible()
    except HoneError:
        return False
    return True


def _group(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text()


def _groups(pid: int) -> list[Path]:
    """What was made by the process `pid`: other processes may have groups of their own at the same time."""
    return [*Path("/sys/fs/cgroup").glob(f"*/hone-quota-{pid}"), *Path("/sys/fs/cgroup").glob(f"hone-quota-{pid}")]


def _cores(pids: list[int], seconds: float = 1.0) -> float:
    def used() -> float:
        return sum(found.cpu_s for pid in pids if (found := procfs.facts(pid)) is not None)

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds


@pytest.mark.skipif(not _possible(), reason="control groups can't be made here (not root, or inside a container)")
def test_running_processes_get_a_quota_and_go_back() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY, "serve", "-c", BUSY]) as parent:
        try:
            while len(pids := procfs.descendants(parent.pid)) < 2:
                time.sleep(0.05)
            before = [_group(pid) for pid in pids]
            assert ancestor_with(pids[1], "serve") == parent.pid
            with quota_of(pids, 0.2):
                assert _group(pids[0]) == _group(pids[1]) != before[0]
                assert _cores(pids) < 0.4
            assert [_group(pid) for pid in pids] == before
            assert _cores(pids) > 0.4
            assert not _groups(os.getpid())
        finally:
            for pid in pids[::-1]:
                subprocess.run(["kill", "-9", str(pid)], check=False)


@pytest.mark.skipif(not _possible(), reason="control groups can't be made here (not root, or inside a container)")
def test_the_sensor_sees_a_quota_that_comes_while_it_reads() -> None:
    code = "import time\nfrom app.telemetry.hostfacts import HostSensor\nsensor = HostSensor()\n"
    code += "while True:\n    until = time.monotonic() + 1\n    while time.monotonic() < until: pass\n"
    code += "    facts = sensor.read()\n    print(facts.quota, facts.throttled_ratio, flush=True)"
    here = HostSensor().read().quota
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().split()[0] == str(here)
            with quota_of([process.pid], 0.25):
                said = [process.stdout.readline().split() for _ in range(4)]
            quota, throttled = said[-1]
            assert float(quota) == 0.25 and float(throttled) > 0.3
        finally:
            process.kill()


@pytest.mark.skipif(not _possible(), reason="control groups can't be made here (not root, or inside a container)")
def test_what_a_killed_process_left_goes_with_the_next_quota() -> None:
    """SIGKILL runs no `finally`: the server that was held to a part of a core stayed so for good."""
    code = "import sys, time\nfrom app.control_group import quota_of\nwith quota_of([int(sys.argv[1])], 0.2): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", BUSY]) as held:
        before = _group(held.pid)
        try:
            with subprocess.Popen([sys.executable, "-c", code, str(held.pid)], stdout=subprocess.PIPE, text=True) as holder:
                assert holder.stdout is not None and holder.stdout.readline() == "held\n"
                holder.kill()
            assert _groups(holder.pid) and _group(held.pid) != before
            check_quota_possible()
            assert not _groups(holder.pid) and _group(held.pid) == before
        finally:
            held.kill()


def test_a_place_without_cpu_limits_is_named_and_nothing_is_left_there(tmp_path: Path) -> None:
    with pytest.raises(HoneError, match=f"{tmp_path} gives its groups no CPU limits"):
        check_quota_possible(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(HoneError, match="takes root and a writable /sys/fs/cgroup"):
        check_quota_possible(tmp_path / "nowhere")
