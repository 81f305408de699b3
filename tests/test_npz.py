"""An .npz comes from anybody: it is read no further than what it says of itself can be true, and fits into memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from optimizers.samples import Samples


def npz_of(path: Path, head: str, data: bytes, unpacked: int) -> Path:
    """An .npz of one array with this head; its directory claims that it unpacks to `unpacked` bytes, if given."""
    line = head.encode() + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", b"\x93NUMPY\1\0" + len(line).to_bytes(2, "little") + line + data)
        if unpacked:
            file.filelist[0].file_size = 10 + len(line) + unpacked
    return path


@pytest.mark.parametrize(
    ("shape", "dtype", "data", "unpacked", "part"),
    [
        ("(1099511627776,)", "<f4", b"", 1 << 42, "more than half of the memory that is free"),
        ("(1099511627776,)", "<f4", b"", 0, "should have 4398046511104 bytes"),
        ("(1000000000000,)", "<U0", b"", 0, "should have 0 bytes"),
        ("(-1, 4)", "<f4", b"", 0, "should have -16 bytes"),
        ("(2,)", "<U1", b"\xff" * 8, 0, "damaged"),
        ("(True, 4)", "<f4", bytes(16), 0, "damaged"),
        ("(" * 2_000, "<f4", b"", 0, "nonsense"),
    ],
)
def test_what_would_fill_the_memory_or_lies_is_refused_unread(
    tmp_path: Path, shape: str, dtype: str, data: bytes, unpacked: int, part: str
) -> None:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    with pytest.raises(ValueError, match=part):
        Samples.load(npz_of(tmp_path / "x.npz", head, data, unpacked))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1.5])
def test_labels_are_whole_numbers(tmp_path: Path, wrong: float) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 4), "f4"), labels=np.array([1, wrong]))
    with pytest.raises(ValueError, match="one number of a class"):
        Samples.load(tmp_path / "x.npz")
