"""POST /v2/models/{model}[/versions/{version}]/infer: the hot door. Read, parse, check, run, write.

No request model, no dependency injection: `Door` gives it one exchange, and the codec (app.api.wire) does the rest.
"""

from __future__ import annotations

from time import monotonic, perf_counter

from app.api.exchange import Exchange, until_done_or_gone
from app.api.offload import Offload
from app.api.wire import Reply, check_reply_form, choose_encoding, parse_content_encoding, parse_header_length, validate
from app.catalog.tensors import all_finite
from app.serving.service import InferenceService


class Infer:
    """The handler of one exchange. `offload` reads bodies within bounds and does long work off the event loop."""

    def __init__(self, service: InferenceService, offload: Offload) -> None:
        self._service, self._offload = service, offload

    async def __call__(self, exchange: Exchange) -> Reply:
        service, offload, headers = self._service, self._offload, exchange.headers
        received_at = monotonic()
        service.admit(exchange.model, exchange.version)
        header_length = parse_header_length(headers.get(b"inference-header-content-length"))
        encoding = parse_content_encoding(headers.get(b"content-encoding"))
        async with offload.body(headers, exchange.receive) as body:
            if encoding is not None:
                body = await offload.decompress(body, encoding)
            loaded = service.loaded(exchange.model, exchange.version, headers)
            signature = loaded.admitted.signature
            parsed = await offload.parse(body, header_length, signature, received_at)
            request = parsed.request
            exchange.rows = validate(request, signature)
            check_reply_form(parsed, signature)
            request.request_id, request.caller = exchange.id, exchange.caller
            exchange.decoded = perf_counter()
            exchange.result = await until_done_or_gone(exchange, service.run(loaded, request, exchange.version is not None))
        reply = await offload.encode(exchange.result, parsed)
        if reply.non_finite:
            exchange.poisoned = not await offload.run_in_thread(all_finite, request.inputs)
        accepted = headers.get(b"accept-encoding")
        coding = choose_encoding(accepted) if accepted else None
        return reply if coding is None else await offload.compress(reply, coding)
