"""Opens the journal that a URL or path names. The Redis driver is imported in its branch, so that SQLite needs none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from app.domain import State
from app.store.base import Journal, StoreRefused
from app.store.sqlite import SqliteJournal

REDIS_SCHEMES = ("redis", "rediss", "unix")
_HOST_AND_PORT: Final = re.compile(r"(?:[^/]*@)?((?:[^/@:\s]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5})(?:/[0-9]*)?")
"""Redis's address without its scheme; a file of such a name has a folder before it."""


def open_journal(url_or_path: str | Path, known: State | None = None) -> Journal:
    """`/path/journal.db`, `sqlite:///path/journal.db`, `redis://[user:password@]host[:port]/db[?prefix=hone]` or `rediss://…`.

    `known` is what a process before this one saw: a store that lacks some of it takes nothing until `recover` has put it back.
    Nothing is connected yet. Raises StoreRefused for an unknown kind of URL and for a place that cannot hold a journal.
    """
    scheme = "" if isinstance(url_or_path, Path) else url_or_path.partition(":")[0].lower()
    if isinstance(url_or_path, Path) or ("://" not in url_or_path and scheme not in REDIS_SCHEMES):
        if isinstance(url_or_path, str) and (named := _HOST_AND_PORT.fullmatch(url_or_path)):
            raise StoreRefused(
                f"{named[1]} says not what kind of store is there: write redis://{named[1]}/0 for Redis, or ./{named[1]} for a file of that name"
            )
        return SqliteJournal(url_or_path, known=known)
    if scheme == "sqlite":
        return SqliteJournal(_sqlite_path(url_or_path), known=known)
    if scheme in REDIS_SCHEMES:
        from app.store.redis import RedisJournal

        return RedisJournal(url_or_path, known=known)
    raise StoreRefused(f"no store is known by {scheme}://: give a path, sqlite:///PATH, redis://HOST:6379/0 or rediss://HOST:6379/0")


def kind_of(journal: Journal) -> str:
    """What was opened, for people."""
    return "sqlite" if isinstance(journal, SqliteJournal) else "redis"


def _sqlite_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc or len(parts.path) < 2:
        raise StoreRefused(f"{url}: write sqlite:///ABSOLUTE/PATH with three slashes, or give the plain path")
    return Path(unquote(parts.path))
