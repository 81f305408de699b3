"""HONE_STORE as people mistype it: refused with the rule, and without the password that it holds. And a Redis that others write into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.store.base import StoreRefused, StoreUnavailable
from app.store.open import kind_of, open_journal
from tests.journal_story import deployed
from tests.redis_server import RedisServer


@pytest.mark.parametrize(
    "url",
    [
        "redis://:p@ss/SECRET@host:6379/0",
        "redis://:pass/SECRET=1@host:6379/0",
        "redis://:pass?SECRET=1@host:6379/0",
        "redis://host/pass?prefix=SECRET@x",
        "redis://[SECRET@host/0",
        "redis:/:SECRET@host/0",
        "rediss:SECRET@host",
    ],
)
def test_a_url_that_is_none_is_refused_without_its_password(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreRefused, match="percent-encoded") as refused:
        open_journal(url)
    assert "SECRET" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["localhost:6379", "10.0.0.5:6379/0", "[::1]:6379", ":SECRET@localhost:6379/0", "user:SECRET@box:6379"])
def test_an_address_without_its_scheme_is_no_file(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the path of an SQLite file: each host had a journal of its own, and nobody was told."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreRefused, match=r"write redis://[^ ]+:6379/0") as refused:
        open_journal(text)
    assert "SECRET" not in str(refused.value) and not list(tmp_path.iterdir())


def test_what_was_opened_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hone status` said redis of every HONE_STORE."""
    monkeypatch.chdir(tmp_path)
    for text, kind in (
        (f"sqlite://{tmp_path}/a.db", "sqlite"), (str(tmp_path / "b:80"), "sqlite"), ("./c:80", "sqlite"), ("redis://127.0.0.1:1/0", "redis"),
    ):  # fmt: skip
        journal = open_journal(text)
        assert kind_of(journal) == kind, text
        journal.close()


def test_a_password_may_have_any_character_percent_encoded() -> None:
    journal = open_journal("redis://:p%40ss%2FSECRET%3F@127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable, match=r"Redis at 127\.0\.0\.1:1/0") as away:
        journal.state()
    assert "SECRET" not in str(away.value)
    journal.close()


@pytest.mark.parametrize("entry", [{"foo": "bar"}, {"uid": "x", "event": "{"}, {"uid": "x", "event": '{"kind": 5}'}])
def test_an_entry_that_is_not_hones_is_told(entry: dict[Any, Any], tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    journal = open_journal(server.url)
    try:
        journal.append(deployed())
        server.client().xadd("{hone}:events", entry)
        with pytest.raises(StoreUnavailable, match=r"\{hone\}:events is not all Hone's"):
            journal.read()
    finally:
        journal.close()
        server.stop()
