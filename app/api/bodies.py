"""Request bodies in memory: read within limits, counted against one budget, large ones in a memfd that another process can be handed.

Knows ASGI's receive; knows nothing of what a body says.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from starlette.requests import ClientDisconnect, Request

from app.api.memfd import Memfd
from app.domain import Buffer
from app.errors import Cancelled, InvalidRequest, NotReady, PayloadTooLarge

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]

Free: TypeAlias = Callable[[list[object]], None]
"""Drops the objects in a list where it does not hurt."""

FREED_ASIDE_BYTES: Final = 4 << 20
COUNTED_BYTES: Final = 64 << 10
"""Bodies up to here are not counted: the bound on connections bounds them."""
SHARED_BYTES: Final = 1 << 20
_STEP: Final = 1 << 20


class BodyBudget:
    """How many bytes of bodies may be in memory at once, over all connections."""

    def __init__(self, limit_bytes: int, wait_s: float = 10.0) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def reserve(self, count: int) -> Grant:
        """`count` bytes, in turn. Raises PayloadTooLarge if they never fit, NotReady if they do not in time."""
        if count > self.limit_bytes:
            raise PayloadTooLarge(
                f"the body has {count} bytes; all bodies together may have {self.limit_bytes}: send less at once, or raise that limit"
            )
        if self._waiters or not self.try_take(count):
            await self._wait(count)
        return Grant(self, count)

    def try_take(self, count: int) -> bool:
        """For Grant alone."""
        with self._lock:
            if self.used_bytes + count > self.limit_bytes:
                return False
            self.used_bytes += count
            return True

    def give(self, count: int) -> None:
        """For Grant alone; from any thread, as garbage is collected in any. Who waits is served by `serve_waiters`."""
        with self._lock:
            self.used_bytes -= count

    def serve_waiters(self) -> None:
        while self._waiters and (self._waiters[0][1].done() or self.try_take(self._waiters[0][0])):
            _, turn = self._waiters.popleft()
            if not turn.done():
                turn.set_result(None)

    def refusal(self) -> NotReady:
        return NotReady(f"bodies in flight fill their budget of {self.limit_bytes} bytes; try again in a moment, or raise the budget")

    async def _wait(self, count: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((count, turn))
        try:
            async with asyncio.timeout(self._wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # our turn came as we gave up
                self.give(count)
            turn.cancel()
            self.serve_waiters()
            if isinstance(error, TimeoutError):
                raise self.refusal() from None
            raise


class Grant:
    """One body's share of the budget; given back by `close`, or when nobody holds it any more."""

    __slots__ = ("_budget", "_count")

    def __init__(self, budget: BodyBudget, count: int = 0) -> None:
        self._budget = budget
        self._count = count

    def grow(self, count: int) -> None:
        """Take more for a body that is half there. Never waits: those that wait while holding could wait for each other."""
        if not self._budget.try_take(count):
            raise self._budget.refusal()
        self._count += count

    def close(self) -> None:
        self.__del__()
        self._budget.serve_waiters()

    def __del__(self) -> None:
        count, self._count = self._count, 0
        if count:
            self._budget.give(count)


class Pacer:
    """Lets large bodies that arrive at once take turns, a few in each round of the event loop.

    A body's connection is not read before its turn (its reader does not call `receive`), so a round stays short however many there are.
    """

    def __init__(self, each_round: int = 4) -> None:
        self._each_round = each_round
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._called = False

    async def turn(self) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        if not self._called:
            self._called = True
            loop.call_soon(self._round, loop)
        await turn

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(self._each_round, len(self._waiting))):
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
        self._called = bool(self._waiting)
        if self._called:
            loop.call_soon(self._round, loop)


