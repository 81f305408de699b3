"""A multipart/form-data body that is in memory already, taken apart. Knows nothing of models; bodies that belong on disk are not its business."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from app.errors import InvalidRequest

MAX_PARTS: Final = 32


@dataclass(slots=True)
class Part:
    """One field of the form; a file where `filename` is not None."""

    name: str = ""
    filename: str | None = None
    content_type: str = ""
    data: bytes = b""


@dataclass(slots=True)
class _Collector:
    """The parser's callbacks: parts as they come."""

    parts: list[Part] = field(default_factory=list)
    headers: dict[bytes, bytes] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    header: bytes = b""
    value: bytes = b""
    complete: bool = False

    def begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} fields")
        self.headers, self.chunks = {}, []

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def header_end(self) -> None:
        self.headers[self.header.lower()] = self.value
        self.header = self.value = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.chunks.append(data[start:end])

    def part_end(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise InvalidRequest("a part of the form has no name; each has Content-Disposition: form-data with one")
        filename = options.get(b"filename")
        self.parts.append(
            Part(
                options[b"name"].decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "replace"),
                self.headers.get(b"content-type", b"").decode("latin-1"),
                b"".join(self.chunks),
            )
        )

    def end(self) -> None:
        self.complete = True


def parse_multipart(body: bytes, content_type: str) -> list[Part]:
    """The form's fields in order. Raises InvalidRequest for a body that is no such form, or is cut off."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequest("Content-Type multipart/form-data needs its boundary; HTTP clients add it when they make the form themselves")
    found = _Collector()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": found.begin,
                "on_header_field": found.header_field,
                "on_header_value": found.header_value,
                "on_header_end": found.header_end,
                "on_part_data": found.part_data,
                "on_part_end": found.part_end,
                "on_end": found.end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"the body is no multipart form: {error}") from None
    if not found.complete:
        raise InvalidRequest("the multipart form is cut off: its closing boundary is missing")
    return found.parts
