"""The journal in Redis, for servers, workers and commands on several machines: one hash a model, one trimmed stream of events.

Each process folds by itself and writes by compare-and-set on the uid of the last event, so two writers never build on
the same past. This is the only module that knows the driver, and the only place where keys are named.
"""

from __future__ import annotations

import difflib
import random
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from app.domain import JSON, Event, Generation, State
from app.store import backups, merge, redis_form, redis_lua
from app.store.base import StoreRefused, StoreUnavailable, StoreWentBack
from app.store.codec import Unreadable, data_text, dumps, event_from_json, loads
from app.store.fold import fold, fold_all, hold_to
from app.store.kinds import checked

KEPT_EVENTS: Final = 10_000
TIMEOUT_S: Final = 2.0
NOTHING: Final = "*"
_WAIT_SLICE_S: Final = 0.5
_PAGE: Final = 1000
_RACES: Final = 100
MALFORMED: Final = "the store's URL cannot be read; write redis://[user:password@]host[:port]/db, its parts percent-encoded"
_OPTIONS: Final = frozenset(
    {"prefix", "timeout", "db", "ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"}
)


@dataclass(frozen=True, slots=True)
class Keys:
    """Every key that Hone has in Redis. The braces keep them on one node of a cluster."""

    prefix: str

    @property
    def journal(self) -> list[str]:
        """meta (hash: seq, epoch, uid of the last event, the rest of the state), events (stream), models (set of names), jobs (hash)."""
        return [self._of("meta"), self.events, self._of("models"), self._of("jobs")]

    @property
    def events(self) -> str:
        return self._of("events")

    @property
    def model(self) -> str:
        """Prefix of one hash a model."""
        return self._of("model:")

    @property
    def board(self) -> str:
        """Prefix of one value a name, each with its time to live."""
        return self._of("board:")

    @property
    def board_index(self) -> str:
        return self._of("board-names")

    def lease(self, name: str) -> str:
        return self._of(f"lease:{name}")

    def _of(self, name: str) -> str:
        return f"{{{self.prefix}}}:{name}"


@dataclass(frozen=True, slots=True)
class _Seen:
    """How far this process has folded: `last` is the uid of the last event, `top` the greatest seq of the stream."""

    state: State
    last: str
    top: int

    @property
    def named(self) -> State:
        """The state for who remembers it longer than this process lives."""
        return replace(self.state, last=self.last)

    @property
    def next_seq(self) -> int:
        return max(self.state.seq, self.top) + 1


