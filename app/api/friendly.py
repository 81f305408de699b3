"""The friendly door's bodies: an image, a text or plain JSON becomes the model's inputs; its outputs become the JSON of the answer.

Pure and blocking; what a model takes and how its answers read is the Processor's. Knows content types, nothing of HTTP frameworks.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson

from app.api.json_tensors import tensors_of
from app.api.multipart import parse_multipart
from app.api.wire import Reply
from app.api.wire.tensors import show
from app.catalog.images import image_format
from app.catalog.processing import Processor
from app.domain import Buffer, InferenceResult, Signature, Tensor
from app.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

PIECE_ELEMENTS: Final = 65536
INLINE_BYTES: Final = 65536
"""Larger JSON, and every image and text, is decoded off the event loop."""
MAX_JSON_BYTES: Final = 4 << 20
MAX_IMAGE_JSON_BYTES: Final = 32 << 20
"""Reading JSON holds the interpreter's lock, so that everything waits: tensors of this size have better forms. One long string is read fast."""
NO_JSON_FORM: Final = "NaN and infinity have no JSON form; POST them to /v2/models/{model}/infer as binary"
CHARSETS: Final = {"utf-8": "utf-8", "utf8": "utf-8", "us-ascii": "ascii", "iso-8859-1": "latin-1", "latin-1": "latin-1"}
ANY_BODY: Final = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})
"""Types that say nothing (curl --data-binary sends the last): the first bytes decide."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The model's inputs, and whether they are one row that came without a batch: then one row is answered, not a list of one."""

    tensors: list[Tensor]
    single: bool


def is_quick(body: Buffer, content_type: str, processor: Processor) -> bool:
    """Whether `read_input` may run on the event loop: small JSON that holds neither image nor text."""
    kind, _ = _media_type(content_type)
    return len(body) <= INLINE_BYTES and processor.image is None and processor.text is None and kind != "multipart/form-data"


def read_input(data: Buffer, content_type: str, processor: Processor, signature: Signature) -> Encoded:
    """Raises InvalidRequest, UnsupportedMediaType or PayloadTooLarge, whatever the bytes."""
    body = bytes(data)
    kind, parameters = _media_type(content_type)
    if kind == "multipart/form-data":
        body, kind, parameters = _form(body, content_type)
    if not body:
        raise InvalidRequest(f"the body is empty; send {_takes(processor)}")
    form = _form_of(kind, body)
    if form == "image":
        return Encoded(processor.encode_image(body), True)
    if form == "text":
        return Encoded(processor.encode_text([_decoded(body, parameters)]), True)
    if form == "json":
        return _from_json(body, processor, signature)
    raise UnsupportedMediaType(f"a body of type {kind or 'unknown'!r} means nothing to this model; send {_takes(processor)}")


def write_answer(processor: Processor, result: InferenceResult, single: bool) -> Reply:
    """{"model", "version", "predictions" or "outputs", "non_finite"?} as a reply."""
    decoded = processor.decode(result.outputs, single)
    parts: list[Buffer] = [orjson.dumps({"model": result.model, "version": result.version})[:-1]]
    for key, value in decoded.items():
        parts.append(b',"%s":' % key.encode())
        parts.extend(_json_parts(value))
    parts.append(b"}")
    body = b"".join(parts)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return Reply(headers, [body], len(body), int(decoded.get("non_finite", 0)))


