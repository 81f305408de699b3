"""The journal in one SQLite file of this host: durable, nothing to install, shared by server, worker and commands.

What the events mean is the fold's affair, how the file opens and fails is the database's; this keeps the two in step.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from app.domain import JSON, Event, Generation, State
from app.store import backups, merge
from app.store.base import StoreRefused, StoreUnavailable, StoreWentBack
from app.store.board import Board
from app.store.clock import boot_id, since_boot_ns
from app.store.codec import Unreadable, data_text, dumps, loads, state_from_json
from app.store.database import Database, damage
from app.store.filesystem import filesystem_type, is_shared_between_hosts
from app.store.fold import FOLD_VERSION, fold, fold_all, hold_to
from app.store.kinds import checked

SNAPSHOT_EVERY: Final = 500
SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE events(
  seq INTEGER PRIMARY KEY, uid TEXT NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL,
  job TEXT NOT NULL, actor TEXT NOT NULL, data TEXT NOT NULL, schema INTEGER NOT NULL);
CREATE INDEX events_of_model ON events(model, seq);
CREATE TABLE snapshot(id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, uid TEXT NOT NULL, fold INTEGER NOT NULL, state TEXT NOT NULL);
CREATE TABLE leases(name TEXT PRIMARY KEY, holder TEXT NOT NULL, boot TEXT NOT NULL, expires_ns INTEGER NOT NULL) WITHOUT ROWID
"""
_EVENT: Final = "SELECT seq, uid, at, kind, model, version, job, actor, data, schema FROM events "


@dataclass(frozen=True, slots=True)
class _Seen:
    """How far this process has folded; `uid` names the last event, so that another history is noticed."""

    state: State
    uid: str

    @property
    def named(self) -> State:
        """The state for who remembers it longer than this process lives."""
        return replace(self.state, last=self.uid)


