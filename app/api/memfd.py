"""Memory with a descriptor: written by one process, mapped by another, gone with its last holder. No name in any folder, no /dev/shm."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

from app.domain import Buffer


class Memfd:
    """An anonymous file in memory. Closed by `close`, or when nobody holds it any more."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def new(cls, contents: Iterable[Buffer] = ()) -> Memfd:
        memory = cls(os.memfd_create("hone", os.MFD_CLOEXEC))
        for content in contents:
            memory.write(content)
        return memory

    def write(self, data: Buffer) -> None:
        """Append; a write to memory is short only past 2 GiB, or when memory is out."""
        view = memoryview(data)
        while len(view):
            view = view[os.write(self.fd, view) :]

    def skip_to(self, offset: int) -> None:
        os.lseek(self.fd, offset, os.SEEK_SET)

    def map(self) -> memoryview:
        """All of it, to read; unmapped when the last slice is dropped, even after `close`."""
        size = os.fstat(self.fd).st_size
        return memoryview(mmap.mmap(self.fd, size, prot=mmap.PROT_READ)) if size else memoryview(b"")

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
