"""A repository, and files in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.catalog.repository import Repository


def put(root: Path, path: str, data: bytes = b"onnx") -> Path:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    root = tmp_path / "models"
    root.mkdir()
    return Repository(root)
