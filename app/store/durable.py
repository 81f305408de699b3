"""Files that are there whole or not at all: written beside, flushed to the disk, renamed, the folder flushed as well."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def write_durably(path: Path, lines: Iterable[str]) -> None:
    """Replace `path` by these lines (each with its own newline), mode 0600. Raises OSError and then leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    _flush_folder(path.parent)


def _sweep(path: Path) -> None:
    """Remove what killed writers left beside `path`; one that is an hour old belongs to nobody."""
    for left in path.parent.glob(f".{path.name}.*-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
