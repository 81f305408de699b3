"""A server under traffic whose loop is watched: what it told, and a model to be put in golden's place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.traffic import Traffic
from tests.running_server import DEMO, Running, server

GOLDEN = DEMO / "repository" / "digits" / "1" / "model.onnx"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with server(tmp_path, demo=True, block_s="1.5", feedback_token="labels") as running:
        yield running.ready("digits")


@pytest.fixture
def traffic(running: Running) -> Iterator[Traffic]:
    with np.load(DEMO / "repository" / "digits" / "samples" / "judging.npz") as samples:
        images = samples["image"]
    with Traffic("127.0.0.1", running.port, images, rate=30.0, callers=4) as traffic:
        running.until(lambda: traffic.sent > 60, 30)
        yield traffic


def events(running: Running) -> list[dict[str, Any]]:
    found = running.admin("GET", "/admin/timeline?model=digits&limit=500")["events"]
    assert isinstance(found, list)
    return found


def told(running: Running, kind: str, seconds: float = 60.0, **like: str) -> dict[str, Any]:
    """The data of the first event of `kind` that has `like` in it, waited for: on a loud machine the host is blamed for its part, too."""

    def first() -> Any:
        return next((event for event in events(running) if event["kind"] == kind and like.items() <= event["data"].items()), None)

    try:
        return dict(running.until(first, seconds)["data"])
    except AssertionError:
        raise AssertionError("\n".join(f"{event['kind']} {event['data']}" for event in events(running))) from None


def deploy(running: Running, build: Any) -> None:
    folder = running.folder / "models" / "digits" / "2"
    folder.mkdir()
    build(GOLDEN, folder / "model.part")
    os.replace(folder / "model.part", folder / "model.onnx")
