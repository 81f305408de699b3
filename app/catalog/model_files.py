"""The files of one version as they lie on disk: which they are, where links end, how large, and their hash. Never opens a model.

What external data a model really names is for optimizers.inspect, in a task child; here files are only files.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from app.errors import ModelRejected

MAX_DEPTH: Final = 3
SETTLED_S: Final = 2.0
"""A file younger than this may change again without a new time stamp, so its hash is not kept."""

_OTHER: Final = frozenset(
    {".md", ".txt", ".json", ".yaml", ".yml", ".pbtxt", ".py", ".pyc", ".html", ".png", ".jpg", ".jpeg", ".npz", ".onnx"}
)

_Stamp: TypeAlias = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class FileLimits:
    """Bounds that no sane model passes."""

    max_file_bytes: int = 64 << 30
    max_total_bytes: int = 128 << 30
    max_files: int = 4096


@dataclass(frozen=True)
class ModelFile:
    """One regular file: `name` as the version's folder shows it, `path` with all links resolved."""

    name: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class LinkPolicy:
    """Links are followed when they end in one of `roots` (the repository, and what the operator allowed)."""

    roots: tuple[Path, ...]

    def resolve(self, path: Path) -> Path:
        """Where `path` really lies. Raises ModelRejected for links that end elsewhere or nowhere; where is not told, since callers read why."""
        try:
            real = path.resolve(strict=True)
        except OSError as error:
            ends = " (a link)" if path.is_symlink() else ""
            raise ModelRejected(f"{path}{ends} cannot be followed: {error.strerror}") from None
        except RuntimeError:
            raise ModelRejected(f"{path} cannot be followed: a link that leads back to itself") from None
        if any(real.is_relative_to(root) for root in self.roots):
            return real
        raise ModelRejected(
            f"{path} is a link that ends outside the repository (`readlink -f` tells where); "
            f"add that folder to HONE_ALLOWED_ROOTS, or let `hone deploy` copy the file"
        )


def links_within(*roots: Path) -> LinkPolicy:
    return LinkPolicy(tuple(root.resolve() for root in roots))


def version_files(folder: Path, main: str, policy: LinkPolicy, limits: FileLimits) -> tuple[ModelFile, ...]:
    """`main` and what lies beside it and may be its data, in the order that hashes them. Raises ModelRejected with the rule."""
    names = [main, *sorted(name for name in _names(folder, "", 0, limits) if name != main and _may_be_data(name))]
    files = tuple(checked_file(folder / name, name, policy, limits) for name in names)
    total = sum(file.bytes for file in files)
    if total > limits.max_total_bytes:
        raise ModelRejected(f"{folder}: {total} bytes in all; at most {limits.max_total_bytes} are allowed")
    return files


def checked_file(path: Path, name: str, policy: LinkPolicy, limits: FileLimits) -> ModelFile:
    real = policy.resolve(path)
    return ModelFile(name, real, _regular_size(real, path, limits))


def open_regular(path: Path, limits: FileLimits | None = None) -> int:
    """A descriptor for reading a regular file that is no link; never blocks on a pipe or device. Raises ModelRejected."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelRejected(f"{path} cannot be read: {error.strerror}") from None
    try:
        _check_stat(os.fstat(descriptor), path, limits or FileLimits())
    except ModelRejected:
        os.close(descriptor)
        raise
    return descriptor


class FileHashes:
    """SHA-256 of files, remembered by (device, inode, size, mtime, ctime): an unchanged file is read once. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[_Stamp, str]] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0

    def of(self, path: Path) -> str:
        """Hash of the content. Raises ModelRejected when the file is no regular file, or is being written."""
        descriptor = open_regular(path)
        with open(descriptor, "rb", buffering=0) as file:
            before = os.fstat(descriptor)
            with self._lock:
                known = self._known.get(path)
            if known and known[0] == _stamp(before):
                return known[1]
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(descriptor)
        if _stamp(before) != _stamp(after):
            raise ModelRejected(f"{path} changed while it was read; it is looked at again when it rests")
        with self._lock:
            self.bytes_read += after.st_size
            if time.time() - after.st_ctime > SETTLED_S:
                self._known[path] = (_stamp(after), digest)
            else:
                self._known.pop(path, None)
        return digest

    def combined(self, files: Sequence[ModelFile]) -> str:
        """One hash over names and contents in order: the same as optimizers.artifact.sha256_of over those paths."""
        total = hashlib.sha256()
        for file in files:
            total.update(b"%b\0%b\n" % (os.fsencode(file.name), self.of(file.path).encode()))
        return total.hexdigest()


def copy_regular(source: Path, target: Path, limits: FileLimits) -> int:
    """Copy one regular file and bring it to disk; returns its size. Raises ModelRejected if it changed meanwhile."""
    descriptor = open_regular(source, limits)
    with open(descriptor, "rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        before = os.fstat(descriptor)
        while block := reader.read(1 << 20):
            view = memoryview(block)
            while view:
                view = view[writer.write(view) :]
        os.fsync(writer.fileno())
        if _stamp(before) != _stamp(os.fstat(descriptor)):
            raise ModelRejected(f"{source} changed while it was copied; try again when it rests")
    return before.st_size


def _names(folder: Path, prefix: str, depth: int, limits: FileLimits) -> Iterator[str]:
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            count += 1
            if count > limits.max_files:
                raise ModelRejected(f"{folder}: more than {limits.max_files} files; a version's folder holds a model and its data only")
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if depth < MAX_DEPTH:
                    yield from _names(folder / entry.name, f"{prefix}{entry.name}/", depth + 1, limits)
            elif not entry.is_dir():
                yield f"{prefix}{entry.name}"


def _may_be_data(name: str) -> bool:
    return Path(name).suffix.lower() not in _OTHER


def _regular_size(real: Path, shown: Path, limits: FileLimits) -> int:
    try:
        return _check_stat(real.stat(), shown, limits)
    except OSError as error:
        raise ModelRejected(f"{shown} cannot be read: {error.strerror}") from None


def _check_stat(found: os.stat_result, path: Path, limits: FileLimits) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a link" if stat.S_ISLNK(found.st_mode) else "a pipe, socket or device"
        raise ModelRejected(f"{path} is {kind}; a version's folder holds regular files only")
    if found.st_size > limits.max_file_bytes:
        raise ModelRejected(f"{path} has {found.st_size} bytes; at most {limits.max_file_bytes} are allowed")
    return found.st_size


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
