"""File systems in bad moods, for tests: full, read-only, too small for one file. Works as root and as an ordinary user."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _mount(*arguments: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int, inodes: int = 0) -> Iterator[Path]:
    """`folder` as a file system of its own, full at `size_bytes` or at so many files and folders (itself is one)."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},mode=700" + (f",nr_inodes={inodes}" if inodes else "")
    if not _mount("-t", "tmpfs", "-o", options, "none", str(folder)):
        pytest.skip("no right to mount a small disk here; tests with largest_file() stand in")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """No file may grow past `size_bytes` (EFBIG), which needs no rights at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """`folder` such that nothing in it can be written: a read-only bind mount for root, permissions for everybody else."""
    if os.geteuid() != 0:
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(mode)
        return
    if not _mount("--bind", str(folder), str(folder)):
        pytest.skip("root without the right to mount: nothing is read-only for it")
    try:
        assert _mount("-o", "remount,ro,bind", str(folder))
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def tree(folder: Path) -> list[str]:
    """Every path below `folder`, for comparing before with after."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