def _json_parts(value: Any) -> Iterator[bytes]:
    """JSON in pieces of bounded size, since each piece holds the interpreter's lock while it is written."""
    if isinstance(value, dict):
        for number, (key, inner) in enumerate(value.items()):
            yield (b"," if number else b"{") + orjson.dumps(key) + b":"
            yield from _json_parts(inner)
        yield b"}" if value else b"{}"
    elif isinstance(value, np.ndarray) and value.size > PIECE_ELEMENTS:
        step = max(1, PIECE_ELEMENTS * len(value) // value.size)
        pieces = [value[at : at + step] for at in range(0, len(value), step)] if step > 1 or value.ndim == 1 else list(value)
        yield b"["
        for number, piece in enumerate(pieces):
            if number:
                yield b","
            if step > 1 or value.ndim == 1:
                yield orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
            else:
                yield from _json_parts(piece)
        yield b"]"
    else:
        yield orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _form_of(kind: str, body: bytes) -> str:
    """image, text or json; empty for what is none of them."""
    if kind in ("image/png", "image/jpeg", "image/jpg"):
        return "image"
    if kind == "text/plain":
        return "text"
    if kind == "application/json" or kind.endswith("+json"):
        return "json"
    if kind in ANY_BODY:
        return "image" if image_format(body) else "json" if body.lstrip()[:1] in (b"{", b"[") else ""
    return ""


def _media_type(content_type: str) -> tuple[str, dict[str, str]]:
    kind, *rest = content_type.split(";")
    pairs = (part.partition("=") for part in rest)
    return kind.strip().lower(), {key.strip().lower(): value.strip(' "').lower() for key, _, value in pairs}


def _form(body: bytes, content_type: str) -> tuple[bytes, str, dict[str, str]]:
    """The one file of a form, or its field `text`: bytes and what they are."""
    parts = parse_multipart(body, content_type)
    files = [part for part in parts if part.filename is not None]
    if len(files) > 1:
        raise InvalidRequest(f"the form has {len(files)} files; send one in a request")
    if files:
        kind, parameters = _media_type(files[0].content_type)
        return files[0].data, "" if image_format(files[0].data) else kind, parameters
    text = next((part for part in parts if part.name == "text"), None)
    if text is None:
        raise InvalidRequest("the form has no file; send one file field (curl -F file=@digit.png), or a field `text`")
    return text.data, "text/plain", {}


def _decoded(body: bytes, parameters: dict[str, str]) -> str:
    charset = CHARSETS.get(parameters.get("charset", "utf-8"))
    if charset is None:
        raise UnsupportedMediaType(f"charset {parameters['charset']!r} is not taken; send the text as UTF-8")
    try:
        return body.decode(charset)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the text is not {charset}: byte {error.start} is {body[error.start]:#04x}; send it as UTF-8") from None


def _from_json(body: bytes, processor: Processor, signature: Signature) -> Encoded:
    most = MAX_IMAGE_JSON_BYTES if body.lstrip()[:10].replace(b" ", b"").startswith(b'{"image"') else MAX_JSON_BYTES
    if len(body) > most:
        raise PayloadTooLarge(
            f"the JSON has {len(body):,} bytes; here it may have {most:,}: send an image as the body itself, or large tensors to "
            "/v2/models/{model}/infer, which takes them as binary"
        )
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        remedy = NO_JSON_FORM if b"NaN" in body or b"Infinity" in body else f"send {_takes(processor)}"
        raise InvalidRequest(f"the body is not JSON: {error}; {remedy}") from None
    if type(document) is dict and len(document) == 1:
        ((key, value),) = document.items()
        if key == "text" and type(value) is str and processor.text is not None:
            return Encoded(processor.encode_text([value]), True)
        if key == "texts" and processor.text is not None:
            return Encoded(processor.encode_text(_texts(value)), False)
        if key == "image" and type(value) is str:
            return Encoded(processor.encode_image(_unpacked(value)), True)
    if type(document) is dict:
        _refuse_other_forms(document, processor, signature)
    return Encoded(*tensors_of(document, signature))


def _refuse_other_forms(document: dict[str, Any], processor: Processor, signature: Signature) -> None:
    """What looks like an image, a text or a request of the protocol and is none in this form: told as that, not as an unknown input."""
    names = {spec.name for spec in signature.inputs}
    for key, form, taken in (
        ("image", '{"image": "base64 of one PNG or JPEG"}', processor.image),
        ("text", '{"text": "..."}', processor.text),
        ("texts", '{"texts": ["...", "..."]}', processor.text),
    ):
        meant = key not in names or (key == "image" and type(document.get(key)) is str)  # an input of that name takes no text
        if key in document and meant and taken is not None:
            raise InvalidRequest(f"`{key}` comes alone, as in {form}; this JSON has {show(document)}")
    inputs = document.get("inputs")
    if "inputs" not in names and type(inputs) is list and inputs and type(inputs[0]) is dict:
        raise InvalidRequest("this is a request of the Open Inference Protocol; POST it to /v2/models/{model}/infer")


def _texts(value: Any) -> list[str]:
    if type(value) is not list or not all(type(text) is str for text in value):
        raise InvalidRequest('`texts` is a list of strings, as in {"texts": ["one", "another"]}')
    return value


def _unpacked(value: str) -> bytes:
    """An image in base64, bare or as a data: URL."""
    _, comma, after = value.partition(",")
    encoded = after if comma and value[:5] == "data:" else value
    try:
        return binascii.a2b_base64("".join(encoded.split()).encode(), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InvalidRequest(f"`image` is not base64 ({error}); send the PNG or JPEG file so encoded, or as the body itself") from None


def _takes(processor: Processor) -> str:
    taken = []
    if processor.image is not None:
        taken.append("an image (image/png, image/jpeg, or a form with one file)")
    if processor.text is not None:
        taken.append('text (text/plain, or {"text": "..."} as application/json)')
    inputs = ", ".join(f'"{spec.name}": [...]' for spec in processor.signature.inputs if not spec.optional)
    taken.append(f"its inputs as application/json, {{{inputs}}}")
    return " or ".join(taken)
