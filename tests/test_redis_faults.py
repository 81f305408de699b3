"""Redis gone, slow, flushed, restored to its past, read-only, full, evicting, locked: change pauses, says why, and nothing is undone."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.domain import Event, State
from app.store.base import Journal, StoreRefused, StoreUnavailable, StoreWentBack
from app.store.open import open_journal
from app.store.recovery import catch_up
from app.store.redis import RedisJournal
from tests.journal_story import deployed, desired, job_event, published, requested
from tests.redis_server import RedisServer
from tests.running_server import server as hone_server

pytestmark = pytest.mark.needs("redis-server")
TIMEOUT_S = 0.5
AT_ONCE_S = 12.0
"""Far beyond what a call may take (a few timeouts), for a machine that is busy; far below a minute of hanging."""

Opener = Callable[[], RedisJournal]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path).start()
    yield server
    server.stop()


@pytest.fixture
def another(server: RedisServer) -> Iterator[Opener]:
    opened: list[RedisJournal] = []

    def open_one() -> RedisJournal:
        opened.append(RedisJournal(f"{server.url}?timeout={TIMEOUT_S}", kept_events=50))
        return opened[-1]

    yield open_one
    for journal in opened:
        journal.close()


@pytest.fixture
def journal(another: Opener) -> RedisJournal:
    return another()


def history(journal: Journal) -> State:
    for event in (deployed(), published("1.1"), desired("1.1"), requested("j1"), deployed("n")):
        journal.append(event)
    return journal.state()


def every_call(journal: Journal) -> list[Callable[[], object]]:
    return [
        journal.state,
        journal.read,
        lambda: journal.append(Event("x.y", "m")),
        lambda: journal.wait(0, 30),
        lambda: journal.acquire("l", "a", 1),
        lambda: journal.release("l", "a"),
        lambda: journal.post("k", {}, 1),
        journal.board,
        journal.warnings,
    ]


def assert_away(journal: Journal, match: str = "Redis at 127") -> None:
    for call in every_call(journal):
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable, match=match):
            call()
        assert time.monotonic() - begun < AT_ONCE_S


def eventually(check: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Away


def test_redis_that_is_stopped_is_away_at_once_and_nothing_needs_a_restart(server: RedisServer, journal: RedisJournal) -> None:
    known = history(journal)
    server.stop()
    assert_away(journal)
    server.start()
    with pytest.raises(StoreWentBack, match="restarted without persistence"):
        journal.state()
    assert catch_up(journal, known).models["m"].desired == "1.1"


def test_a_server_that_starts_without_redis_begins_when_it_comes(server: RedisServer, another: Opener) -> None:
    server.stop()
    journal = another()
    assert_away(journal)
    server.start()
    assert journal.append(deployed()).seq == 1


def test_redis_that_does_not_answer_for_five_seconds_is_away_meanwhile(server: RedisServer, journal: RedisJournal) -> None:
    known = history(journal)
    server.pause()
    timer = threading.Timer(5.0, server.resume)
    timer.start()
    with pytest.raises(StoreUnavailable, match=r"no answer in time.*unknown until it answers"):
        journal.append(Event("x.y", "m", data={"in": "pause"}))
    assert_away_once(journal)
    timer.join()
    eventually(lambda: answers(journal))
    assert journal.state().models["m"].desired == "1.1"
    assert len([event for event in journal.read() if event.data == {"in": "pause"}]) <= 1, "written once or not at all"
    assert journal.append(Event("x.y", "m")).seq >= known.seq + 1


def assert_away_once(journal: Journal) -> None:
    begun = time.monotonic()
    with pytest.raises(StoreUnavailable):
        journal.state()
    assert time.monotonic() - begun < 4.5


def answers(journal: Journal) -> bool:
    try:
        journal.state()
    except StoreWentBack:
        raise
    except StoreUnavailable:
        return False
    return True


def test_client_pause_is_a_pause(server: RedisServer, journal: RedisJournal) -> None:
    history(journal)
    server.run("CLIENT", "PAUSE", 3000, "ALL")
    assert_away_once(journal)
    eventually(lambda: answers(journal))


def test_a_connection_that_was_cut_is_made_again_unnoticed(server: RedisServer, journal: RedisJournal) -> None:
    history(journal)
    for number in range(5):
        server.run("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        journal.append(Event("x.y", "m", data={"n": number}))
    assert [event.data["n"] for event in journal.read(after=5)] == [0, 1, 2, 3, 4]


# Emptied


def test_a_waiter_notices_a_flush(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    known = history(journal)
    timer = threading.Timer(0.3, lambda: server.run("FLUSHALL"))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(StoreWentBack):
        journal.wait(known.seq, 60)
    assert time.monotonic() - begun < AT_ONCE_S
    timer.join()
    assert catch_up(journal, known).jobs == known.jobs
    assert not another().wait(known.seq + 1, 0.1)


def test_a_waiter_whose_stream_was_deleted_sees_the_next_event(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    known = history(journal)
    seen: list[bool] = []
    waiter = threading.Thread(target=lambda: seen.append(journal.wait(known.seq, 60)))
    waiter.start()
    time.sleep(0.2)
    server.run("DEL", journal.keys.events)
    another().append(desired("1"))
    waiter.join(AT_ONCE_S)
    assert seen == [True]
    assert journal.state().models["m"].desired == "1"
    assert another().state() == journal.state()


@pytest.mark.parametrize("key", ["meta", "models", "jobs", "model:m"])
def test_a_key_that_was_evicted_is_noticed_and_put_back(server: RedisServer, journal: RedisJournal, another: Opener, key: str) -> None:
    known = history(journal)
    server.run("DEL", f"{{hone}}:{key}")
    with pytest.raises(StoreWentBack, match="noeviction"):
        journal.state()
    with pytest.raises(StoreWentBack):
        another().append(deployed("x"))
    after = catch_up(journal, known)
    assert (after.epoch, after.frozen, after.jobs) == (2, True, known.jobs)
    assert another().state() == after


def test_calls_during_a_flush_storm_never_make_a_false_state(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    known = history(journal)
    others = [another(), another()]
    for turn in range(5):
        server.run("FLUSHALL")
        states = [catch_up(each, known) for each in (journal, *others)]
        assert {state.models["m"].desired for state in states} == {"1.1"}
        assert states[0] == states[1] == states[2]
        assert states[0].epoch == turn + 2
        known = states[0]
    assert [job.state for job in known.jobs.values()] == ["requested"]


def test_a_replica_of_the_past_that_took_over_is_noticed(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    history(journal)
    server.run("SAVE")
    journal.append(desired("1"))
    journal.append(job_event("cancel_asked", "j1"))
    known = journal.state()
    server.stop()
    server.start()  # reads the dump, as a replica that was behind would be promoted
    with pytest.raises(StoreWentBack, match="older replica"):
        journal.state()
    with pytest.raises(StoreWentBack):
        journal.append(desired("1.1"))
    after = catch_up(journal, known)
    assert (after.models["m"].desired, after.jobs["j1"].outcome, after.frozen) == ("1", "cancelled", True)
    assert catch_up(another(), known) == after


def test_a_past_that_went_on_without_us_is_noticed(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    history(journal)
    server.run("SAVE")
    journal.append(Event("x.y", "m", data={"by": "us"}))
    known = journal.state()
    server.stop()
    server.start()
    stranger = another()
    for _ in range(3):
        stranger.append(Event("x.y", "m", data={"by": "them"}))
    with pytest.raises(StoreWentBack):
        journal.state()
    assert journal.recover(known).epoch == 2
    assert stranger.state() == journal.state()


# Refusing


def test_a_read_only_replica_is_read_and_said_to_be_one(server: RedisServer, journal: RedisJournal) -> None:
    known = history(journal)
    server.run("REPLICAOF", "127.0.0.1", 1)
    assert journal.state() == known
    with pytest.raises(StoreUnavailable, match="read-only replica; point HONE_STORE at the primary"):
        journal.append(Event("x.y", "m"))
    with pytest.raises(StoreUnavailable, match="read-only"):
        journal.acquire("l", "a", 1)
    assert any("replica" in warning for warning in journal.warnings())
    server.run("REPLICAOF", "NO", "ONE")
    assert journal.append(Event("x.y", "m")).seq == known.seq + 1


def test_a_full_redis_writes_all_or_nothing(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    known = history(journal)
    server.run("CONFIG", "SET", "maxmemory-policy", "noeviction")
    server.run("CONFIG", "SET", "maxmemory", "1mb")
    with pytest.raises(StoreUnavailable, match=r"memory is full.*nothing was written"):
        journal.append(desired("1"))
    with pytest.raises(StoreUnavailable, match="memory is full"):
        journal.post("k", {}, 1)
    assert journal.state() == another().state() == known
    server.run("CONFIG", "SET", "maxmemory", "0")
    assert journal.append(desired("1")).seq == known.seq + 1


def test_memory_that_runs_out_while_writing_never_leaves_half_an_event(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    history(journal)
    used = int(server.client().info("memory")["used_memory"])
    server.run("CONFIG", "SET", "maxmemory", used + 400_000)
    written = 5
    with pytest.raises(StoreUnavailable, match="memory is full"):
        for _ in range(5000):
            written = RedisJournal.append(journal, Event("x.y", "m", data={"bulk": "x" * 20_000})).seq
    server.run("CONFIG", "SET", "maxmemory", 0)
    assert journal.state().seq == another().state().seq == written
    assert journal.read(newest_first=True, limit=1)[0].seq == written


def test_a_redis_that_evicts_is_warned_of_and_never_silently_believed(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    known = history(journal)
    server.run("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
    used = int(server.client().info("memory")["used_memory"])
    server.run("CONFIG", "SET", "maxmemory", used + 200_000)
    assert any("allkeys-random" in warning and "noeviction" in warning for warning in journal.warnings())
    with server.client() as client:
        for number in range(2000):
            client.set(f"filler:{number}", "x" * 1000)
    try:
        assert journal.state() == known
    except StoreWentBack:
        pass
    server.run("CONFIG", "SET", "maxmemory", "0")
    assert catch_up(journal, known).models["m"].desired == "1.1"
    assert another().state().models["n"].desired == "1"


def test_what_a_person_should_set_is_said(server: RedisServer, journal: RedisJournal) -> None:
    assert [warning for warning in journal.warnings() if "appendonly is off" in warning]
    server.run("CONFIG", "SET", "appendonly", "yes")
    assert journal.warnings() == []


# Bounded, apart, private


def test_the_keys_of_hone_stay_bounded(server: RedisServer, journal: RedisJournal, another: Opener) -> None:
    journal.append(deployed())
    sleeper = another()
    sleeper.state()
    for number in range(400):
        journal.append(requested(f"j{number}"))
        journal.append(job_event("finished", f"j{number}", outcome="kept"))
        journal.post(f"stats:{number % 5}", {"n": number}, 60)
        journal.acquire("controller", "a", 60)
    keys = server.client().keys("*")
    assert isinstance(keys, list)
    assert all(str(key).startswith("{hone}:") for key in keys)
    assert len(keys) <= 12
    assert int(str(server.run("XLEN", journal.keys.events))) <= 200, "trimmed, give or take a node"
    assert int(str(server.run("HLEN", "{hone}:jobs"))) <= 270
    assert sleeper.state() == journal.state() == another().state(), "who slept through the trimming reads the hashes"
    assert sleeper.append(Event("x.y", "m")).seq == 802


def test_values_of_the_board_leave_nothing_behind(server: RedisServer, journal: RedisJournal) -> None:
    for number in range(50):
        journal.post(f"k{number}", {"n": number}, 0.05)
    time.sleep(0.2)
    journal.post("last", {}, 60)
    assert journal.board() == {"last": {}}
    assert int(str(server.run("ZCARD", journal.keys.board_index))) == 1


def test_prefixes_and_databases_are_journals_of_their_own(server: RedisServer) -> None:
    urls = [server.url, f"{server.url}?prefix=other", f"redis://127.0.0.1:{server.port}/1"]
    journals = [open_journal(url) for url in urls]
    for number, journal in enumerate(journals):
        journal.append(deployed(f"m{number}"))
        journal.post("k", {"n": number}, 60)
    for number, journal in enumerate(journals):
        assert list(journal.state().models) == [f"m{number}"]
        assert journal.board() == {"k": {"n": number}}
        assert journal.acquire("controller", f"holder-{number}", 60)
        journal.close()


def test_passwords_and_acl_users(server: RedisServer) -> None:
    rules = ["resetkeys", "~{hone}:*", "-@all", "+@read", "+@write", "+@scripting", "+@stream", "+info", "+@connection", "+time"]
    server.run("ACL", "SETUSER", "hone", "on", ">s3cr et", *rules)
    server.run("ACL", "SETUSER", "default", "off")
    journal = open_journal(f"redis://hone:s3cr%20et@127.0.0.1:{server.port}/0")
    history(journal)
    journal.post("k", {}, 60)
    assert journal.acquire("l", "a", 60)
    assert not journal.wait(5, 0.05)
    assert journal.warnings()
    journal.close()
    for user in ("hone:wrong", ":s3cret", "nobody:s3cret"):
        stranger = open_journal(f"redis://{user}@127.0.0.1:{server.port}/0")
        with pytest.raises(StoreUnavailable, match="refuses the user or password") as refused:
            stranger.state()
        assert "s3cret" not in str(refused.value) + str(refused.value.__cause__)
        stranger.close()


def test_urls_that_cannot_be_meant() -> None:
    with pytest.raises(StoreRefused, match="unknown option 'prefx'; did you mean prefix"):
        open_journal("redis://host/0?prefx=x")
    for url in ("redis://:secret@host:port/0", "redis://:secret@host/0?timeout=soon"):
        with pytest.raises(StoreRefused, match="cannot be read") as refused:
            open_journal(url)
        assert "secret" not in str(refused.value)


def test_a_key_that_is_not_hones_is_left_alone(server: RedisServer, journal: RedisJournal) -> None:
    server.run("SET", "{hone}:meta", "mine")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        journal.append(deployed())
    assert server.run("GET", "{hone}:meta") == "mine"


def test_a_socket_of_this_host(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--unixsocket", str(tmp_path / "r.sock")).start()
    journal = open_journal(f"unix://{tmp_path}/r.sock?db=2&prefix=here")
    try:
        assert journal.append(deployed()).seq == 1
    finally:
        journal.close()
        server.stop()


def test_a_user_without_rights_is_told_which(server: RedisServer) -> None:
    server.run("ACL", "SETUSER", "poor", "on", ">pw", "~*", "+@read", "+@connection")
    journal = open_journal(f"redis://poor:pw@127.0.0.1:{server.port}/0")
    with pytest.raises(StoreUnavailable, match=r"lacks a right.*\+@scripting"):
        journal.state()
    journal.close()


@pytest.mark.needs("openssl")
def test_tls(tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    server = RedisServer(tmp_path)
    tls = RedisServer(tmp_path).port
    options = ("--tls-port", str(tls), "--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-auth-clients", "no")
    server.options = options
    try:
        server.start()
        trusting = open_journal(f"rediss://127.0.0.1:{tls}/0?ssl_ca_certs={tmp_path}/cert.pem")
        assert trusting.append(deployed()).seq == 1
        trusting.close()
        strict = open_journal(f"rediss://127.0.0.1:{tls}/0")
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
            strict.state()
        strict.close()
    finally:
        server.stop()


def test_a_server_says_that_its_store_is_full_and_serves_on(server: RedisServer, tmp_path: Path) -> None:
    """It can be read all the while: only writing tells."""
    with hone_server(tmp_path, demo=True, store=server.url) as running:
        running.ready("digits")
        client = server.client()

        def up() -> str:
            lines = running.call("GET", "/metrics").text.splitlines()
            return next(line for line in lines if line.startswith("hone_store_up"))

        running.until(lambda: up() == "hone_store_up 1.0")
        client.config_set("maxmemory", "1mb")
        running.until(lambda: "memory is full" in running.call("GET", "/v2/health/ready").text, 20)
        assert up() == "hone_store_up 0.0" and running.answers("/v2/health/ready") and running.answers("/v2/models/digits/ready")
        assert "memory is full" in running.admin("GET", "/admin/status")["store_error"]
        client.config_set("maxmemory", "0")
        running.until(lambda: "reason" not in running.call("GET", "/v2/health/ready").json() and up() == "hone_store_up 1.0", 20)
