"""Content codings: which one a client takes, packing a reply, unpacking a body without believing its size. Knows gzip and deflate only."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from app.api.wire.reply import Reply, in_slices
from app.domain import Buffer
from app.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

SMALLEST_PACKED: Final = 4096
_READ: Final = 1 << 16
_WRITE: Final = 1 << 20
_MOST_MEMBERS: Final = 10_000
_GZIP, _ZLIB, _RAW = 31, 15, -15
_LEVEL: Final = 1


def parse_content_encoding(value: bytes | str | None) -> str | None:
    """The one coding of a request body: "gzip", "deflate" or None."""
    if not value:
        return None
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    names = [name for name in (part.strip().lower() for part in text.split(",")) if name not in ("", "identity")]
    if len(names) > 1:
        raise UnsupportedMediaType(f"Content-Encoding is {text[:60]!r}; a body is packed at most once, by gzip or deflate")
    if names and names[0] not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedMediaType(f"Content-Encoding is {text[:60]!r}; this server unpacks gzip and deflate")
    return names[0].removeprefix("x-") if names else None


def choose_encoding(accept: bytes | str | None) -> str | None:
    """The coding for a reply by Accept-Encoding: "gzip", "deflate", or None for a plain reply (RFC 9110, section 12.5.3)."""
    if not accept:
        return None
    text = accept.decode("latin-1") if isinstance(accept, bytes) else accept
    weights: dict[str, float] = {}
    for part in text.lower().split(","):
        name, _, options = part.partition(";")
        weights[name.strip()] = _weight(options)
    plain = weights.get("identity", 0.0)
    best, best_weight = None, 0.0
    for name in ("gzip", "deflate"):
        weight = (
            weights.get("x-gzip", 0.0)
            if name == "gzip" and "gzip" not in weights and "x-gzip" in weights
            else weights.get(name, weights.get("*", 0.0))
        )
        if weight > best_weight:
            best, best_weight = name, weight
    return best if best_weight >= plain else None


def compress(reply: Reply, encoding: str) -> Reply:
    """`reply` packed, its length header still counting the unpacked JSON; `reply` itself where that would not make it smaller."""
    if reply.size < SMALLEST_PACKED:
        return reply
    packer = zlib.compressobj(_LEVEL, wbits=_GZIP if encoding == "gzip" else _ZLIB)
    parts: list[Buffer] = []
    for part in reply.parts:
        view = memoryview(part)
        parts.extend(packer.compress(view[at : at + _WRITE]) for at in range(0, len(view), _WRITE))
    parts.append(packer.flush())
    size = sum(map(len, parts))
    vary = (b"vary", b"accept-encoding")
    if size >= reply.size:
        return Reply([*reply.headers, vary], reply.parts, reply.size, reply.non_finite)
    headers = [header for header in reply.headers if header[0] != b"content-length"]
    headers += [(b"content-encoding", encoding.encode()), (b"content-length", b"%d" % size), vary]
    return Reply(headers, in_slices([b"".join(parts)]), size, reply.non_finite)


def decompress(body: Buffer, encoding: str, limit: int) -> Buffer:
    """`body` unpacked; see `unpack`."""
    return bytearray().join(unpack(body, encoding, limit))


def unpack(body: Buffer, encoding: str, limit: int) -> Iterator[bytes]:
    """`body` unpacked, in pieces of at most 1 MiB, so that a bomb costs no more than `limit`. `deflate` is zlib or, as some clients have it, raw.

    Raises PayloadTooLarge past the limit, InvalidRequest for a broken stream, one cut short, or bytes after its end.
    """
    view = memoryview(body)
    if encoding == "gzip":
        return _inflate(view, _GZIP, limit)
    looks_zlib = len(view) >= 2 and view[0] & 0x0F == 8 and (view[0] << 8 | view[1]) % 31 == 0
    return _inflate(view, _ZLIB if looks_zlib else _RAW, limit)


def _inflate(view: memoryview, form: int, limit: int) -> Iterator[bytes]:
    at, total, members = 0, 0, 1
    unpacker = zlib.decompressobj(form)
    while True:
        pending: Buffer = unpacker.unconsumed_tail
        if not pending:
            pending, at = view[at : at + _READ], min(at + _READ, len(view))
        try:
            piece = unpacker.decompress(pending, _WRITE)
        except zlib.error as error:
            raise InvalidRequest(f"the body does not unpack ({error}); does Content-Encoding name how it was packed?") from None
        total += len(piece)
        if total > limit:
            raise PayloadTooLarge(f"the body unpacks to more than {limit} bytes, the limit; send less at once, or raise the server's limit")
        yield piece
        if not unpacker.eof:
            if not piece and not len(pending):
                raise InvalidRequest("the packed body is cut short; send the whole stream, or send it unpacked without Content-Encoding")
            continue
        at -= len(unpacker.unused_data)
        if at == len(view):
            return
        if form != _GZIP or members == _MOST_MEMBERS:
            raise InvalidRequest(f"{len(view) - at} bytes follow the packed body's end; Content-Length and the stream must agree")
        members, unpacker = members + 1, zlib.decompressobj(form)  # a gzip stream may have several members


def _weight(options: str) -> float:
    for option in options.split(";"):
        key, _, value = option.partition("=")
        if key.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0
