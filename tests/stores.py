"""A store of each kind; several journals on one store are several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.store.base import Journal
from app.store.open import open_journal
from tests.redis_server import RedisServer

Opener = Callable[[], Journal]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.needs("redis-server"))])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/journal.db"
    server: RedisServer = request.getfixturevalue("redis_server")
    server.run("FLUSHALL")
    return server.url


@pytest.fixture
def another(url: str) -> Iterator[Opener]:
    """Opens one more journal on the same store."""
    opened: list[Journal] = []

    def open_one() -> Journal:
        opened.append(open_journal(url))
        return opened[-1]

    yield open_one
    for journal in opened:
        journal.close()


@pytest.fixture
def journal(another: Opener) -> Journal:
    return another()
