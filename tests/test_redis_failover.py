"""The name in HONE_STORE leads to another primary: the server goes over to it without a restart."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.domain import Event
from app.store.base import StoreUnavailable
from app.store.redis import RedisJournal
from tests.journal_story import deployed
from tests.redis_server import RedisServer

pytestmark = pytest.mark.needs("redis-server")


class Name:
    """An address whose new connections lead to `port`; those that were made before stay where they are."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def close(self) -> None:
        """When those who came have left."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _begin(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                self._begin(self._pass_on, caller, server)
                self._begin(self._pass_on, server, caller)

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with one, contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[RedisServer]]:
    folders = [tmp_path / "old", tmp_path / "new"]
    for folder in folders:
        folder.mkdir()
    found = [RedisServer(folder).start() for folder in folders]
    yield found
    for server in found:
        server.stop()


def test_a_name_that_leads_to_another_primary_is_followed(servers: list[RedisServer]) -> None:
    old, new = servers
    name = Name(old.port)
    with contextlib.closing(name), contextlib.closing(RedisJournal(f"redis://127.0.0.1:{name.address[1]}/0")) as journal:
        journal.append(deployed())
        new.run("REPLICAOF", "127.0.0.1", old.port)
        deadline = time.monotonic() + 30
        with new.client() as client:
            while not client.exists(journal.keys.events):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        new.run("REPLICAOF", "NO", "ONE")
        old.run("REPLICAOF", "127.0.0.1", new.port)
        name.port = new.port
        with pytest.raises(StoreUnavailable, match="read-only replica"):
            journal.append(Event("x.y", "m"))
        assert journal.append(Event("x.y", "m")).seq == 2
        assert new.run("XLEN", journal.keys.events) == 2