class RedisJournal:
    """See app.store.base.Journal. Nothing is connected before the first call; no call waits longer than a few timeouts."""

    def __init__(self, url: str, *, kept_events: int = KEPT_EVENTS, known: State | None = None) -> None:
        self._redis, self.address, self.keys, timeout_s = _client(url)
        self._block_s = min(_WAIT_SLICE_S, timeout_s / 2)
        self._kept_events = kept_events
        self._seen: _Seen | None = None
        self._known = known  # until this process has seen something itself
        self._lock = threading.Lock()
        self._closed = False
        self._look, self._load, self._write_script = (self._script(text) for text in (redis_lua.LOOK, redis_lua.LOAD, redis_lua.WRITE))
        self._acquire, self._release = self._script(redis_lua.ACQUIRE), self._script(redis_lua.RELEASE)
        self._post, self._board = self._script(redis_lua.POST), self._script(redis_lua.BOARD)

    def append(self, event: Event, expect: Generation | None = None) -> Event:
        text = data_text(checked(event))
        uid = secrets.token_hex(8)
        for _ in self._races():
            seen, at = self._refreshed()
            hold_to(expect, seen.state, event.model)
            stored = replace(event, seq=seen.next_seq, at=at, data=loads(text))
            after = _Seen(fold(seen.state, stored), uid, stored.seq)
            if self._write(seen, after, [(stored, uid)]):
                return stored
        raise StoreUnavailable(f"{self.address}: {_RACES} other writers were faster; try again")

    def read(self, after: int = 0, limit: int = 1000, model: str = "", newest_first: bool = False) -> Sequence[Event]:
        found: list[Event] = []
        for event in self._events(after, newest_first):
            if len(found) >= limit:
                break
            if not model or event.model == model:
                found.append(event)
        return found

    def state(self) -> State:
        seen, _ = self._refreshed()
        self._remember(seen)
        return seen.named

    def wait(self, after: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self._closed:
            seen, _ = self._refreshed()
            self._remember(seen)
            if seen.state.seq > after:
                return True
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            block_ms = max(1, int(1000 * min(remaining_s, self._block_s)))
            self._command("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", self.keys.events, f"{after}-0")
        return False

    def recover(self, known: State) -> State:
        for _ in self._races():
            before = self._seen.named if self._seen is not None else self._known
            known = merge.later(known, before)
            current, is_whole = self._loaded()
            lost = merge.behind(current.state, known) or any(self._diverged(current, past) for past in (known, before))
            if is_whole and not lost:
                self._remember(current)
                return current.named
            seq = max(current.next_seq, known.seq + 1)
            after = self._write_whole(current, Event("journal.recovered", data={"state": known}), seq, ())
            if after is not None:
                return after
        raise StoreUnavailable(f"{self.address}: other writers were faster; try again")

    def acquire(self, lease: str, holder: str, ttl_s: float) -> bool:
        with self._explained():
            return bool(self._acquire(keys=[self.keys.lease(lease)], args=[holder, _milliseconds(ttl_s)]))

    def release(self, lease: str, holder: str) -> None:
        with self._explained():
            self._release(keys=[self.keys.lease(lease)], args=[holder])

    def post(self, key: str, value: JSON, ttl_s: float) -> None:
        with self._explained():
            self._post(keys=[self.keys.board + key, self.keys.board_index], args=[key, dumps(value), _milliseconds(ttl_s)])

    def board(self, prefix: str = "") -> dict[str, JSON]:
        with self._explained():
            flat = self._board(keys=[self.keys.board_index], args=[self.keys.board, prefix])
        return {name: loads(value) for name, value in sorted(zip(flat[::2], flat[1::2], strict=True))}

    def backup(self, path: Path) -> None:
        state = self.state()
        backups.write(path, state, (event for event in self._events(0, False) if event.seq <= state.seq))

    def restore(self, path: Path) -> State:
        backup = backups.read(path)
        for _ in self._races():
            current, _ = self._loaded()
            earlier = backup.events[-self._kept_events :] if current.top == 0 else ()
            known = self._seen.state.seq if self._seen is not None else 0
            seq = max(current.next_seq, backup.state.seq + 1, known + 1, *(event.seq + 1 for event in earlier))
            after = self._write_whole(current, Event("journal.restored", data={"state": backup.state}), seq, earlier)
            if after is not None:
                return after
        raise StoreUnavailable(f"{self.address}: other writers were faster; try again")

    def warnings(self) -> list[str]:
        with self._explained():
            info = self._redis.info()
        return [f"{self.address}: {warning}" for warning in redis_form.warnings(info)]

    def close(self) -> None:
        """Calls that still run in other threads end by themselves and close their own connections."""
        self._closed = True
        self._redis.connection_pool.disconnect(inuse_connections=False)

    def _script(self, text: str) -> Script:
        return self._redis.register_script(text)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        if self._closed:
            raise StoreUnavailable(f"the journal in {self.address} was closed by this process")
        elsewhere = False  # the name may lead to another primary by now, where only new connections go
        try:
            yield
        except redis.RedisError as error:
            elsewhere = _is_read_only(error)
            raise StoreUnavailable(f"{self.address}: {_why(error)}") from error
        finally:
            if elsewhere or self._closed:
                self._redis.connection_pool.disconnect(inuse_connections=False)

    @contextmanager
    def _ours(self, key: str) -> Iterator[None]:
        """Others may write into the same Redis."""
        try:
            yield
        except (KeyError, Unreadable) as error:
            raise StoreUnavailable(f"{self.address}: what lies under {key} is not all Hone's ({error}); remove what is not") from error

    def _races(self) -> Iterator[int]:
        """Attempts of a compare-and-set; later ones step aside for a moment."""
        for attempt in range(_RACES):
            if attempt:
                time.sleep(random.uniform(0.0, 0.001 * min(attempt, 20)))
            yield attempt

    def _refreshed(self) -> tuple[_Seen, float]:
        """What is folded and all newer events, and Redis's time. Raises StoreWentBack where Redis lacks what was seen."""
        seen = self._seen
        last, lost, entries, at = self._looked(*((seen.last, seen.state.seq) if seen is not None and seen.last else (NOTHING, 0)))
        if lost:
            raise StoreWentBack(
                f"{self.address} lost keys of Hone (evicted, or deleted by hand): nothing is changed until the last known state is put "
                "back; set maxmemory-policy to noeviction"
            )
        if seen is not None and last == seen.last:
            return seen, at
        with self._ours(self.keys.events):
            if seen is not None and seen.last and entries and redis_form.uid_of(entries[0]) == seen.last:
                newer = [redis_form.event_of(entry) for entry in entries[1:]]
                return _Seen(fold_all(seen.state, newer), redis_form.uid_of(entries[-1]), newer[-1].seq), at
        loaded, _ = self._loaded()
        before = seen.named if seen is not None else self._known
        if before is not None and (merge.behind(loaded.state, before) or self._diverged(loaded, before)):
            raise StoreWentBack(
                f"{self.address} lacks events that this process has seen (flushed, restarted without persistence, or failed over to an "
                "older replica): nothing is changed until the last known state is put back"
            )
        return loaded, at

    def _diverged(self, loaded: _Seen, past: State | None) -> bool:
        """True where Redis went on from an earlier past than what was seen before it was loaded."""
        if past is None or not past.last or loaded.state.epoch != past.epoch or loaded.last == past.last:
            return False
        if loaded.state.seq < past.seq:
            return True
        return self._uid_at(past.seq) not in ("", past.last)

    def _loaded(self) -> tuple[_Seen, bool]:
        """All that Redis has, and whether nothing of it is missing."""
        _, lost, _, _ = self._looked(NOTHING, 0)
        with self._explained():
            last, rest, models, jobs, top = self._load(keys=self.keys.journal, args=[self.keys.model])
        with self._ours(self.keys.journal[0]):
            state = redis_form.state_of(rest, models, jobs)
        return _Seen(state, last, int(top.partition("-")[0])), not lost

    def _write(self, before: _Seen, after: _Seen, events: Sequence[tuple[Event, str]]) -> bool:
        """False where another writer was faster. A lost connection is tried once more by the driver, hence the look at the uid."""
        return self._put(before.last, after, events, redis_form.change(before.state, after.state))

    def _write_whole(self, current: _Seen, event: Event, seq: int, earlier: Sequence[Event]) -> State | None:
        text, uid = data_text(event), secrets.token_hex(8)
        _, _, _, at = self._looked(NOTHING, 0)
        stored = replace(event, seq=seq, at=at, data=loads(text))
        after = _Seen(fold(current.state, stored), uid, seq)
        entries = [*((old, secrets.token_hex(8)) for old in earlier), (stored, uid)]
        written = self._put(current.last, after, entries, {**redis_form.change(State(), after.state), "whole": True})
        return after.named if written else None

    def _looked(self, uid: str, seq: int) -> tuple[str, int, list[Any], float]:
        """Uid of the last event, number of keys that are missing, entries from `seq` on where the uid differs (NOTHING: none), time."""
        with self._explained():
            last, lost, entries, at = self._look(keys=self.keys.journal, args=[self.keys.model, uid, seq])
        return last, lost, entries, float(at)

    def _put(self, last: str, after: _Seen, events: Sequence[tuple[Event, str]], change: JSON) -> bool:
        rest = replace(after.state, models={}, jobs={})
        meta = {"seq": str(after.state.seq), "epoch": str(after.state.epoch), "last": after.last, "rest": dumps(rest)}
        entries = [[f"{event.seq}-0", uid, dumps(event)] for event, uid in events]
        text = dumps({**change, "events": entries, "meta": meta})
        with self._explained():
            written = self._write_script(keys=self.keys.journal, args=[self.keys.model, last, text, self._kept_events])
        if not written and self._uid_at(after.state.seq) != after.last:
            return False
        self._remember(after)
        return True

    def _uid_at(self, seq: int) -> str:
        """Of the event with this seq; '' where the stream has none."""
        entries = self._command("XRANGE", self.keys.events, f"{seq}-0", f"{seq}-0")
        return str(entries[0][1]["uid"]) if entries else ""

    def _command(self, *arguments: str | int) -> Any:
        with self._explained():
            return self._redis.execute_command(*arguments)  # type: ignore[no-untyped-call]

    def _events(self, after: int, newest_first: bool) -> Iterator[Event]:
        """Events of the stream, page by page."""
        low, high = f"({after}-{2**63}", "+"
        while True:
            command = ("XREVRANGE", self.keys.events, high, low) if newest_first else ("XRANGE", self.keys.events, low, high)
            entries = self._command(*command, "COUNT", _PAGE)
            with self._ours(self.keys.events):
                page = [event_from_json(loads(fields["event"])) for _, fields in entries]
            yield from page
            if len(entries) < _PAGE:
                return
            low, high = (low, f"({entries[-1][0]}") if newest_first else (f"({entries[-1][0]}", high)

    def _remember(self, seen: _Seen) -> None:
        """Keep the later of what two threads folded."""
        with self._lock:
            known = self._seen.state if self._seen is not None else State()
            if (seen.state.epoch, seen.state.seq) >= (known.epoch, known.seq):
                self._seen = seen


def _client(url: str) -> tuple[redis.Redis, str, Keys, float]:
    """The driver's client with bounded waits, the address as it may be shown (no password), the keys, and the timeout in seconds."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StoreRefused(MALFORMED) from error
    if "@" in parts.path + parts.query + parts.fragment:  # a password with / or ? in it ends up there, and would be shown
        raise StoreRefused(MALFORMED)
    options = dict(parse_qsl(parts.query))
    for name in options.keys() - _OPTIONS:
        near = difflib.get_close_matches(name, _OPTIONS, 1) or sorted(_OPTIONS)
        raise StoreRefused(f"the store's URL has an unknown option {name!r}; did you mean {' or '.join(near)}?")
    try:
        timeout_s = float(options.pop("timeout", TIMEOUT_S))
        prefix = options.pop("prefix", "hone")
        client = redis.Redis.from_url(
            f"{url.partition('?')[0]}?{urlencode(options)}",
            decode_responses=True,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        port = f":{parts.port}" if parts.port else ""
    except ValueError as error:
        raise StoreRefused(MALFORMED) from error
    return client, f"Redis at {parts.hostname or 'localhost'}{port}{parts.path}", Keys(prefix), timeout_s


def _milliseconds(ttl_s: float) -> int:
    return max(1, int(ttl_s * 1000))


def _is_read_only(error: redis.RedisError) -> bool:
    return isinstance(error, redis.ReadOnlyError) or "READONLY" in str(error)


def _why(error: redis.RedisError) -> str:
    """The error with its remedy."""
    text = str(error) or type(error).__name__
    if _is_read_only(error):
        return "it is a read-only replica; point HONE_STORE at the primary"
    if isinstance(error, redis.OutOfMemoryError) or text.startswith("OOM") or "-OOM" in text:
        return "its memory is full (maxmemory), nothing was written; give it more, or a Redis of its own"
    if isinstance(error, redis.AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return f"it refuses the user or password ({text}); look at HONE_STORE"
    if isinstance(error, NoPermissionError) or "ACL failure" in text:
        return f"the user lacks a right ({text}); it needs +@read +@write +@stream +@scripting +@connection +time +info on ~{{prefix}}:*"
    if isinstance(error, redis.TimeoutError):
        return f"no answer in time ({text}); whether the last change was written is unknown until it answers"
    return text
