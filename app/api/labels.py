"""POST /models/{model}/feedback: true labels of answers given before, by request id, with a token of their own."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.api.auth import Guard
from app.api.bodies import parts_of
from app.api.errors import problem_text
from app.errors import Conflict, InvalidRequest, NotFound, PayloadTooLarge
from app.serving.service import InferenceService

MOST_BYTES = 1 << 20
_KINDS_OF_LABEL = {"constrained-str", "int"}
"""What the validator calls the two forms of a label, in the place of an error."""


class TrueLabel(BaseModel):
    """One answer's true class: its number or its name."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: Annotated[str, Field(min_length=1, max_length=128)]
    label: Annotated[str, Field(max_length=1000)] | int


class FeedbackBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    labels: Annotated[list[TrueLabel], Field(min_length=1, max_length=10_000)]


def feedback_route(service: InferenceService, guard: Guard) -> Route:
    async def feedback(request: Request) -> Response:
        guard.may_label(request)
        slot = service.slot(request.path_params["model"])
        given = await _body(request)
        assert service.feedback is not None
        names = slot.config.postprocess.labels
        known = names if isinstance(names, tuple) else ()
        right, refused = 0, []
        for one in given.labels:
            try:
                right += service.feedback.label(slot.name, one.id, one.label, known)
            except (NotFound, Conflict, InvalidRequest) as error:
                refused.append({"id": one.id, "error": str(error)})
        told = {"model": slot.name, "taken": len(given.labels) - len(refused), "right": right, "refused": refused[:100]}
        return Response(orjson.dumps(told), media_type="application/json")

    return Route("/models/{model}/feedback", feedback, methods=["POST"])


async def _body(request: Request) -> FeedbackBody:
    """The checked body, no larger than it may be."""
    parts, size = [], 0
    async for part in parts_of(request):
        size += len(part)
        if size > MOST_BYTES:
            raise PayloadTooLarge(f"the body has more than {MOST_BYTES} bytes; send labels in smaller portions")
        parts.append(part)
    try:
        return FeedbackBody.model_validate_json(b"".join(parts))
    except ValidationError as error:
        raise InvalidRequest(f'{_told(error)}; send {{"labels": [{{"id": REQUEST_ID, "label": CLASS}}]}}') from None


def _told(error: ValidationError) -> str:
    first: dict[str, Any] = dict(error.errors(include_url=False)[0])
    if _KINDS_OF_LABEL & {*first["loc"]}:
        first |= {"loc": first["loc"][:-1], "msg": "it should be a class's number, or its name of at most 1000 characters"}
    return problem_text(first)
