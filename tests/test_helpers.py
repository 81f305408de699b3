"""Helper processes: one that died or hangs is replaced, an idle one ends, and the loop answers meanwhile."""

from __future__ import annotations

import asyncio
import gzip
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

from app.api.bodies import Body
from app.api.helpers import HelperPool
from app.api.memfd import Memfd
from app.api.wire import ParsedRequest, parse_infer
from app.errors import QueueFull
from tests.body_senders import chunks, large_json, offload, open_files, run, sender_of

# ---- helpers that die, hang, idle ------------------------------------------------------------------------------------


def test_a_helper_that_died_idle_or_at_work_is_replaced() -> None:
    async def main() -> None:
        async with offload(workers=1) as work:
            text, array = large_json(200_000)
            await work.parse(Body(text), None)
            (idle,) = work.helpers.pids
            os.kill(idle, signal.SIGKILL)
            parsed = await work.parse(Body(text), None)
            assert bytes(parsed.request.inputs[0].data) == array.tobytes() and work.helpers.started == 2
            (busy,) = work.helpers.pids
            os.kill(busy, signal.SIGSTOP)
            task = asyncio.create_task(work.parse(Body(text), None))
            while work.helpers.pids:
                await asyncio.sleep(0.001)
            os.kill(busy, signal.SIGKILL)
            assert bytes((await task).request.inputs[0].data) == array.tobytes()
            assert work.helpers.started == 3

    run(main())


def test_a_helper_whose_server_was_killed_over_its_answer_ends_without_a_word() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = f"from app.api.helper_process import main; main({theirs.fileno()})"
    helper = subprocess.Popen([sys.executable, "-c", code], pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE)
    with theirs, ours:
        body = Memfd.new([b"no JSON"])
        socket.send_fds(ours, [pickle.dumps(("parse", None, None))], [body.fd])
        ours.settimeout(60)
        assert ours.recv(1, socket.MSG_PEEK)
    _, said = helper.communicate(timeout=60)
    assert (helper.returncode, said) == (0, b"")


def test_a_helper_that_hangs_is_ended_and_the_caller_told() -> None:
    async def main() -> None:
        pool = HelperPool(1, job_s=5)
        text, _ = large_json(100)
        await pool.parse(Memfd.new([text]), None, None)
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        parsed = await pool.parse(Memfd.new([text]), None, None)
        assert parsed.id == "7" and pool.pids != [pid]
        assert not os.path.exists(f"/proc/{pid}")
        await pool.close()

    run(main())


def test_an_idle_helper_ends() -> None:
    async def main() -> None:
        pool = HelperPool(1, idle_s=0.1)
        await pool.parse(Memfd.new([large_json(100)[0]]), None, None)
        (pid,) = pool.pids
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert pool.pids == [] and not os.path.exists(f"/proc/{pid}")
        await pool.close()

    run(main())


def test_who_leaves_does_not_spoil_the_helper_for_the_next() -> None:
    async def main() -> None:
        async with offload(workers=1) as work:
            text, array = large_json(300_000)
            tasks = [asyncio.create_task(work.parse(Body(text), None)) for _ in range(4)]
            await asyncio.sleep(0.05)
            for task in tasks[:3]:
                task.cancel()
            assert bytes((await tasks[3]).request.inputs[0].data) == array.tobytes()
            assert work.helpers.started == 1

    before = open_files()
    run(main())
    assert open_files() <= before


def test_the_queue_for_helpers_and_threads_is_bounded() -> None:
    async def main() -> None:
        async with offload(workers=1, queue_limit=1) as work:
            text, _ = large_json(200_000)
            memory = Memfd.new([text])
            outcomes = await asyncio.gather(*(work.helpers.parse(memory, None, None) for _ in range(6)), return_exceptions=True)
            kinds = [type(outcome) for outcome in outcomes]
            assert kinds.count(ParsedRequest) == 2 and kinds.count(QueueFull) == 4
            naps = await asyncio.gather(*(work.run_in_thread(time.sleep, 0.01) for _ in range(3)), return_exceptions=True)
            assert [type(nap) for nap in naps] == [type(None), QueueFull, QueueFull]

    run(main())


def test_helpers_go_when_the_pool_closes() -> None:
    pids: list[int] = []

    async def main() -> None:
        async with offload() as work:
            text, _ = large_json(200_000)
            await asyncio.gather(*(work.parse(Body(text), None) for _ in range(3)))
            pids.extend(work.helpers.pids)

    run(main())
    assert pids and not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


# ---- the loop answers ------------------------------------------------------------------------------------------------


def test_the_loop_answers_while_many_large_bodies_are_read() -> None:
    """Twelve bodies at once, JSON, packed and binary. Counted in the loop's own CPU time between two of its rounds: how busy the machine
    is with other things does not matter, and one of these bodies read on the loop would show."""

    async def main() -> None:
        text, _ = large_json(1_000_000)
        packed = gzip.compress(text, 1)
        head = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[4000000],"parameters":{"binary_data_size":16000000}}]}'
        binary = head + bytes(16_000_000)
        rounds: list[float] = []

        async def watch() -> None:
            while True:
                before = time.thread_time()
                await asyncio.sleep(0.001)
                rounds.append(time.thread_time() - before)

        async with offload() as work:

            async def one(number: int) -> None:
                whole, header = ((text, None), (packed, None), (binary, len(head)))[number % 3]
                async with work.body({b"content-length": b"%d" % len(whole)}, sender_of(chunks(whole, 256_000))) as body:
                    if whole is packed:
                        await work.decompress(body, "gzip")
                    parsed = await work.parse(body, header)
                    assert len(parsed.request.inputs[0].data) in (4_000_000, 16_000_000)

            watcher = asyncio.create_task(watch())
            await asyncio.gather(*(one(number) for number in range(12)))
            watcher.cancel()
            assert work.budget.used_bytes == 0
        started = time.thread_time()
        parse_infer(text, None)
        on_the_loop = time.thread_time() - started
        assert len(rounds) > 10 and max(rounds) < on_the_loop / 2, (sorted(rounds)[-5:], on_the_loop)

    run(main())
