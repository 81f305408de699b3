"""Files and folders that survive kill -9 and power loss: written under a temporary name, synced, renamed. Knows nothing of models.

A temporary one is held by a file lock while its maker lives, so `sweep` removes exactly what the dead left, also from another container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from app.errors import Conflict, HoneError, InsufficientStorage, NotAllowed

TEMPORARY: Final = ".hone-tmp-"
SPARE_BYTES: Final = 16 << 20
"""Left free on any disk that Hone writes to, so that the journal can always append."""

_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE: Final = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def storage_errors(what: str, folder: Path, left: str = "nothing was changed") -> Iterator[None]:
    """Turn what the file system refuses into InsufficientStorage or NotAllowed, each with its remedy and how things are `left`."""
    try:
        yield
    except OSError as error:
        raise explained(error, what, folder, left) from error


def explained(error: OSError, what: str, folder: Path, left: str = "nothing was changed") -> HoneError | OSError:
    folder = _refused(error, folder)
    if error.errno in _NO_ROOM:
        return InsufficientStorage(f"{what}: no room in {folder} ({error.strerror}, {free_bytes(folder)} bytes free); free some, {left}")
    if error.errno in _NOT_WRITABLE:
        return NotAllowed(f"{what}: {folder} cannot be written ({error.strerror}); make it writable for user {os.geteuid()}, {left}")
    return error


def _refused(error: OSError, folder: Path) -> Path:
    """The file or folder below `folder` that the system refused, where it says so: it may be another user's, though `folder` is not."""
    path = Path(error.filename) if isinstance(error.filename, str) else folder
    if error.errno not in _NOT_WRITABLE or not path.is_relative_to(folder):
        return folder
    return path if os.path.lexists(path) else path.parent


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written below `folder` (or its nearest existing parent)."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def require_space(folder: Path, size_bytes: int, what: str) -> None:
    """Raise InsufficientStorage unless `size_bytes` can be written below `folder` with a little to spare."""
    free = free_bytes(folder)
    if free < size_bytes + SPARE_BYTES:
        raise InsufficientStorage(
            f"{what}: {size_bytes} bytes and {SPARE_BYTES} to spare are needed in {folder}, {free} are free; free some or move the folder"
        )


def make_folder(folder: Path, mode: int = 0o777) -> Path:
    """Create `folder` and its parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode)
        sync_folder(folder.parent)
    return folder


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder` to disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: readers see the old file or the whole new one, whatever happens."""
    temporary, descriptor = _locked_file(path.parent, mode)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(descriptor)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(parent: Path, mode: int = 0o777) -> Iterator[Path]:
    """A folder in `parent`, ours alone while the block runs; gone after it unless it was renamed (see `publish`)."""
    folder, descriptor = _locked_folder(parent, mode)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished temporary folder its name, durably. Raises FileExistsError where `target` holds something already."""
    sync_tree(temporary)
    try:
        os.rename(temporary, target)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        raise
    sync_folder(target.parent)


def discard(path: Path) -> None:
    """Remove a file or folder so that a kill in between leaves it whole or gone (the rest is swept). Needs no room on the disk."""
    grave = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        path.rename(grave)
    except FileNotFoundError:
        return
    sync_folder(path.parent)
    if grave.is_dir() and not grave.is_symlink():
        shutil.rmtree(grave, ignore_errors=True)
    else:
        grave.unlink(missing_ok=True)


def sweep(folder: Path) -> int:
    """Remove the temporary files and folders of dead processes directly in `folder`; returns how many."""
    removed = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder):
            if name.startswith(TEMPORARY) and _remove_if_dead(folder / name):
                removed += 1
    return removed


@contextlib.contextmanager
def exclusive(path: Path, what: str, timeout_s: float = 30.0) -> Iterator[None]:
    """Hold the lock file `path` against other threads and processes; the kernel frees it when its holder dies. Raises Conflict when late."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while not _lock(descriptor):
            if time.monotonic() > deadline:
                raise Conflict(f"{what}: another process has held {path} for {timeout_s:g} s; try again")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _locked_folder(parent: Path, mode: int) -> tuple[Path, int]:
    """A new folder that a sweeper, which may look in between, did not take for a dead one's."""
    while True:
        folder = parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        folder.mkdir(mode)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        if _lock(descriptor) and folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _locked_file(parent: Path, mode: int) -> tuple[Path, int]:
    while True:
        path = parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        if _lock(descriptor) and path.exists():
            return path, descriptor
        os.close(descriptor)


def _remove_if_dead(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if not _lock(descriptor):
            return False
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return not path.exists()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
