"""One SQLite file shared by several processes: opened at first use, private, in write-ahead mode, set aside when damaged.

It knows how SQLite fails and says it as StoreUnavailable; what the tables mean is its owner's affair.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from app.store.base import StoreRefused, StoreUnavailable

_DAMAGE: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_SIDE_FILES: Final = ("", "-wal", "-shm")
SET_ASIDE_LIMIT: Final = 5


class Database:
    """`schema` is run on an empty file, then `born(connection, why)`, where `why` names the damaged file that it replaces, or is ''."""

    def __init__(
        self, path: Path, schema: str, schema_version: int, born: Callable[[sqlite3.Connection, str], None], busy_timeout_s: float
    ) -> None:
        self.path = path
        self._schema = schema
        self._schema_version = schema_version
        self._born = born
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] = (0, 0)
        self._closed = False
        self.opened = 0
        """How often the file was opened: another number is another file, or none yet."""

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection inside one read transaction: every statement sees the same moment."""
        with self._guarded() as connection:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def writing(self, durable: bool) -> Iterator[sqlite3.Connection]:
        """A connection inside one write transaction; `durable` waits for the disk. Any exception leaves nothing written."""
        with self._guarded() as connection:
            connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def data_version(self) -> tuple[int, int]:
        """Changes whenever another connection, of any process, has written. Cheap."""
        with self._guarded() as connection:
            return self.opened, int(connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            connection = self._connected()
            try:
                yield connection
            except sqlite3.Error as error:
                self._roll_back(connection)
                raise self._explained(error) from error
            except BaseException:
                self._roll_back(connection)
                raise

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    def _connected(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable(f"{self.path} was closed by this process")
        if self._connection is not None and self._file == self._file_now():
            return self._connection
        self._disconnect()
        try:
            with self._alone():
                self._connection = self._open()
                self._file = self._file_now()
        except sqlite3.Error as error:
            raise self._unavailable(error) from error
        except OSError as error:
            raise StoreUnavailable(f"cannot open {self.path}: {error.strerror or error}; {_remedy(self.path)}") from error
        self.opened += 1
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def _file_now(self) -> tuple[int, int]:
        """Device and inode of what the path names now: a file that was replaced or deleted is noticed."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return 0, 0
        return found.st_dev, found.st_ino

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process at a time creates the file or sets it aside."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _open(self) -> sqlite3.Connection:
        self._make_private()
        connection = self._connect()
        try:
            self._prepare(connection)
        except sqlite3.DatabaseError as error:
            connection.close()
            if not _is_damage(error):
                raise
            self._set_aside(str(error))
            self._make_private()
            connection = self._connect()
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False)

    def _make_private(self) -> None:
        """Mode 0600 from the first byte on; SQLite gives its side files the same. An open file is never opened again: POSIX locks."""
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            if os.stat(self.path).st_mode & 0o077:
                os.chmod(self.path, 0o600)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA journal_size_limit=4194304")
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise damage(str(found))
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > self._schema_version:
            raise StoreRefused(
                f"{self.path} was written by a newer Hone (its schema is {version}, this one reads {self._schema_version}): "
                "install that version again, or give this one another state folder"
            )
        if version < self._schema_version:
            self._create(connection)

    def _create(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in self._schema.split(";"):
                connection.execute(statement)
            aside = self._set_aside_files()
            self._born(connection, f"the former file was damaged and set aside as {aside[-1].name}" if aside else "")
            connection.execute(f"PRAGMA user_version={self._schema_version}")
            connection.execute("COMMIT")
        except BaseException:
            self._roll_back(connection)
            raise

    def _set_aside_files(self) -> list[Path]:
        found = self.path.parent.glob(self.path.name + ".damaged-*")
        return sorted((path for path in found if path.suffix[9:].isdigit()), key=lambda path: int(path.suffix[9:]))

    def _set_aside(self, why: str) -> None:
        earlier = self._set_aside_files()
        if len(earlier) >= SET_ASIDE_LIMIT:
            raise StoreUnavailable(
                f"{self.path} is damaged ({why}) for the {len(earlier) + 1}th time: the disk is failing. "
                f"Move the state folder to another one, or remove {earlier[0].name} and its like to go on here"
            )
        number = int(earlier[-1].suffix[9:]) + 1 if earlier else 1
        for side in reversed(_SIDE_FILES):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{side}", f"{self.path}.damaged-{number}{side}")

    def _explained(self, error: sqlite3.Error) -> StoreUnavailable:
        """The error to raise; a file found damaged in use is set aside here, so that the next call begins a fresh one."""
        if not _is_damage(error):
            return self._unavailable(error)
        try:
            with self._alone():
                if self._file == self._file_now():
                    self._disconnect()
                    self._set_aside(str(error))
        except StoreUnavailable as refused:
            return refused
        except OSError as failed:
            return StoreUnavailable(f"{self.path} is damaged ({error}) and cannot be set aside: {failed}")
        return StoreUnavailable(f"{self.path} was found damaged ({error}) and set aside; a fresh one is begun with the next call")

    def _unavailable(self, error: sqlite3.Error) -> StoreUnavailable:
        return StoreUnavailable(f"{self.path} cannot be used: {error}; {_remedy(self.path)}")


def damage(text: str) -> sqlite3.DatabaseError:
    """What a statement raises that meets damage: for an owner who finds it in what a row says, where SQLite sees only bytes."""
    error = sqlite3.DatabaseError(text)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def is_no_text(error: sqlite3.Error) -> bool:
    """True where a column holds bytes that are no text: the driver's own error, which has no code."""
    return "Could not decode to UTF-8" in str(error)


def _is_damage(error: sqlite3.Error) -> bool:
    return is_no_text(error) or (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGE


def _remedy(path: Path) -> str:
    return f"look at room, permissions and mount of {path.parent}, and at processes that hold the file"
