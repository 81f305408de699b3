"""A model on its way in: multipart/form-data written to a folder as it comes, within bounds. Knows nothing of models or their files.

Nothing is spooled to a temporary folder of the system's (which may be small), and nothing large is held in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from app.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

MAX_FILES: Final = 64
MAX_FIELDS: Final = 16
MAX_FIELD_BYTES: Final = 64 << 10
STEP_BYTES: Final = 1 << 20
EXAMPLE: Final = "curl -F name=resnet -F model.onnx=@model.onnx"


@dataclass(slots=True)
class Form:
    """Fields by name, and files by the name that the sender gave them -> where they were written."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


async def receive_form(
    content_type: str, chunks: AsyncIterator[bytes], folder: Path, limit_bytes: int, seen: Callable[[str, str], object] = lambda *_: None
) -> Form:
    """Read the whole form into `folder`; `seen(name, value)` is told of each field at once, and may raise.

    Raises UnsupportedMediaType, InvalidRequest, PayloadTooLarge, and OSError where the disk refuses.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise UnsupportedMediaType(
            f"a model comes as multipart/form-data with its boundary, as in {EXAMPLE}; this is {content_type[:80]!r}"
        )
    total, waiting = 0, bytearray()
    with _Receiver(options[b"boundary"], folder, seen) as receiver:
        async for chunk in chunks:
            total += len(chunk)
            if total > limit_bytes:
                raise PayloadTooLarge(f"the upload has more than {limit_bytes} bytes, the limit (HONE_MAX_UPLOAD_BYTES)")
            waiting += chunk
            if len(waiting) >= STEP_BYTES:
                await asyncio.to_thread(receiver.write, bytes(waiting))
                waiting.clear()
        await asyncio.to_thread(receiver.write, bytes(waiting))
        return receiver.whole()


@contextmanager
def _well_formed() -> Iterator[None]:
    """What the parser has against a form, a boundary that is too long among it."""
    try:
        yield
    except FormParserError as error:
        raise InvalidRequest(f"the body is no multipart form: {error}") from None


class _Receiver(ExitStack):
    """The parser's callbacks: each part to its field or its file. One at a time, on any thread."""

    def __init__(self, boundary: bytes, folder: Path, seen: Callable[[str, str], object]) -> None:
        super().__init__()
        self._folder, self._seen = folder, seen
        self._form = Form()
        self._headers: dict[bytes, bytes] = {}
        self._header = self._value = b""
        self._name: str | None = None
        self._text = bytearray()
        self._file: BufferedWriter | None = None
        self._ended = False
        with _well_formed():
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._finish,
                },
            )

    def write(self, data: bytes) -> None:
        with _well_formed():
            self._parser.write(data)

    def whole(self) -> Form:
        if not self._ended:
            raise InvalidRequest("the multipart form is cut off: its closing boundary is missing")
        return self._form

    def _begin(self) -> None:
        self._headers, self._name, self._file = {}, None, None
        self._text.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise InvalidRequest("a part of the form has no name; each has Content-Disposition: form-data with one")
        self._name = options[b"name"].decode("utf-8", "replace")
        if b"filename" in options:
            self._open(options[b"filename"].decode("utf-8", "replace"))
        elif len(self._form.fields) == MAX_FIELDS or self._name in self._form.fields:
            raise InvalidRequest(f"the form has more than {MAX_FIELDS} fields, or {self._name[:80]!r} twice; an upload needs `name` alone")

    def _open(self, filename: str) -> None:
        """A field that is called like a file names it (-F model.onnx=@resnet.onnx), else the file's own name does."""
        assert self._name is not None
        shown = self._name if "." in self._name else filename
        if shown in self._form.files:
            raise InvalidRequest(f"the form has two files called {shown[:80]!r}; send each once")
        if len(self._form.files) == MAX_FILES:
            raise InvalidRequest(f"the form has more than {MAX_FILES} files")
        path = self._form.files[shown] = self._folder / f"{len(self._form.files)}.part"
        self._file = self.enter_context(path.open("xb"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise InvalidRequest(
                f"the form's field {(self._name or '')[:80]!r} has more than {MAX_FIELD_BYTES} bytes; send files as files (@)"
            )

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
        elif self._name is not None:
            value = self._form.fields[self._name] = self._text.decode("utf-8", "replace")
            self._seen(self._name, value)

    def _finish(self) -> None:
        self._ended = True