class SqliteJournal:
    """See app.store.base.Journal. The file is opened at first use; a place that cannot hold it is refused at once."""

    def __init__(
        self,
        path: Path | str,
        *,
        fs_type: Callable[[Path], str] = filesystem_type,
        busy_timeout_s: float = 5.0,
        poll_s: float = 0.05,
        known: State | None = None,
    ) -> None:
        self.path = Path(path).absolute()
        kind = fs_type(self.path)
        if is_shared_between_hosts(kind):
            raise StoreRefused(
                f"{self.path} lies on {kind}: SQLite's journal needs a disk of this host, on a network mount it locks up or is corrupted. "
                "Put the state folder on a local disk, or keep the journal in Redis: HONE_STORE=redis://HOST:6379/0"
            )
        self._db = Database(self.path, _SCHEMA, SCHEMA_VERSION, _born, busy_timeout_s)
        self._board = Board(self.path.with_name("board.db"), busy_timeout_s)
        self._poll_s = poll_s
        self._seen: _Seen | None = None
        self._known = known
        self._snapshot_seq = 0
        self._news = threading.Condition()
        self._news_seq = 0
        self._closed = False

    def append(self, event: Event, expect: Generation | None = None) -> Event:
        text = data_text(checked(event))
        with self._db.writing(durable=True) as db:
            seen = self._refreshed(db)
            hold_to(expect, seen.state, event.model)
            stored, after = _insert(db, seen.state, event, text, seen.state.seq + 1)
            self._keep_snapshot(db, after)
        self._went_on(after)
        return stored

    def read(self, after: int = 0, limit: int = 1000, model: str = "", newest_first: bool = False) -> Sequence[Event]:
        order = "DESC" if newest_first else "ASC"
        where, values = ("WHERE model = ? AND seq > ?", (model, after)) if model else ("WHERE seq > ?", (after,))
        with self._db.reading() as db:
            return [_event(row) for row in db.execute(f"{_EVENT}{where} ORDER BY seq {order} LIMIT ?", (*values, limit))]

    def state(self) -> State:
        with self._db.reading() as db:
            seen = self._refreshed(db)
        self._remember(seen)
        return seen.named

    def wait(self, after: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        looked_at = (0, 0)
        while not self._closed:
            version = self._db.data_version()
            if version != looked_at and self._head() > after:
                return True
            looked_at = version
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            with self._news:
                if self._news.wait_for(lambda: self._news_seq > after or self._closed, min(self._poll_s, remaining_s)):
                    return self._news_seq > after
        return False

    def recover(self, known: State) -> State:
        before = self._before()
        known = merge.later(known, before)
        with self._db.writing(durable=True) as db:
            current = self._loaded(db)
            if not merge.behind(current.state, known) and not any(_diverged(db, current.state, past) for past in (known, before)):
                self._remember(current)
                return current.named
            event = Event("journal.recovered", data={"state": known})
            _, after = _insert(db, current.state, event, data_text(event), max(current.state.seq, known.seq) + 1)
            self._keep_snapshot(db, after)
        self._went_on(after)
        return after.named

    def acquire(self, lease: str, holder: str, ttl_s: float) -> bool:
        with self._db.writing(durable=False) as db:
            now = since_boot_ns()
            db.execute("DELETE FROM leases WHERE boot != ? OR expires_ns <= ?", (boot_id(), now))
            row = db.execute("SELECT holder FROM leases WHERE name = ?", (lease,)).fetchone()
            if row is not None and row[0] != holder:
                return False
            db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (lease, holder, boot_id(), now + int(ttl_s * 1e9)))
        return True

    def release(self, lease: str, holder: str) -> None:
        with self._db.writing(durable=False) as db:
            db.execute("DELETE FROM leases WHERE name = ? AND holder = ?", (lease, holder))

    def post(self, key: str, value: JSON, ttl_s: float) -> None:
        self._board.post(key, value, ttl_s)

    def board(self, prefix: str = "") -> dict[str, JSON]:
        return self._board.values(prefix)

    def backup(self, path: Path) -> None:
        with self._db.reading() as db:
            backups.write(path, self._refreshed(db).state, (_event(row) for row in db.execute(f"{_EVENT}ORDER BY seq")))

    def restore(self, path: Path) -> State:
        backup = backups.read(path)
        with self._db.writing(durable=True) as db:
            current = self._loaded(db)
            if current.state.seq == 0:
                for event in backup.events:
                    _store(db, event, data_text(event), secrets.token_hex(8))
            last = max(current.state.seq, backup.state.seq, *(event.seq for event in backup.events), 0)
            known = self._seen.state.seq if self._seen is not None else 0
            event = Event("journal.restored", data={"state": backup.state})
            _, after = _insert(db, current.state, event, data_text(event), max(last, known) + 1)
            self._keep_snapshot(db, after)
        self._went_on(after)
        return after.named

    def warnings(self) -> list[str]:
        aside = self.path.parent.glob(f"{self.path.name}.damaged-*")
        names = sorted(path.name for path in aside if path.suffix[9:].isdigit())
        return [f"damaged journals were set aside: {', '.join(names)}; look at the disk, then remove them"] if names else []

    def close(self) -> None:
        self._closed = True
        with self._news:
            self._news.notify_all()
        self._db.close()
        self._board.close()

    def _head(self) -> int:
        with self._db.reading() as db:
            head = _head(db)
        if self._seen is not None and head < self._seen.state.seq:
            raise _went_back(self.path)
        return head

    def _refreshed(self, db: sqlite3.Connection) -> _Seen:
        """What this process has folded and all newer events. Raises StoreWentBack where the file lacks what was seen."""
        seen, before = self._seen, self._before()
        if seen is not None and seen.state.seq > 0:
            rows = db.execute(f"{_EVENT}WHERE seq >= ? ORDER BY seq", (seen.state.seq,))
            first = rows.fetchone()
            if first is not None and (first[0], first[1]) == (seen.state.seq, seen.uid):
                return _folded(seen, rows)
        loaded = self._loaded(db)
        if before is not None and (merge.behind(loaded.state, before) or _diverged(db, loaded.state, before)):
            raise _went_back(self.path)
        return loaded

    def _before(self) -> State | None:
        """The last that was seen of this journal, by this process or, until it saw something itself, by one before."""
        return self._seen.named if self._seen is not None else self._known

    def _loaded(self, db: sqlite3.Connection) -> _Seen:
        """The fold from the snapshot on, or from the first event where there is none that holds."""
        begin = _Seen(State(), "")
        row = db.execute("SELECT uid, state FROM snapshot JOIN events USING (seq, uid) WHERE fold = ?", (FOLD_VERSION,)).fetchone()
        if row is not None:
            try:
                begin = _Seen(state_from_json(loads(row[1])), row[0])
            except Unreadable:
                begin = _Seen(State(), "")
        self._snapshot_seq = begin.state.seq
        return _folded(begin, db.execute(f"{_EVENT}WHERE seq > ? ORDER BY seq", (begin.state.seq,)))

    def _keep_snapshot(self, db: sqlite3.Connection, after: _Seen) -> None:
        if after.state.seq - self._snapshot_seq < SNAPSHOT_EVERY:
            return
        row = (after.state.seq, after.uid, FOLD_VERSION, dumps(after.state))
        db.execute("INSERT OR REPLACE INTO snapshot(id, seq, uid, fold, state) VALUES (1, ?, ?, ?, ?)", row)
        self._snapshot_seq = after.state.seq

    def _remember(self, seen: _Seen) -> None:
        """Keep the later of what two threads folded."""
        with self._news:
            known = self._seen.state if self._seen is not None else State()
            if (seen.state.epoch, seen.state.seq) >= (known.epoch, known.seq):
                self._seen = seen

    def _went_on(self, after: _Seen) -> None:
        self._remember(after)
        with self._news:
            self._news_seq = after.state.seq
            self._news.notify_all()


