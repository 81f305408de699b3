"""Task children: the answer comes back, bounds hold, and nothing outlives a cancel, a time limit or the parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

from optimizers import task
from optimizers.base import Progress
from optimizers.host import cpu_budget, spare_ratio
from optimizers.task import Failure, TaskFailed, TaskLimits, _say, run_task, run_task_sync, spare_or_other

ROOT = Path(__file__).resolve().parent.parent


def kind(name: str) -> str:
    return f"tests.task_kinds:{name}"


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def pids_in(path: Path) -> list[int]:
    wait_for(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def test_brings_back_the_result_and_progress_in_order(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = run_task_sync(kind("echo"), {"a": [1, "ü"]}, TaskLimits(threads=2, seed=7, scratch=str(tmp_path)), seen.append)
    assert result["request"] == {"a": [1, "ü"]}
    assert (result["threads"], result["seed"], result["nan"], result["path"]) == (2, 7, None, "x")
    assert [p.step for p in seen] == ["step 0", "step 1", "step 2"]
    assert seen[-1].detail == {"i": 2}
    assert Path(result["scratch"]).parent == tmp_path
    assert list(tmp_path.iterdir()) == [], "the scratch folder is removed"


@pytest.mark.parametrize(
    ("name", "request_"), [("spins", {"seconds": 0.5}), ("raises", {"error": "ValueError", "text": ""}), ("crashes", {"how": "segfault"})]
)
def test_what_a_task_spent_is_told_once_however_it_ends(name: str, request_: dict[str, Any]) -> None:
    spent: list[float] = []
    with contextlib.suppress(TaskFailed):
        asyncio.run(run_task(kind(name), request_, TaskLimits(), on_spent=spent.append))
    assert len(spent) == 1 and (1.0 if name == "spins" else 0.0) < spent[0] < 30


def test_the_child_is_bounded_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_ADMIN_TOKEN", "secret")
    cpu = min(os.sched_getaffinity(0))
    result = run_task_sync(kind("surroundings"), {}, TaskLimits(scheduler="idle", cpus=(cpu,), threads=3))
    assert result["nice"] == 19
    assert result["scheduler"] == os.SCHED_IDLE
    assert not result["autogroup"] or result["autogroup"].endswith("nice 19\n"), "a session of its own must not weigh as much as the server"
    assert result["cpus"] == [cpu]
    assert result["omp"] == "3"
    assert result["oom"] == 900
    assert result["settings"] == [], "it runs models and code of others: tokens and the store's password are none of theirs"
    assert result["stdin"] == ""
    assert result["first_on_path"] not in {"", str(ROOT)}, "nothing may shadow the standard library"


@pytest.mark.parametrize(("spare", "scheduler"), [(0.5, "idle"), (0.0, "other")])
def test_a_task_takes_only_what_nobody_wants_unless_nothing_would_be_left(
    monkeypatch: pytest.MonkeyPatch, spare: float, scheduler: str
) -> None:
    monkeypatch.setattr("optimizers.task.spare_ratio", lambda affinity: spare)
    assert spare_or_other() == scheduler


def test_a_child_gives_way_from_its_first_import_on() -> None:
    """Before it is told its bounds: an interpreter's start takes a core for a tenth of a second and more."""

    async def born() -> tuple[int, int]:
        process = await task._start(TaskLimits(scheduler="idle"))
        try:
            return os.sched_getscheduler(process.pid), os.getpriority(os.PRIO_PROCESS, process.pid)
        finally:
            await task._end(process)

    assert asyncio.run(born()) == (os.SCHED_IDLE, 19)


def test_spare_cores_are_told_from_busy_ones() -> None:
    cores = sorted(os.sched_getaffinity(0))
    hogs = [subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]) for core in cores]
    try:
        wait_for(lambda: spare_ratio(0.3) < 0.1 or cpu_budget().quota is not None)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    wait_for(lambda: spare_ratio(0.05) > 0.02 or cpu_budget().quota is not None)  # other tests may run beside this one


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        ("NotApplicable", Failure.NOT_APPLICABLE),
        ("Rejected", Failure.REJECTED),
        ("ValueError", Failure.ERROR),
        ("MemoryError", Failure.OUT_OF_MEMORY),
    ],
)
def test_errors_come_back_by_kind(error: str, failure: Failure) -> None:
    with pytest.raises(TaskFailed, match="node conv1") as caught:
        run_task_sync(kind("raises"), {"error": error, "text": "node conv1"})
    assert caught.value.kind is failure
    assert ("Traceback" in caught.value.stderr) == (failure in {Failure.ERROR, Failure.OUT_OF_MEMORY})


