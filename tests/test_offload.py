"""Where work on bodies is done: the same everywhere, counted against the budget, and off the event loop."""

from __future__ import annotations

import asyncio
import gzip
import os
import time

import numpy as np
import pytest

from app.api.bodies import Body
from app.api.memfd import Memfd
from app.api.offload import Place, parse_place
from app.api.parcels import encode_parcel, open_parcel, pack_parcel
from app.api.wire import ParsedRequest, encode_response, parse_infer
from app.domain import InferenceRequest, InferenceResult, Tensor
from app.errors import InvalidRequest, NotReady, PayloadTooLarge
from tests.body_senders import MB, chunks, large_json, offload, open_files, run, sender

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
