"""Bodies, budget, helper processes: where work on bodies is done, that the loop answers meanwhile, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import gzip
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import orjson
import pytest
from starlette.requests import Request

from app.api.bodies import SHARED_BYTES, Body, BodyBudget, BodyReader, Grant, Message, Pacer, parse_content_length
from app.api.helpers import HelperPool
from app.api.labels import _body as feedback_body
from app.api.memfd import Memfd
from app.api.offload import Offload, Place, parse_place
from app.api.oip import small_json
from app.api.parcels import encode_parcel, open_parcel, pack_parcel
from app.api.wire import ParsedRequest, encode_response, parse_infer
from app.domain import InferenceRequest, InferenceResult, Tensor
from app.errors import Cancelled, InvalidRequest, NotReady, PayloadTooLarge, QueueFull

MB = 1 << 20


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


@asynccontextmanager
async def offload(**kwargs: Any) -> AsyncIterator[Offload]:
    work = Offload(**kwargs)
    try:
        yield work
    finally:
        await work.close()


def large_json(count: int) -> tuple[bytes, np.ndarray[Any, Any]]:
    array = np.random.default_rng(0).normal(size=count).astype("f4")
    tensor = {"name": "x", "datatype": "FP32", "shape": [count], "data": array}
    return orjson.dumps({"id": "7", "inputs": [tensor], "parameters": {"priority": 3}}, option=orjson.OPT_SERIALIZE_NUMPY), array


def sender(*messages: Message, then: Message | None = None) -> Callable[[], Awaitable[Message]]:
    return sender_of(messages, then)


def sender_of(messages: Iterable[Message], then: Message | None = None) -> Callable[[], Awaitable[Message]]:
    waiting = iter(messages)

    async def receive() -> Message:
        await asyncio.sleep(0)
        return next(waiting, None) or then or {"type": "http.disconnect"}

    return receive


def chunks(body: bytes, size: int) -> Iterable[Message]:
    for at in range(0, len(body), size):
        yield {"type": "http.request", "body": body[at : at + size], "more_body": at + size < len(body)}


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_body_in_one_message_is_taken_as_it_is() -> None:
    async def main() -> None:
        whole = b"x" * 1000
        body = await BodyReader(2000, BodyBudget(4000)).read(sender({"type": "http.request", "body": whole, "more_body": False}), 1000)
        assert body.data is whole and body.memory is None

    run(main())


@pytest.mark.parametrize("size", [1, 100_000, SHARED_BYTES, SHARED_BYTES + 1, 3 * MB])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_in_many_messages_is_whole_and_counted(size: int, announced: bool) -> None:
    async def main() -> None:
        whole, budget = os.urandom(size), BodyBudget(8 * MB)
        body = await BodyReader(4 * MB, budget).read(sender(*chunks(whole, 70_001)), size if announced else None)
        assert bytes(body.data) == whole
        assert budget.used_bytes >= (size - 65536 if not announced else size if size > 65536 else 0)
        assert (body.memory is not None) == (size > SHARED_BYTES)
        body.close()
        assert budget.used_bytes == 0

    before = open_files()
    run(main())
    assert open_files() == before


def test_an_announced_body_over_the_limit_is_refused_unread() -> None:
    async def main() -> None:
        async def receive() -> Message:
            raise AssertionError("read")

        budget = BodyBudget(10 * MB)
        with pytest.raises(PayloadTooLarge, match="2000000"):
            await BodyReader(MB, budget).read(receive, 2_000_000)
        with pytest.raises(PayloadTooLarge, match="together"):
            await BodyReader(100 * MB, budget).read(receive, 11 * MB)
        assert budget.used_bytes == 0

    run(main())


@pytest.mark.parametrize("size", [100, 70_000, 5 * MB])
def test_an_unannounced_body_is_refused_once_it_passes_the_limit(size: int) -> None:
    async def main() -> None:
        budget, seen = BodyBudget(10 * MB), 0
        limit = size // 2
        messages = list(chunks(bytes(size), max(1, size // 10)))

        async def receive() -> Message:
            nonlocal seen
            seen += 1
            return messages[seen - 1]

        with pytest.raises(PayloadTooLarge):
            await BodyReader(limit, budget).read(receive)
        assert seen < 8 and budget.used_bytes == 0

    before = open_files()
    run(main())
    assert open_files() == before


@pytest.mark.parametrize("announced", [None, 5000, 5 * MB])
def test_a_client_that_leaves_is_cancelled_and_leaves_nothing(announced: int | None) -> None:
    async def main() -> None:
        budget = BodyBudget(10 * MB)
        reader = BodyReader(8 * MB, budget)
        part: Message = {"type": "http.request", "body": bytes(1000), "more_body": True}
        for receive in (sender(part), sender(), sender(*chunks(bytes(3 * MB), MB), then={"type": "http.disconnect"})):
            with pytest.raises(Cancelled):
                await reader.read(lambda receive=receive: _never_last(receive), announced)  # type: ignore[misc]
        assert budget.used_bytes == 0

    before = open_files()
    run(main())
    assert open_files() == before


@pytest.mark.parametrize("read", [small_json, feedback_body])
def test_who_leaves_a_quiet_endpoint_is_cancelled_too(read: Callable[[Request], Awaitable[object]]) -> None:
    async def main() -> None:
        begun: Message = {"type": "http.request", "body": b"{", "more_body": True}
        with pytest.raises(Cancelled):
            await read(Request({"type": "http"}, sender(begun)))

    run(main())


async def _never_last(receive: Callable[[], Awaitable[Message]]) -> Message:
    return {**await receive(), "more_body": True}


@pytest.mark.parametrize("value", ["", "-1", "1e3", "²", "9" * 40, b"\xff"])
def test_a_content_length_that_is_no_number(value: str | bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_content_length(value)
    assert parse_content_length(b"12") == 12 and parse_content_length(None) is None


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_bodies_wait_for_their_turn_in_order() -> None:
    async def main() -> None:
        budget, order = BodyBudget(100, wait_s=60), []
        first = await budget.reserve(80)

        async def take(name: str, count: int) -> None:
            grant = await budget.reserve(count)
            order.append(name)
            await asyncio.sleep(0)
            grant.close()

        tasks = [asyncio.create_task(take(name, count)) for name, count in (("large", 90), ("small", 10), ("other", 50))]
        await asyncio.sleep(0.05)
        assert order == []
        first.close()
        await asyncio.gather(*tasks)
        assert order == ["large", "small", "other"] and budget.used_bytes == 0

    run(main())


def test_who_waits_too_long_or_leaves_is_out_of_the_queue() -> None:
    async def main() -> None:
        budget = BodyBudget(100, wait_s=0.05)
        first = await budget.reserve(80)
        with pytest.raises(NotReady, match="budget"):
            await budget.reserve(50)
        patient = BodyBudget(100, wait_s=60)
        held = await patient.reserve(80)
        leaver = asyncio.create_task(patient.reserve(50))
        stayer = asyncio.create_task(patient.reserve(20))
        await asyncio.sleep(0.02)
        leaver.cancel()
        grant = await stayer
        assert patient.used_bytes == 100
        for one in (first, held, grant):
            one.close()
        assert budget.used_bytes == patient.used_bytes == 0

    run(main())


def test_a_turn_that_comes_as_its_waiter_leaves_is_given_back() -> None:
    async def main() -> None:
        budget = BodyBudget(100, wait_s=60)
        held = await budget.reserve(80)
        leaver = asyncio.create_task(budget.reserve(50))
        await asyncio.sleep(0.02)
        held.close()
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert budget.used_bytes == 0

    run(main())


def test_a_growing_body_never_waits_and_a_lost_one_gives_back() -> None:
    budget = BodyBudget(100)
    grant = Grant(budget)
    grant.grow(60)
    with pytest.raises(NotReady):
        grant.grow(60)
    grant.close()
    grant.close()
    assert budget.used_bytes == 0
    lost = Grant(budget)
    lost.grow(50)
    del lost
    gc.collect()
    assert budget.used_bytes == 0


def test_large_bodies_take_turns_in_order() -> None:
    async def main() -> None:
        pacer, order = Pacer(2), []

        async def take(name: int) -> None:
            for _ in range(2):
                await pacer.turn()
                order.append(name)

        tasks = [asyncio.create_task(take(name)) for name in range(5)]
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 2, 4, 0, 1, 2, 4]

    run(main())


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "size", "header_length", "place"),
    [
        (b"{}", 60_000, None, Place.HERE),
        (b"{}", 70_000, None, Place.THREAD),
        (b"{}", 2 * MB, None, Place.HELPER),
        (b'{"datatype":"FP32"}', 5 * MB, 19, Place.HERE),
        (b'{"datatype":"BYTES"}', 100_000, 20, Place.THREAD),
        (b'{"datatype":"BOOL"}', 5 * MB, 19, Place.HELPER),
        (rb'{"datatype":"\u0042YTES"}', 100_000, 25, Place.THREAD),
        (b"", 5 * MB, 0, Place.THREAD),
        (b"{}", 5 * MB, 2 * MB, Place.HELPER),
        (b"{}", 100_000, 10**9, Place.THREAD),
    ],
)
def test_the_place_follows_from_what_costs(head: bytes, size: int, header_length: int | None, place: Place) -> None:
    assert parse_place(head.ljust(size, b"\0"), header_length) is place


@pytest.mark.parametrize("count", [10, 20_000, 200_000])
@pytest.mark.parametrize("in_memfd", [True, False])
def test_a_body_reads_the_same_everywhere(count: int, in_memfd: bool) -> None:
    async def main() -> None:
        async with offload() as work:
            text, array = large_json(count)
            memory = Memfd.new([text]) if in_memfd else None
            with Body(memory.map() if memory else text, memory) as body:
                parsed = await work.parse(body, None, None, 5.0)
            assert work.helpers.started == (1 if count == 200_000 else 0)
            assert bytes(parsed.request.inputs[0].data) == array.tobytes()
            assert (parsed.id, parsed.request.priority, parsed.request.received_at) == ("7", 3, 5.0)
            assert parsed.request.inputs[0].shape == (count,)

    before = open_files()
    run(main())
    assert open_files() <= before  # the fork server's own


@pytest.mark.parametrize("count", [40_000, 600_000])
def test_what_json_became_counts_against_the_budget_too(count: int) -> None:
    """Two bytes of text become eight: a budget that counts the text alone holds a fifth of what is in memory."""
    text = b'{"inputs":[{"name":"x","datatype":"FP64","shape":[%d],"data":[1%s]}]}' % (count, b",1" * (count - 1))

    async def main() -> None:
        async with offload(budget_bytes=8 * count + 1000) as work:
            with Body(text) as body:
                await work.parse(body, None)
                assert work.budget.used_bytes == 8 * count
                with Body(text) as another, pytest.raises(NotReady, match="budget"):
                    await work.parse(another, None)
            assert work.budget.used_bytes == 0

    run(main())


def test_json_parts_beside_binary_ones_count_and_binary_ones_only_once() -> None:
    count = 40_000
    head = b'{"inputs":[{"name":"x","datatype":"FP64","shape":[%d],"data":[1%s]},' % (count, b",1" * (count - 1))
    head += b'{"name":"y","datatype":"UINT8","shape":[1000],"parameters":{"binary_data_size":1000}}]}'

    async def main() -> None:
        async with offload() as work:
            with Body(head + bytes(1000)) as body:
                parsed = await work.parse(body, len(head))
                assert [len(tensor.data) for tensor in parsed.request.inputs][1] == 1000
                assert work.budget.used_bytes == 8 * count
            room = work.room(1 << 20)
            assert work.budget.used_bytes == 1 << 20 and work.room(1000) is not None
            room.close()
            assert work.budget.used_bytes == 0

    run(main())


def test_errors_come_back_from_a_helper_as_they_are() -> None:
    async def main() -> None:
        async with offload() as work:
            text, _ = large_json(200_000)
            with pytest.raises(InvalidRequest, match="not JSON"):
                await work.parse(Body(text[:-1]), None)
            with pytest.raises(InvalidRequest, match=r"'x'.*element 0"):
                await work.parse(Body(text.replace(b'"data":[', b'"data":["7",').replace(b"[200000]", b"[200001]")), None)
            assert work.helpers.started == 1

    run(main())


@pytest.mark.parametrize("count", [10, 100_000])
def test_a_reply_is_written_the_same_everywhere(count: int) -> None:
    async def main() -> None:
        async with offload() as work:
            array = np.random.default_rng(1).normal(size=count).astype("f4")
            array[0] = np.nan
            result = InferenceResult(
                [Tensor("y", "FP32", (count,), array.tobytes()), Tensor("z", "INT8", (2,), b"\1\2")], "m", "1", 1, 0, 0, 1
            )
            text = b'{"id":"a","inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}],"outputs":[{"name":"z","parameters":{"binary_data":true}},{"name":"y"}]}'
            parsed = parse_infer(text, None)
            here = encode_response(result, parsed)
            there = await work.encode(result, parsed)
            assert b"".join(there.parts) == b"".join(here.parts)
            assert (there.headers, there.size, there.non_finite) == (here.headers, here.size, 1)
            assert isinstance(result.outputs[0].data, bytes)
            assert work.helpers.started == (1 if count > 10 else 0)
            if count > 10:
                packed = await work.compress(there, "gzip")
                assert gzip.decompress(b"".join(packed.parts)) == b"".join(here.parts)

    run(main())


def test_parcels_keep_what_they_carry() -> None:
    result = InferenceResult([Tensor("y", "UINT8", (3,), b"abc"), Tensor("e", "UINT8", (0,), b"")], "m", "1", 1, 0, 0, 1)
    parsed = ParsedRequest(InferenceRequest([Tensor("x", "UINT8", (1,), b"left out")]), "i", None, True)
    back, form = open_parcel(encode_parcel(result, parsed))
    assert [bytes(tensor.data) for tensor in back.outputs] == [b"abc", b""] and form.id == "i" and form.request.inputs == []
    assert open_parcel(pack_parcel({"a": 1})) == {"a": 1}


# ---- unpacking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 3 * MB])
def test_what_is_unpacked_counts_against_the_budget(size: int) -> None:
    async def main() -> None:
        async with offload(body_limit_bytes=4 * MB, budget_bytes=7 * MB) as work:
            data = os.urandom(size)
            packed = gzip.compress(data)
            headers = {b"content-length": b"%d" % len(packed), b"content-encoding": b"gzip"}
            async with work.body(headers, sender(*chunks(packed, 100_000))) as body:
                assert bytes(body.data) == packed
                assert await work.decompress(body, "gzip") is body
                assert bytes(body.data) == data and work.budget.used_bytes >= size
            assert work.budget.used_bytes == 0
            with await work.read_unpacked(headers, sender(*chunks(packed, 100_000))) as body:
                assert bytes(body.data) == data
            assert work.budget.used_bytes == 0

    before = open_files()
    run(main())
    assert open_files() <= before


def test_a_bomb_is_refused_by_limit_or_budget() -> None:
    bomb = gzip.compress(bytes(200 * MB))

    async def main() -> None:
        async with offload(body_limit_bytes=4 * MB) as work:
            with pytest.raises(PayloadTooLarge):
                await work.decompress(Body(bomb), "gzip")
            assert work.budget.used_bytes == 0
        async with offload(body_limit_bytes=300 * MB, budget_bytes=20 * MB) as work:
            with pytest.raises(NotReady):
                await work.decompress(Body(bomb), "gzip")
            assert work.budget.used_bytes == 0

    run(main())


def test_who_leaves_while_a_body_is_unpacked_leaves_nothing() -> None:
    async def main() -> None:
        async with offload(workers=1) as work:
            packed = gzip.compress(os.urandom(100_000) + bytes(60 * MB))
            task = asyncio.create_task(work.decompress(Body(packed), "gzip"))
            while not work.helpers.started:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert bytes((await work.decompress(Body(gzip.compress(os.urandom(90_000))), "gzip")).data[:0]) == b""
            assert work.helpers.started == 1

    before = open_files()
    run(main())
    assert open_files() <= before


def test_large_bodies_are_freed_by_a_thread() -> None:
    async def main() -> None:
        async with offload() as work:
            text, _ = large_json(500_000)
            assert len(text) > 4 * MB
            before = mapped_bytes()
            for _ in range(3):
                async with work.body({b"content-length": b"%d" % len(text)}, sender(*chunks(text, MB))) as body:
                    parsed = await work.parse(body, None)
                    assert mapped_bytes() >= before + len(text)
                assert work.budget.used_bytes == 0
                assert len(bytes(parsed.request.inputs[0].data)) == 2_000_000
            del parsed
            deadline = time.monotonic() + 20
            while mapped_bytes() > before:
                assert time.monotonic() < deadline, mapped_bytes()
                await asyncio.sleep(0.05)

    before = open_files()
    run(main())
    assert open_files() <= before


def mapped_bytes() -> int:
    """Of memfds in this process."""
    total = 0
    with open("/proc/self/maps") as lines:
        for line in lines:
            if "memfd:hone" in line:
                first, last = line.split()[0].split("-")
                total += int(last, 16) - int(first, 16)
    return total


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