@pytest.mark.parametrize(
    ("how", "text", "failure"),
    [
        ("segfault", "SIGSEGV", Failure.DIED),
        (
            "kill",
            "SIGKILL",
            Failure.OUT_OF_MEMORY,
        ),  # nearly always the kernel's, which takes task children first: no fault of what was sent
        ("exit", "exit status 3", Failure.DIED),
    ],
)
def test_a_child_that_dies_says_how_and_its_last_words(how: str, text: str, failure: Failure) -> None:
    with pytest.raises(TaskFailed, match=text) as caught:
        run_task_sync(kind("crashes"), {"how": how})
    assert caught.value.kind is failure
    assert "last words" in caught.value.stderr


def test_a_child_that_died_at_birth_is_a_failed_task_also_under_the_servers_event_loop() -> None:
    async def tell_the_dead() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "", stdin=asyncio.subprocess.PIPE)
        code = await process.wait()
        await asyncio.sleep(0.1)
        await _say(process, b"a task\n")
        return code

    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(tell_the_dead()) == 0


def test_process_1_of_a_container_keeps_no_zombies_of_a_childs_group() -> None:
    code = """if True:
        import ctypes, os
        from optimizers.task import TaskFailed, run_task_sync
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans are ours, as they are process 1's
        run_task_sync("tests.task_kinds:echo", {})
        try:
            run_task_sync("tests.task_kinds:crashes", {"how": "kill"})
        except TaskFailed:
            os.waitpid(-1, os.WNOHANG)"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "ChildProcessError" in ended.stderr, "somebody was left"


def test_memory_is_bounded() -> None:
    limits = TaskLimits(memory_bytes=600 << 20)
    assert run_task_sync(kind("takes_memory"), {"bytes": 100 << 20}, limits) == {"taken": 100 << 20}
    with pytest.raises(TaskFailed, match="bound of 600 MiB") as caught:
        run_task_sync(kind("takes_memory"), {"bytes": 900 << 20}, limits)
    assert caught.value.kind is Failure.OUT_OF_MEMORY


def test_an_unknown_kind_names_those_there_are() -> None:
    with pytest.raises(TaskFailed, match=r"'nonsense'.*inspect"):
        run_task_sync("nonsense", {})


@pytest.mark.parametrize("deaf", [False, True])
def test_cancelling_ends_the_child_and_its_descendants(tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "CANCEL_GRACE_S", 0.5)
    pids = tmp_path / "pids"
    with pytest.raises(TaskFailed) as caught:
        run_task_sync(kind("sleeps"), {"pids": str(pids), "deaf": deaf}, TaskLimits(scratch=str(tmp_path)), cancelled=pids.exists)
    assert caught.value.kind is Failure.CANCELLED
    wait_for(lambda: not any(map(alive, pids_in(pids))))
    assert list(tmp_path.iterdir()) == [pids]


@pytest.mark.parametrize("deaf", [False, True])
def test_time_is_bounded(tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "TIME_GRACE_S", 4.0 if not deaf else 0.1)
    pids = tmp_path / "pids"
    with pytest.raises(TaskFailed) as caught:
        run_task_sync(kind("sleeps"), {"pids": str(pids), "deaf": deaf}, TaskLimits(seconds=3, scratch=str(tmp_path)))
    assert caught.value.kind is Failure.TIMEOUT
    if pids.exists():
        wait_for(lambda: not any(map(alive, pids_in(pids))))


def test_a_cancelled_caller_leaves_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def run() -> None:
        running = asyncio.create_task(run_task(kind("sleeps"), {"pids": str(pids), "deaf": True}))
        await asyncio.to_thread(pids_in, pids)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(run())
    wait_for(lambda: not any(map(alive, pids_in(pids))))


def test_a_killed_parent_takes_the_child_and_its_descendants_along(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"from optimizers.task import run_task_sync; run_task_sync({kind('sleeps')!r}, {{'pids': {str(pids)!r}, 'deaf': True}})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        started = pids_in(pids)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(alive, started)), 10)


def _weight() -> str:
    path = Path("/proc/self/autogroup")
    return path.read_text() if path.exists() else ""


def test_the_command_answers_by_hand() -> None:
    before = _weight()
    request = json.dumps({"kind": kind("surroundings"), "request": {}, "limits": {"scheduler": "other"}})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "optimizers.task"], input=request, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60
    )
    assert json.loads(done.stdout)["result"]["nice"] == 19
    assert _weight() == before, "run by hand it must not make light of the terminal's session, in which others run"
