"""Which versions were being loaded or computed when a whole server ended without a word: marks in a file that outlives all of its processes.

A mark is a byte of shared file memory, so it costs no system call: the kernel keeps it when everything is killed at once, and a clean end
removes the file. Who reads it at the next start decides what it means; this only remembers.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Final

log = logging.getLogger("hone.serving")
FILE: Final = "at-work-"
PLACES: Final = 512
_RECORD: Final = struct.Struct("<BdH")
_BYTES: Final = 512
_NAME_BYTES: Final = _BYTES - _RECORD.size
_IDLE, _COMPUTING, _LOADING, _SERVER = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A version that was at work when its `server` ended; `at` (unix seconds, by this host's clock) is when it began to be."""

    model: str
    version: str
    loading: bool
    at: float
    server: str = ""

    @property
    def reason(self) -> str:
        return f"the whole server ended without a word while this version {'was loaded' if self.loading else 'computed'}"


class Mark:
    """Of one version, whichever engine has it."""

    __slots__ = ("_at", "_calls", "_loads", "_map")

    def __init__(self, map_: mmap.mmap | None = None, at: int = 0) -> None:
        self._map, self._at, self._calls, self._loads = map_, at, 0, 0

    def begin(self) -> None:
        """An idle runner of it got a batch."""
        self._calls += 1
        if self._calls == 1 and not self._loads:
            self._write(_COMPUTING)

    def end(self) -> None:
        """The last batch of a runner of it is over."""
        self._calls -= 1
        if not self._calls and not self._loads:
            self._write(_IDLE)

    @contextmanager
    def loading(self) -> Iterator[None]:
        self._loads += 1
        self._write(_LOADING)
        try:
            yield
        finally:
            self._loads -= 1
            if not self._loads:
                self._write(_COMPUTING if self._calls else _IDLE)

    @property
    def idle(self) -> bool:
        return not self._calls and not self._loads

    def _write(self, state: int) -> None:
        if self._map is not None and not self._map.closed:
            if state != _IDLE:
                struct.pack_into("<d", self._map, self._at + 1, time())
            self._map[self._at] = state


class AtWork:
    """One per server, on its state folder; `server` tells it from others there, in this life as in the next. Where no such file can be had,
    nothing is remembered and all else goes on."""

    def __init__(self, folder: Path, server: str = "") -> None:
        self._marks: dict[tuple[str, str], Mark] = {}
        self._places = list(range(1, PLACES))
        self._server = server.encode()[:_NAME_BYTES]
        self._path: Path | None = None
        self._map: mmap.mmap | None = None
        self.unfinished: tuple[Unfinished, ...] = ()
        """What servers that are gone now left; told of once."""
        try:
            self.unfinished = tuple(_left_by_the_dead(folder))
            self._open(folder)
        except (OSError, ValueError) as error:
            log.warning("what computes will not be known should the whole server be killed: %s", error)

    def mark(self, model: str, version: str) -> Mark:
        key = (model, version)
        if key not in self._marks:
            self._marks[key] = self._new(f"{model}:{version}".encode(), key)
        return self._marks[key]

    def close(self) -> None:
        """The server ends as it was asked to: what is at work now is nobody's fault."""
        if self._map is not None:
            self._map.close()
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
            self._path = None

    def _open(self, folder: Path) -> None:
        """A file of our own, locked before it has a name that others look for; the lock lasts as long as this process."""
        hidden = folder / f".{FILE}{secrets.token_hex(8)}"
        self._fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._fd, 0, PLACES * _BYTES)  # a full disk must be met here, not by a signal at the first mark
            self._map = mmap.mmap(self._fd, PLACES * _BYTES)
            self._name(0, _SERVER, self._server)
            self._path = hidden.with_name(hidden.name[1:])
            os.rename(hidden, self._path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            os.close(self._fd)
            raise

    def _new(self, name: bytes, key: tuple[str, str]) -> Mark:
        if self._map is None or self._map.closed or len(name) > _NAME_BYTES:
            return Mark()
        if not self._places:
            self._forget_one()
        if not self._places:
            return Mark()
        at = self._places.pop() * _BYTES
        self._name(at, _IDLE, name)
        return Mark(self._map, at)

    def _name(self, at: int, state: int, name: bytes) -> None:
        assert self._map is not None
        _RECORD.pack_into(self._map, at, state, 0.0, len(name))
        self._map[at + _RECORD.size : at + _RECORD.size + len(name)] = name

    def _forget_one(self) -> None:
        """The place of a version that is idle and was asked for longest ago goes to another; should it come back it gets a new one."""
        for key, mark in self._marks.items():
            if mark.idle and mark._map is not None:
                self._places.append(mark._at // _BYTES)
                mark._map = None
                del self._marks[key]
                return


def _left_by_the_dead(folder: Path) -> Iterator[Unfinished]:
    """What stands in the files whose servers do not live any more; the files go."""
    for path in sorted([*folder.glob(f"{FILE}*"), *folder.glob(f".{FILE}*")]):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # another server on this folder, alive: one is drained while the next starts
        else:
            path.unlink(missing_ok=True)
            yield from _read(os.read(fd, PLACES * _BYTES))
        finally:
            os.close(fd)


def _read(data: bytes) -> Iterator[Unfinished]:
    server = ""
    for at in range(0, len(data) - _BYTES + 1, _BYTES):
        state, since, length = _RECORD.unpack_from(data, at)
        name = data[at + _RECORD.size : at + _RECORD.size + min(length, _NAME_BYTES)].decode("utf-8", "replace")
        model, _, version = name.rpartition(":")
        if state == _SERVER:
            server = name
        elif state in (_COMPUTING, _LOADING) and model and version:
            yield Unfinished(model, version, state == _LOADING, since, server)
