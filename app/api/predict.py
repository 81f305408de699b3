"""POST /models/{model}[/versions/{version}]/predict: the friendly door. Read, encode, check, run, answer with labels.

It translates and calls: bodies are app.api.friendly's, what a model takes its Processor's, the exchange around it app.api.exchange's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from time import monotonic, perf_counter
from typing import Final, ParamSpec, Protocol, TypeVar

from app.api.bodies import Body
from app.api.exchange import Exchange, until_done_or_gone
from app.api.friendly import Encoded, is_quick, read_input, write_answer
from app.api.wire import Reply, validate
from app.catalog.processing import Processor
from app.domain import Buffer, InferenceRequest, InferenceResult, Signature

P = ParamSpec("P")
T = TypeVar("T")
PATHS: Final = ("/models/{model}/predict", "/models/{model}/versions/{version}/predict")
INLINE_OUTPUT_BYTES: Final = 32 << 10
"""Larger outputs are written off the event loop."""

ReadBody = Callable[[Exchange], Awaitable[Body]]


class Service(Protocol):
    """What the door needs of the data plane (app.serving.service)."""

    async def infer(
        self, model: str, version: str | None, request: InferenceRequest, headers: Mapping[bytes, bytes] | None = None
    ) -> InferenceResult: ...
    def processor(self, model: str) -> Processor: ...
    def admit(self, model: str, version: str | None) -> Signature: ...


class Room(Protocol):
    def close(self) -> None: ...


class Threads(Protocol):
    """What it needs of app.api.offload: blocking work in a bounded pool, and room in the budget of bodies."""

    def room(self, count: int) -> Room: ...
    async def run_in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...


class Predict:
    """The handler of one exchange. `read_body` gives its whole body, unpacked, within the server's limits."""

    def __init__(self, service: Service, threads: Threads, read_body: ReadBody) -> None:
        self._service, self._threads, self._read_body = service, threads, read_body

    async def __call__(self, exchange: Exchange) -> Reply:
        received_at = monotonic()
        service, model, version = self._service, exchange.model, exchange.version
        processor, signature = service.processor(model), service.admit(model, version)
        with await self._read_body(exchange) as body:
            encoded = await self._encode(body.data, exchange, processor, signature)
        request = InferenceRequest(encoded.tensors, exchange.id, processor.output_names, caller=exchange.caller, received_at=received_at)
        exchange.rows = validate(request, signature)
        exchange.decoded = perf_counter()
        request.decode_s = exchange.decoded - exchange.started
        room = self._threads.room(sum(len(tensor.data) for tensor in encoded.tensors))
        try:
            exchange.result = result = await until_done_or_gone(exchange, service.infer(model, version, request, exchange.headers))
        finally:
            room.close()
        if sum(len(tensor.data) for tensor in result.outputs) <= INLINE_OUTPUT_BYTES:
            return write_answer(processor, result, encoded.single)
        return await self._threads.run_in_thread(write_answer, processor, result, encoded.single)

    async def _encode(self, body: Buffer, exchange: Exchange, processor: Processor, signature: Signature) -> Encoded:
        content_type = exchange.headers.get(b"content-type", b"").decode("latin-1")
        if is_quick(body, content_type, processor):
            return read_input(body, content_type, processor, signature)
        return await self._threads.run_in_thread(read_input, body, content_type, processor, signature)
