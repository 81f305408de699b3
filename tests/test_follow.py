"""A timeline that is followed: through the store's absence, a broken connection and a restart; the worker's own metrics, and where a server says it is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from app import actions, injection
from app.api import admin
from app.api.admin import Admin
from app.api.auth import Guard
from app.client import ClientError
from app.errors import NotAllowed
from app.main import _announce, _listen
from app.settings import Settings
from app.store.base import StoreUnavailable
from app.telemetry.exposition import serve_metrics
from app.telemetry.metrics import Metrics
from tests.running_server import free_port


class Story:
    """Views whose journal is away at its first two readings; it ends when all was read."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.goes_on = 0

    async def timeline(self, model: str, after: int, limit: int, newest_first: bool) -> list[Any]:
        self.asked.append(after)
        if len(self.asked) <= 2:
            raise StoreUnavailable("away")
        seqs = range(after + 1, 6)
        return [{"seq": seq} for seq in (seqs[::-1] if newest_first else seqs)[:limit]]

    async def news(self, after: int, timeout_s: float) -> int | None:
        return after if len(self.asked) <= 2 + self.goes_on else None


def followed(story: Any, after: int, headers: Sequence[tuple[bytes, bytes]] = (), limit: int = 100) -> str:
    async def all_of_it() -> str:
        scope = {"type": "http", "headers": [(b"authorization", b"Bearer t"), *headers]}
        nothing: Any = None  # is asked for
        answer: Any = await Admin(story, nothing, nothing, Guard("t", "", "")).timeline(
            Request(scope), after=after, limit=limit, follow=True
        )
        return b"".join([part async for part in answer.body_iterator]).decode()

    return asyncio.run(all_of_it())


def test_a_followed_timeline_outlives_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "AWAY_S", 0.0)
    text = followed(Story(), 3)
    assert text.count(": the journal is away") == 2 and "id: 4" in text and "id: 5" in text


def test_a_broken_stream_is_taken_up_after_the_last_event_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "AWAY_S", 0.0)
    story = Story()
    text = followed(story, 1, [(b"last-event-id", b"4")])
    assert story.asked[-1] == 4 and "id: 5" in text and "id: 4" not in text
    assert "id: 2" in followed(Story(), 1, [(b"last-event-id", b"no number")])


def test_who_says_not_from_where_on_gets_the_newest_first_and_then_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the whole journal, from its first event on, whatever the limit."""
    monkeypatch.setattr(admin, "AWAY_S", 0.0)
    story = Story()
    story.goes_on = 1
    assert re.findall(r"id: (\d)", followed(story, 0, limit=2)) == ["4", "5"]
    assert story.asked[-2:] == [0, 5], "and on from the last of them"


class Breaking:
    """A server whose connection breaks in the midst, that is away once, and then refuses the token."""

    def __init__(self) -> None:
        self.afters: list[int] = []

    def follow(self, model: str, after: int) -> Iterator[Any]:
        self.afters.append(after)
        if len(self.afters) == 3:
            raise ClientError("the token is not this server's", 401)
        yield {"seq": after + 1}
        raise ClientError("the connection broke", (0, 503)[len(self.afters) - 1])


def test_following_goes_on_after_a_broken_connection_but_not_against_a_refusal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(actions, "POLL_S", 0.0)
    breaking: Any = Breaking()
    seen: list[int] = []
    with pytest.raises(ClientError, match="token"):
        seen.extend(event["seq"] for event in actions._following(breaking, "", 7))
    assert breaking.afters == [7, 8, 9]
    assert capsys.readouterr().err.count("trying again") == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_workers_metrics_ask_for_a_token_where_they_shall_and_know_ipv6(host: str) -> None:
    tokens: Callable[[], list[str]] = lambda: ["s3cret"]
    port = free_port()
    try:
        server = serve_metrics(host, port, Metrics(), tokens)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    url = f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"
    try:
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert "hone_jobs" in httpx.get(url, headers={"Authorization": "Bearer s3cret"}).text
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_address_that_a_server_tells_can_be_opened(host: str, shown: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hone")
    try:
        listener = _listen(host, 0)
    except NotAllowed as error:
        pytest.skip(f"no {host} here: {error}")
    with listener, _listen(host, 0) as admin:
        _announce(Settings(), [listener, admin])
        told = [f"http://{shown}:{one.getsockname()[1]}" for one in (listener, admin)]
    assert f"on {told[0]} (docs" in caplog.text and f"admin side on {told[1]}\n" in caplog.text


class Building:
    """A server whose loop asked for a build, and at a second look found nothing to do; the build ends `after_s` later."""

    def __init__(self, after_s: float) -> None:
        self._ends_at = monotonic() + after_s
        self._told = 0

    def timeline(self, model: str, after: int, limit: int) -> dict[str, Any]:
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("diagnosis.made", {"cause": "version"}), ("plan.made", {"action": "optimize"}), ("job.requested", {}),
            ("plan.made", {"action": "nothing"}),
        ]  # fmt: skip
        if monotonic() > self._ends_at:
            kinds += [("job.finished", {}), ("recovery.verified", {})]
        fresh = kinds[self._told :]
        self._told = len(kinds)
        return {"events": [{"seq": 1, "at": 0.0, "kind": kind, "model": model, "job": "j", "data": data} for kind, data in fresh]}


def test_a_broken_demo_is_followed_as_long_as_a_build_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "CALM_S", 0.1)
    scene: Any = SimpleNamespace(
        client=Building(1.2), traffic=SimpleNamespace(sent=1, failed=0), after=0, began=monotonic(), name="digits"
    )  # fmt: skip
    found = injection._follow("version", scene, 10.0, lambda line: None)
    assert found["plans"] == ["optimize", "nothing"] and found["recovered_s"] is not None