class Body:
    """One body. `data` stays valid as long as anyone holds it; `close` (once the request is answered) gives back its share of the budget.

    `free` is given what is large: unmapping a hundred megabytes takes the kernel longer than the event loop has.
    """

    __slots__ = ("_free", "_grant", "_read_from_it", "data", "memory")

    def __init__(self, data: Buffer, memory: Memfd | None = None, grant: Grant | None = None, free: Free | None = None) -> None:
        self.data = data
        self.memory = memory
        self._grant = grant
        self._free = free
        self._read_from_it: object = None

    def close(self) -> None:
        self.become(b"", None)

    def become(self, data: Buffer, grant: Grant | None, memory: Memfd | None = None) -> None:
        """Give up what it was, for `data`."""
        if self._free is not None and self.memory is not None and len(self.data) > FREED_ASIDE_BYTES:
            self._free([self.data, self.memory, self._read_from_it])
        elif self.memory is not None:
            self.memory.close()
        if self._grant is not None:
            self._grant.close()
        self.data, self.memory, self._grant, self._read_from_it = data, memory, grant, None

    def count_too(self, budget: BodyBudget, count: int) -> None:
        """Memory beside the body that is as long in use: what it was parsed into. Raises NotReady where the budget has no room."""
        if self._grant is None:
            self._grant = Grant(budget)
        self._grant.grow(count)

    def free_too(self, read_from_it: object) -> None:
        """Something else that is as large and as long in use as this body."""
        self._read_from_it = read_from_it

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BodyReader:
    """Reads bodies of at most `limit_bytes`, all of them within `budget`."""

    def __init__(self, limit_bytes: int, budget: BodyBudget, free: Free | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._free = free
        self.budget = budget
        self._pacer = Pacer()

    async def read(self, receive: Receive, content_length: int | None = None) -> Body:
        """The whole body. Raises PayloadTooLarge (by Content-Length before anything is read), NotReady, or Cancelled if the client leaves."""
        grant = None
        if content_length is not None and content_length > COUNTED_BYTES:
            if content_length > self.limit_bytes:
                raise self._too_large(f"has {content_length}")
            grant = await self.budget.reserve(content_length)
        try:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                data = message.get("body", b"")
                if len(data) > self.limit_bytes:
                    raise self._too_large(f"has {len(data)}")
                return Body(data, None, grant)
            grant = grant or Grant(self.budget)
            return await self._read_on(message, receive, content_length or 0, grant)
        except BaseException:
            if grant is not None:
                grant.close()
            raise

    async def _read_on(self, message: Message, receive: Receive, expected: int, grant: Grant) -> Body:
        parts: list[Buffer] = []
        memory = Memfd.new() if expected > SHARED_BYTES else None
        size, counted = 0, max(expected, COUNTED_BYTES)
        while message["type"] == "http.request":
            chunk: Buffer = message.get("body", b"")
            size += len(chunk)
            if size > self.limit_bytes:
                raise self._too_large(f"has more than {self.limit_bytes}")
            if size > counted:
                step = max(size - counted, _STEP)
                grant.grow(step)
                counted += step
            if memory is None and size > SHARED_BYTES:
                memory, parts = Memfd.new(parts), []
            if memory is not None:
                memory.write(chunk)
            else:
                parts.append(chunk)
            if not message.get("more_body"):
                return Body(b"".join(parts) if memory is None else memory.map(), memory, grant, self._free)
            await self._pacer.turn()
            message = await receive()
        raise Cancelled(f"the client left after {size} bytes of its body")

    def _too_large(self, what: str) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the body {what} bytes; the limit is {self.limit_bytes}: send less at once, or raise the limit on the server"
        )


async def parts_of(request: Request) -> AsyncIterator[bytes]:
    """The body of a call that is no inference, as it comes. Raises Cancelled if the client leaves."""
    try:
        async for part in request.stream():
            yield part
    except ClientDisconnect:
        raise Cancelled("the client left before its body was whole") from None


def parse_content_length(value: bytes | str | None) -> int | None:
    """Content-Length as a number; None where it did not come."""
    if value is None:
        return None
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest(f"Content-Length is {text[:60]!r}; it is the body's length in bytes")
    return int(text)
