"""Where work on bodies is done, so that the event loop always answers: at once, in a thread, or in a helper process.

A thread lets the loop run, but only as soon as the thread lets go of the interpreter's lock, and the kernel may put it to sleep before that.
So what takes long goes to a process, and threads have what is short or not ours to move (images).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Final, ParamSpec, TypeVar

from app.api.bodies import COUNTED_BYTES, Body, BodyBudget, BodyReader, Grant, Receive, parse_content_length
from app.api.helpers import HelperPool, HelperUnavailable
from app.api.memfd import Memfd
from app.api.parcels import encode_parcel, reply_parcel
from app.api.wire import ParsedRequest, Reply, compress, decompress, encode_response, json_raw_bytes, parse_content_encoding, parse_infer
from app.domain import Buffer, InferenceResult, Signature
from app.errors import QueueFull
from app.serving.shm import size_of

P = ParamSpec("P")
T = TypeVar("T")

THREAD_BYTES: Final = 64 << 10
HELPER_BYTES: Final = 1 << 20
HELPER_OUTPUT_BYTES: Final = 64 << 10
"""Raw bytes of outputs that are wanted as JSON: about a quarter of the text they become."""
_UNPACKED_BY_THREAD: Final = 16 << 10
"""Packed bytes; they may become a thousand times as many."""
_COMPRESSED_HERE: Final = 16 << 10
_FREED_AFTER_S: Final = 0.2


class Place(Enum):
    HERE = "here"
    THREAD = "thread"
    HELPER = "helper"


def parse_place(data: Buffer, header_length: int | None) -> Place:
    """Where to read this body. What costs is JSON, and elements that are looked at one by one (BYTES, BOOL); other tensors are slices."""
    size = len(data)
    if size <= THREAD_BYTES:
        return Place.HERE
    json_size = size if header_length is None else min(header_length, size)
    if json_size > HELPER_BYTES:
        return Place.HELPER
    if json_size > THREAD_BYTES or json_size == 0:
        return Place.THREAD
    head = bytes(data[:json_size])
    if b'"BYTES"' in head or b'"BOOL"' in head or b"\\" in head:  # escaped, a datatype reads otherwise
        return Place.HELPER if size > HELPER_BYTES else Place.THREAD
    return Place.HERE


class Offload:
    """Reads bodies within limits and does long work on them in threads and helper processes. Starts nothing until needed; `close` ends all.

    `workers`: threads and helpers each; 0: one per core.
    """

    def __init__(
        self,
        body_limit_bytes: int = 128 << 20,
        budget_bytes: int = 4 << 30,
        budget_wait_s: float = 30.0,
        workers: int = 0,
        queue_limit: int = 256,
    ) -> None:
        cores = workers or len(os.sched_getaffinity(0))
        self.budget = BodyBudget(budget_bytes, budget_wait_s)
        self.helpers = HelperPool(cores, queue_limit)
        self._reader = BodyReader(body_limit_bytes, self.budget, self._free)
        self._threads = ThreadPoolExecutor(max(2, cores), thread_name_prefix="hone-offload")
        self._thread_jobs = 0
        self._closed = False
        self._queue_limit = queue_limit

    def body(self, headers: Mapping[bytes, bytes], receive: Receive) -> BodyInUse:
        """`async with offload.body(headers, receive) as body:` the body as it came, given back at the end of the block."""
        return BodyInUse(self._reader, headers, receive)

    async def read_unpacked(self, headers: Mapping[bytes, bytes], receive: Receive) -> Body:
        """The whole body, unpacked; the caller closes it."""
        encoding = parse_content_encoding(headers.get(b"content-encoding"))
        body = await self._reader.read(receive, parse_content_length(headers.get(b"content-length")))
        return body if encoding is None else await self.decompress(body, encoding)

    async def run_in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work that lets go of the interpreter's lock. Raises QueueFull where too much of it waits."""
        if self._thread_jobs >= self._queue_limit:
            raise QueueFull(f"{self._thread_jobs} bodies are being unpacked or decoded, the limit; try again in a moment", 1.0)
        self._thread_jobs += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))
        future.add_done_callback(self._thread_job_done)
        return await asyncio.shield(future)

    def _thread_job_done(self, future: asyncio.Future[T]) -> None:
        self._thread_jobs -= 1
        if not future.cancelled():
            future.exception()

    async def decompress(self, body: Body, encoding: str) -> Body:
        """Unpack `body`, in place; what it has become counts against the budget too."""
        try:
            if len(body.data) > _UNPACKED_BY_THREAD:
                try:
                    await self._decompress_in_helper(body, encoding)
                    return body
                except HelperUnavailable:
                    pass
            data = await self.run_in_thread(decompress, body.data, encoding, self._reader.limit_bytes)
            body.become(data, self._counted(data))
        except BaseException:
            body.close()
            raise
        return body

    async def _decompress_in_helper(self, body: Body, encoding: str) -> None:
        memory = await self.helpers.unpack(await self._shared(body), encoding, self._reader.limit_bytes)
        data = memory.map()
        body.become(data, self._counted(data), memory)

    def _counted(self, data: Buffer) -> Grant:
        """What was unpacked is counted once it is there: no more than one body per worker is ahead of the budget."""
        grant = Grant(self.budget)
        grant.grow(len(data))
        return grant

    async def _shared(self, body: Body) -> Memfd:
        return body.memory if body.memory is not None else await self.run_in_thread(Memfd.new, [body.data])

    async def parse(
        self, body: Body, header_length: int | None, signature: Signature | None = None, received_at: float | None = None
    ) -> ParsedRequest:
        """`wire.parse_infer` on a body, wherever that is best done."""
        data = body.data
        place = parse_place(data, header_length)
        if place is Place.HERE:
            return parse_infer(data, header_length, signature, received_at)
        parsed = await self._parse_aside(body, place, header_length, signature, received_at)
        binary = 0 if header_length is None else len(data) - header_length
        own = sum(size_of(tensor.data) for tensor in parsed.request.inputs) - binary
        if own > 0:  # tensors given as JSON are memory of their own, and may be several times as large as their text
            body.count_too(self.budget, own)
        return parsed

    def room(self, count: int) -> Grant:
        """A share of the budget for what a body has become, until it is closed. Raises NotReady where there is none."""
        grant = Grant(self.budget)
        if count > COUNTED_BYTES:
            grant.grow(count)
        return grant

    async def _parse_aside(
        self, body: Body, place: Place, header_length: int | None, signature: Signature | None, received_at: float | None
    ) -> ParsedRequest:
        if place is Place.HELPER:
            try:
                parsed = await self.helpers.parse(await self._shared(body), header_length, received_at)
                body.free_too(parsed.request.inputs[0].data)
                return parsed
            except HelperUnavailable:
                pass
        return await self.run_in_thread(parse_infer, body.data, header_length, signature, received_at)

    async def encode(self, result: InferenceResult, parsed: ParsedRequest) -> Reply:
        """`wire.encode_response`, wherever that is best done."""
        if json_raw_bytes(result, parsed) <= HELPER_OUTPUT_BYTES:
            return encode_response(result, parsed)
        try:
            return await self.helpers.encode(await self.run_in_thread(encode_parcel, result, parsed))
        except HelperUnavailable:
            return await self.run_in_thread(encode_response, result, parsed)

    async def compress(self, reply: Reply, encoding: str) -> Reply:
        """`wire.compress`, wherever that is best done."""
        if reply.size <= _COMPRESSED_HERE:
            return compress(reply, encoding)
        if reply.size > HELPER_BYTES:
            try:
                return await self.helpers.compress(await self.run_in_thread(reply_parcel, reply), encoding)
            except HelperUnavailable:
                pass
        return await self.run_in_thread(compress, reply, encoding)

    def _free(self, holders: list[object]) -> None:
        """Let a thread drop what is in `holders`, a moment later: then those who still use it have mostly gone, and the thread unmaps it."""
        asyncio.get_running_loop().call_later(_FREED_AFTER_S, self._free_now, holders)

    def _free_now(self, holders: list[object]) -> None:
        if not self._closed:
            self._threads.submit(holders.clear)

    async def close(self) -> None:
        self._closed = True
        await self.helpers.close()
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)


class BodyInUse:
    """The block in which a body is used."""

    __slots__ = ("_body", "_headers", "_reader", "_receive")

    def __init__(self, reader: BodyReader, headers: Mapping[bytes, bytes], receive: Receive) -> None:
        self._reader, self._headers, self._receive = reader, headers, receive
        self._body: Body | None = None

    async def __aenter__(self) -> Body:
        self._body = await self._reader.read(self._receive, parse_content_length(self._headers.get(b"content-length")))
        return self._body

    async def __aexit__(self, *_: object) -> None:
        if self._body is not None:
            self._body.close()
