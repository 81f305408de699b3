"""Runner processes: what they cost to start, what they import, and that nothing of them is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain import RuntimeSettings
from app.serving.engine import Engine, RunnerSpec
from app.serving.forkserver import ForkServer
from app.serving.ledger import CoreLedger
from tests import models
from tests.engines import Start, anyio_backend, forkserver, gone, request, start, until, values
from tests.runner_children import ROOT, children_of

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio


async def test_a_runner_is_forked_not_started_anew_and_opens_nothing_of_ours(start: Start, tmp_path: Path, forkserver: ForkServer) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"))
    assert engine.pid in children_of(forkserver.pid)
    assert len(os.listdir(f"/proc/{forkserver.pid}/task")) <= 2, "the fork server must have no threads of its own making"
    assert Path(f"/proc/{engine.pid}/comm").read_text().strip() == "hone-runner"
    modules = Path(f"/proc/{engine.pid}/maps").read_text()
    assert "pydantic" not in modules


async def test_if_the_fork_server_dies_runners_live_on_and_it_is_started_again(
    start: Start, tmp_path: Path, forkserver: ForkServer
) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"))
    pid, old = engine.pid, forkserver.pid
    os.kill(old, signal.SIGKILL)
    await until(lambda: forkserver.pid != old)
    assert values(await engine.infer(request(x=np.ones((1, 4), np.float32)))).tolist() == [[2, 2, 2, 2]]
    assert engine.pid == pid
    second = await start(models.scaled(tmp_path / "m3.onnx", 3))
    assert values(await second.infer(request(x=np.ones((1, 4), np.float32)))).tolist() == [[3, 3, 3, 3]]
    assert second.pid in children_of(forkserver.pid)
    os.kill(pid, signal.SIGKILL)
    assert values(await engine.infer(request(x=np.ones((1, 4), np.float32)))).tolist() == [[2, 2, 2, 2]], "an orphan's death is seen too"


async def test_a_fork_server_that_answers_nothing_is_done_without(
    tmp_path: Path, forkserver: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.forkserver._FORK_S", 0.3)
    os.kill(forkserver.pid, signal.SIGSTOP)
    path = models.scaled(tmp_path / "m.onnx")
    spec = RunnerSpec("m", "1", 1, str(path), models.signature_of(path), RuntimeSettings())
    engine = await Engine.start(spec, forkserver=forkserver, ledger=CoreLedger(2))
    assert values(await engine.infer(request(x=np.ones((1, 4), np.float32)))).tolist() == [[2, 2, 2, 2]]
    assert engine.pid in children_of(os.getpid())
    pid = engine.pid
    await engine.stop()
    assert gone(pid), "a spawned runner must be reaped by us"
    os.kill(forkserver.pid, signal.SIGCONT)


SERVER = """
    import asyncio, sys
    from pathlib import Path
    import numpy as np
    from app.domain import RuntimeSettings
    from app.serving.engine import Engine, RunnerSpec
    from app.serving.forkserver import ForkServer
    from app.serving.ledger import CoreLedger
    from tests.engines import request
    from tests.models import signature_of

    async def main(path):
        server = ForkServer()
        server.start()
        spec = RunnerSpec("m", "1", 1, path, signature_of(Path(path)), RuntimeSettings())
        engine = await Engine.start(spec, forkserver=server, ledger=CoreLedger(2))
        busy = asyncio.create_task(engine.infer(request(x=np.ones(2, np.float32), n=np.array([1 << 40]))))
        await asyncio.sleep(0.3)
        print(engine.pid, server.pid, flush=True)
        await busy

    asyncio.run(main(sys.argv[1]))
"""


async def test_runners_of_a_killed_server_end_within_a_second_in_the_midst_of_a_run(tmp_path: Path) -> None:
    path = models.endless(tmp_path / "m.onnx")
    shm = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER), str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    runner, nursery = map(int, process.stdout.readline().split())
    assert not gone(runner)
    process.kill()
    began = time.monotonic()
    await until(lambda: ended(runner) and ended(nursery), 5.0)
    assert time.monotonic() - began < 2.0
    process.wait()
    process.stdout.close()
    assert set(os.listdir("/dev/shm")) == shm


def ended(pid: int) -> bool:
    """Gone, or a zombie that this machine's process 1 has not reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


async def test_a_start_that_is_cancelled_leaves_no_process_and_no_descriptor(tmp_path: Path, forkserver: ForkServer) -> None:
    path = models.endless(tmp_path / "m.onnx", turns=1 << 40)
    spec = RunnerSpec("m", "1", 1, str(path), models.signature_of(path), RuntimeSettings())
    ledger = CoreLedger(2)

    async def given_up_after(seconds: float) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await Engine.start(spec, forkserver=forkserver, ledger=ledger)

    await given_up_after(1.0)
    before = len(os.listdir("/proc/self/fd"))
    for seconds in (0.0, 0.0005, 0.002, 0.005, 0.01, 0.02, 0.1):
        await given_up_after(seconds)
    await until(lambda: not children_of(forkserver.pid))
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # the first one may still have been closing