def _diverged(db: sqlite3.Connection, state: State, past: State | None) -> bool:
    """True where the file went on from an earlier past than `past`."""
    if past is None or not past.last or state.epoch != past.epoch:
        return False
    row = db.execute("SELECT uid FROM events WHERE seq = ?", (past.seq,)).fetchone()
    return row is None or row[0] != past.last


def _born(db: sqlite3.Connection, why: str) -> None:
    if why:
        event = Event("journal.restarted", data={"reason": why})
        _store(db, replace(event, seq=1, at=time.time()), data_text(event), secrets.token_hex(8))


def _insert(db: sqlite3.Connection, state: State, event: Event, text: str, seq: int) -> tuple[Event, _Seen]:
    stored = replace(event, seq=seq, at=time.time(), data=loads(text))
    uid = secrets.token_hex(8)
    _store(db, stored, text, uid)
    return stored, _Seen(fold(state, stored), uid)


def _store(db: sqlite3.Connection, event: Event, text: str, uid: str) -> None:
    row = (event.seq, uid, event.at, event.kind, event.model, event.version, event.job, event.actor, text, event.schema)
    db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def _folded(seen: _Seen, rows: Iterator[tuple[Any, ...]]) -> _Seen:
    uid = seen.uid

    def events() -> Iterator[Event]:
        nonlocal uid
        for row in rows:
            uid = row[1]
            yield _event(row)

    return _Seen(fold_all(seen.state, events()), uid)


def _event(row: tuple[Any, ...]) -> Event:
    """Raises the file's damage where the data is not what can have been written."""
    seq, _, at, kind, model, version, job, actor, text, schema = row
    try:
        data = loads(text)
    except Unreadable as error:
        raise damage(f"the data of event {seq} is {error}") from error
    if not isinstance(data, dict):
        raise damage(f"the data of event {seq} is no object")
    return Event(kind, model, version, job, actor, data, seq, at, schema)


def _head(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT seq FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    return row[0] if row is not None else 0


def _went_back(path: Path) -> StoreUnavailable:
    return StoreWentBack(
        f"{path} lacks events that this process has seen (it was deleted, damaged or replaced by an older copy): "
        "nothing is changed until the last known state is put back"
    )
