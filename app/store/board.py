"""The board of one host: latest values that may vanish at any time, in a SQLite file of its own that never waits for the disk.

A damaged board is thrown away, not mended. It knows nothing of what the values mean.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from app.domain import JSON
from app.store.base import StoreUnavailable
from app.store.clock import boot_id, since_boot_ns
from app.store.codec import Unreadable, dumps, loads
from app.store.database import is_no_text

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS board(key TEXT PRIMARY KEY, value TEXT NOT NULL, boot TEXT NOT NULL, expires_ns INTEGER NOT NULL) WITHOUT ROWID
"""


class Board:
    """Thread-safe; several processes share the file."""

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file = (0, 0)

    def post(self, key: str, value: JSON, ttl_s: float) -> None:
        now = since_boot_ns()
        row = (key, dumps(value), boot_id(), now + int(ttl_s * 1e9))
        self._run(
            ("DELETE FROM board WHERE expires_ns <= ? OR boot != ?", (now, boot_id())),
            ("INSERT OR REPLACE INTO board VALUES (?, ?, ?, ?)", row),
        )

    def values(self, prefix: str) -> dict[str, JSON]:
        query = "SELECT key, value FROM board WHERE substr(key, 1, ?) = ? AND boot = ? AND expires_ns > ? ORDER BY key"
        rows = self._run((query, (len(prefix), prefix, boot_id(), since_boot_ns())))
        try:
            return {key: loads(value) for key, value in rows}
        except Unreadable:
            with self._lock:
                self._throw_away()
            return {}

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def _run(self, *statements: tuple[str, tuple[object, ...]]) -> list[tuple[str, str]]:
        """The rows of the last statement. A damaged file is replaced once; a second failure is the disk's."""
        with self._lock:
            try:
                return self._try(statements)
            except sqlite3.OperationalError as error:
                if "no such table" not in str(error) and not is_no_text(error):
                    raise StoreUnavailable(f"{self._path} cannot be used: {error}") from error
                self._throw_away()
            except sqlite3.DatabaseError:
                self._throw_away()
            except OSError as error:
                raise StoreUnavailable(f"{self._path} cannot be used: {error}") from error
            try:
                return self._try(statements)
            except (sqlite3.Error, OSError) as error:
                raise StoreUnavailable(f"{self._path} cannot be used: {error}") from error

    def _try(self, statements: tuple[tuple[str, tuple[object, ...]], ...]) -> list[tuple[str, str]]:
        connection = self._connected()
        rows: list[tuple[str, str]] = []
        connection.execute("BEGIN IMMEDIATE" if len(statements) > 1 else "BEGIN")
        try:
            for sql, values in statements:
                rows = connection.execute(sql, values).fetchall()
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return rows

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._file == self._file_now():
            return self._connection
        self._disconnect()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False)
        self._connection, self._file = connection, self._file_now()
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute(_SCHEMA)
        return connection

    def _file_now(self) -> tuple[int, int]:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return 0, 0
        return found.st_dev, found.st_ino

    def _throw_away(self) -> None:
        self._disconnect()
        for side in ("-shm", "-wal", ""):
            with suppress(FileNotFoundError):
                os.unlink(f"{self._path}{side}")

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None
