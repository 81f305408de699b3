"""The inside of a helper process: one job after the other, from a socket. Imports neither the server nor any model's runtime.

A job is a packet with its body's memfd beside it; so is the answer. It ends when the server's end of the socket closes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from typing import Any, Final

from app.api.memfd import Memfd
from app.api.parcels import open_parcel, out_of_band, pack_parcel, reply_parcel
from app.api.wire import compress, encode_response, parse_infer, unpack
from app.errors import HoneError, PayloadTooLarge

PACKET_BYTES: Final = 65536
PARCEL: Final = "parcel"
"""The outcome whose memfd is a parcel; None stands for plain bytes, and anything else is an error's name and text."""


def main(fd: int) -> None:
    """A helper's whole life: jobs from the socket `fd` until it closes, or is reset where the server was killed over an answer."""
    os.nice(5)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")
    channel = socket.socket(fileno=fd)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            packet, fds, _, _ = socket.recv_fds(channel, PACKET_BYTES, 1)
            if not packet:
                return
            answer, memories = _answer(packet, Memfd(fds[0]))
            socket.send_fds(channel, [answer], [memory.fd for memory in memories])


def _answer(packet: bytes, memory: Memfd) -> tuple[bytes, list[Memfd]]:
    try:
        return _do(memory, *pickle.loads(packet))
    except HoneError as error:
        return pickle.dumps((type(error).__name__, str(error))), []
    except MemoryError:
        return pickle.dumps((PayloadTooLarge.__name__, "there is not enough memory for this body; send it as binary, or in parts")), []


def _do(memory: Memfd, what: str, *how: Any) -> tuple[bytes, list[Memfd]]:
    if what == "unpack":
        return pickle.dumps(None), [Memfd.new(unpack(memory.map(), *how))]
    if what == "parse":
        parsed = parse_infer(memory.map(), how[0], None, how[1])
        parsed.request.inputs = [out_of_band(tensor) for tensor in parsed.request.inputs]
        parcel = pack_parcel(parsed)
    elif what == "encode":
        parcel = reply_parcel(encode_response(*open_parcel(memory)))
    else:
        parcel = reply_parcel(compress(open_parcel(memory), *how))
    return pickle.dumps(PARCEL), [parcel]