@pytest.mark.parametrize("way", ["fork", "spawn"])
async def test_who_gives_up_in_the_very_moment_of_a_birth_leaves_no_descriptor(
    way: str, forkserver: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is there, the caller was not woken yet, and its time is over: nobody else would close the pidfd."""
    ends = [*(end.detach() for end in socket.socketpair()), *os.pipe()]
    os.close((await forkserver.fork((ends[1], ends[2]))).pidfd)
    before = len(os.listdir("/proc/self/fd"))
    order = asyncio.create_task(getattr(forkserver, way)((ends[1], ends[2])))
    if way == "fork":
        take = forkserver._take
        monkeypatch.setattr(forkserver, "_take", lambda report, fds: (take(report, fds), order.cancel()))
    else:
        await asyncio.sleep(0)
        order.cancel()
    with pytest.raises(asyncio.CancelledError):
        await order
    await asyncio.get_running_loop().shutdown_default_executor()
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    for end in ends:
        os.close(end)


async def test_a_runner_holds_nothing_of_its_siblings(start: Start, tmp_path: Path) -> None:
    path = models.scaled(tmp_path / "m.onnx")
    engines = [await start(path) for _ in range(3)]
    for engine in engines:
        await engine.infer(request(x=np.ones((1, 4), np.float32)))
        pid = engine.pid
        held = [os.readlink(f"/proc/{pid}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{pid}/fd")]
        assert held.count("socket") == 2, f"its control socket and its one instance's: {held}"
        assert held.count("/memfd") <= 2, "its arena, and the mapping of it"
        assert not any("onnxruntime.db" in name for name in held), "telemetry must be off before the runtime is imported"
        assert not any("pidfd" in name or "eventpoll" in name for name in held)


async def test_cpu_time_is_shared_by_the_calls_that_run_at_once(start: Start, tmp_path: Path) -> None:
    """With several threads a call's CPU time can only be read from the process: two at once must not both be charged for both."""
    engine = await start(models.endless(tmp_path / "m.onnx"), intra_op_threads=2, instances=2)
    call: dict[str, Any] = {"x": np.ones(2, np.float32), "n": np.array([150_000])}
    before = engine.cpu_seconds()
    both = await asyncio.gather(*(engine.infer(request(**call)) for _ in range(2)))
    used = engine.cpu_seconds() - before
    assert used > 0.1
    assert 0.5 * used < sum(result.cpu_s for result in both) < 1.3 * used + 0.05


async def test_descriptors_are_level_over_a_hundred_starts_and_nothing_is_left(
    start: Start, tmp_path: Path, forkserver: ForkServer
) -> None:
    path = models.scaled(tmp_path / "m.onnx")
    spec = RunnerSpec("m", "1", 1, str(path), models.signature_of(path), RuntimeSettings(instances=2))
    ledger = CoreLedger(2)
    shm = set(os.listdir("/dev/shm"))

    async def cycle() -> None:
        engine = await Engine.start(spec, forkserver=forkserver, ledger=ledger)
        await engine.infer(request(x=np.ones((1, 4), np.float32)))
        await engine.stop()

    for _ in range(3):
        await cycle()
    ours, theirs = len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{forkserver.pid}/fd"))
    for _ in range(100):
        await cycle()
    await until(lambda: not children_of(forkserver.pid))
    await until(lambda: len(os.listdir("/proc/self/fd")) <= ours)
    await until(lambda: len(os.listdir(f"/proc/{forkserver.pid}/fd")) <= theirs)
    assert set(os.listdir("/dev/shm")) == shm


async def test_a_runner_process_is_ready_in_a_fraction_of_a_fresh_interpreter(start: Start, tmp_path: Path) -> None:
    """At most 50 ms on a machine of its own (3 to 15 measured); here neighbours are busy, so it is held against what it saves."""
    path = models.scaled(tmp_path / "m.onnx")
    forked = [(await start(path)).opened.ready_s for _ in range(8)]
    fresh = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import onnxruntime"], check=True)
        fresh.append(time.monotonic() - began)
    assert min(forked) < min(fresh) / 3


def test_the_server_side_never_imports_a_runtime() -> None:
    code = (
        "import sys, app.serving.engine; "
        "print([m for m in sys.modules if m.split('.')[0] in {'onnxruntime', 'onnx', 'torch', 'ml_dtypes', 'multiprocessing'}])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_runner_imports_no_web_framework() -> None:
    code = (
        "import sys, app.serving.nursery, app.serving.runner, onnxruntime; "
        "print([m for m in sys.modules if m.split('.')[0] in {'fastapi', 'starlette', 'pydantic', 'uvicorn', 'torch', 'asyncio'}])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
