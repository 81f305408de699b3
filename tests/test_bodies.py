"""Bodies as they come: whole and counted, refused over the limit, in turn within the budget, and nothing is left of who leaves."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable

import pytest
from starlette.requests import Request

from app.api.bodies import SHARED_BYTES, BodyBudget, BodyReader, Grant, Message, Pacer, parse_content_length
from app.api.labels import _body as feedback_body
from app.api.oip import small_json
from app.errors import Cancelled, InvalidRequest, NotReady, PayloadTooLarge
from tests.body_senders import MB, chunks, open_files, run, sender

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
