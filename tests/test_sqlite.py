"""The journal's file: private, durable, shared, refused on a network mount, set aside when damaged, and quick after 100,000 events."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.domain import Event, State
from app.store.base import StoreRefused, StoreUnavailable, StoreWentBack
from app.store.codec import dumps
from app.store.database import SET_ASIDE_LIMIT
from app.store.filesystem import _mount_and_type, filesystem_type
from app.store.fold import fold_all
from app.store.open import open_journal
from app.store.recovery import catch_up
from app.store.sqlite import SNAPSHOT_EVERY, SqliteJournal
from tests.journal_story import SHA, deployed, desired, published, requested

Opener = Callable[[], SqliteJournal]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


@pytest.fixture
def another(path: Path) -> Iterator[Opener]:
    opened: list[SqliteJournal] = []

    def open_one() -> SqliteJournal:
        opened.append(SqliteJournal(path, busy_timeout_s=0.5))
        return opened[-1]

    yield open_one
    for journal in opened:
        journal.close()


@pytest.fixture
def journal(another: Opener) -> SqliteJournal:
    return another()


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs `program`, with the store's imports done."""
    begin = "import sys, os, resource, time\nfrom app.domain import Event\nfrom app.store.sqlite import SqliteJournal\n"
    begin += "from app.store.base import StoreUnavailable\nfrom tests.journal_story import *\njournal = SqliteJournal(sys.argv[1])\n"
    command = [sys.executable, "-c", begin + program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


# Where it may lie


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "fuse", "ceph"])
def test_a_network_mount_is_refused_at_once_and_redis_named(path: Path, kind: str) -> None:
    with pytest.raises(StoreRefused, match=rf"journal\.db lies on {kind}: .*HONE_STORE=redis://"):
        SqliteJournal(path, fs_type=lambda _: kind)
    assert not path.parent.exists()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", ""])
def test_a_disk_of_this_host_is_taken(path: Path, kind: str) -> None:
    SqliteJournal(path, fs_type=lambda _: kind).close()


def test_the_kernel_is_asked_what_a_path_lies_on(tmp_path: Path) -> None:
    assert filesystem_type(Path("/proc/self/new/file")) == "proc"
    (tmp_path / "link").symlink_to("/proc")
    assert filesystem_type(tmp_path / "link" / "x") == "proc"
    assert filesystem_type(tmp_path) not in ("", "proc")


def test_mount_points_with_blanks_are_read() -> None:
    line = r"36 35 98:0 /mnt1 /mnt/my\040disk rw,noatime master:1 - nfs4 host:/x rw"
    assert _mount_and_type(line) == (Path("/mnt/my disk"), "nfs4")


def test_urls_and_paths(tmp_path: Path) -> None:
    for url in (tmp_path / "a.db", str(tmp_path / "a.db"), f"sqlite://{tmp_path}/a.db"):
        journal = open_journal(url)
        assert isinstance(journal, SqliteJournal)
        assert journal.path == tmp_path / "a.db"
        journal.close()
    spaced = open_journal(f"sqlite://{tmp_path}/with%20blank.db")
    assert isinstance(spaced, SqliteJournal)
    assert spaced.path.name == "with blank.db"
    for wrong in ("sqlite://relative.db", "sqlite:///", "postgres://host/db"):
        with pytest.raises(StoreRefused, match=r"redis://|three slashes"):
            open_journal(wrong)


def test_opening_asks_for_nothing_that_redis_needs() -> None:
    program = "import sys; from app.store.open import open_journal; open_journal('/tmp/x.db').close(); print('redis' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_every_file_is_for_its_owner_only(journal: SqliteJournal, path: Path) -> None:
    old = os.umask(0)
    try:
        journal.append(deployed())
        journal.post("k", {}, 60)
    finally:
        os.umask(old)
    names = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert set(names) >= {"journal.db", "journal.db-wal", "journal.db-shm", "board.db"}
    assert set(names.values()) == {0o600}


def test_a_file_that_others_could_read_is_made_private(path: Path, another: Opener) -> None:
    path.parent.mkdir()
    path.touch(0o644)
    path.chmod(0o644)
    another().append(deployed())
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_journal_of_a_newer_release_is_refused(journal: SqliteJournal, another: Opener, path: Path) -> None:
    journal.append(deployed())
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StoreRefused, match="newer Hone"):
        another().state()


# Durable, whole, shared


def test_what_was_acknowledged_survives_kill_9(path: Path, another: Opener) -> None:
    writer = child("while True: print(journal.append(Event('x.y', 'm')).seq, flush=True)", path)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(30)]
    writer.kill()
    acknowledged += [int(line) for line in writer.communicate()[0].split()]
    found = [event.seq for event in another().read(limit=100_000)]
    assert found == list(range(1, len(found) + 1))
    assert len(found) - acknowledged[-1] in (0, 1), "at most the one whose acknowledgement was under way"


FILL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
count = 0
try:
    while True:
        journal.append(Event("x.y", "m", data={"n": count, "bulk": "x" * 3000}))
        count += 1
except StoreUnavailable as error:
    print(count, error)
"""


def test_no_room_refuses_the_event_and_leaves_nothing_half_written(path: Path, another: Opener) -> None:
    another().append(deployed())
    count, _, text = output_of(child(FILL, path, 400_000)).partition(" ")
    assert "look at room" in text
    journal = another()
    assert [event.data["n"] for event in journal.read(after=1)] == list(range(int(count)))
    assert journal.append(Event("x.y", "m")).seq == int(count) + 2


READ_ONLY = """
journal.append(deployed())
journal.close()
for name in os.listdir(os.path.dirname(sys.argv[1])):
    os.chmod(os.path.join(os.path.dirname(sys.argv[1]), name), 0o444)
os.chmod(os.path.dirname(sys.argv[1]), 0o555)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
journal = SqliteJournal(sys.argv[1])
for call in (journal.state, lambda: journal.append(deployed()), lambda: journal.post("k", {}, 1), lambda: journal.acquire("l", "a", 1)):
    try:
        call()
        print("done")
    except StoreUnavailable as error:
        print("refused")
"""


def test_a_place_that_cannot_be_written_is_said_to_be_away(tmp_path: Path) -> None:
    folder = tmp_path
    while folder != folder.parent:
        folder.chmod(folder.stat().st_mode | 0o055)
        folder = folder.parent
        if folder.owner() != tmp_path.owner() or folder == Path("/tmp"):
            break
    place = tmp_path / "state"
    place.mkdir()
    try:
        assert output_of(child(READ_ONLY, place / "journal.db")).split() == ["refused"] * 4
    finally:
        place.chmod(0o755)


def test_a_file_that_another_process_holds_is_away_for_a_while(journal: SqliteJournal, path: Path) -> None:
    journal.append(deployed())
    holder = child("with journal._db.writing(True):\n    print('held', flush=True); time.sleep(60)", path)
    assert holder.stdout is not None and holder.stdout.readline()
    begun = time.monotonic()
    with pytest.raises(StoreUnavailable, match="locked"):
        journal.append(Event("x.y"))
    assert time.monotonic() - begun < 20
    assert journal.state().seq == 1, "reading goes on"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert journal.append(Event("x.y")).seq == 2


def test_opening_and_closing_leaves_no_files_open(path: Path) -> None:
    def use() -> None:
        journal = SqliteJournal(path)
        journal.append(Event("x.y"))
        journal.post("k", {}, 1)
        journal.close()

    use()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        use()
    assert len(os.listdir("/proc/self/fd")) == before


def test_waiting_costs_next_to_nothing(journal: SqliteJournal) -> None:
    journal.append(deployed())
    begun = time.process_time()
    assert not journal.wait(1, 1.5)
    assert time.process_time() - begun < 0.3


def test_leases_of_an_earlier_boot_are_over(journal: SqliteJournal, path: Path) -> None:
    assert journal.acquire("controller", "a", 3600)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE leases SET boot = 'another'")
    db.close()
    assert journal.acquire("controller", "b", 60)


# Snapshots


def test_a_snapshot_changes_nothing_but_the_time_it_takes(journal: SqliteJournal, another: Opener, path: Path) -> None:
    journal.append(deployed())
    for number in range(SNAPSHOT_EVERY + 5):
        journal.append(desired("12"[number % 2]))
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT seq FROM snapshot").fetchall() == [(SNAPSHOT_EVERY,)]
        assert another().state() == journal.state() == fold_all(State(), journal.read(limit=10_000))
        for change in ("UPDATE snapshot SET state = 'x'", "UPDATE snapshot SET fold = 99", "UPDATE snapshot SET uid = 'y'"):
            db.execute(change)
            db.commit()
            assert another().state() == journal.state()
    db.close()


def write_many(path: Path, count: int) -> None:
    """A long life of ten models in one transaction, as the file would hold it."""
    rows = []
    for n in range(count):
        model, turn, kind = f"m{n % 10}", n // 10, n // 10 % 8
        job, version = f"m{n % 10}-{turn // 8}", f"1.{turn // 8}"
        event = [
            Event("model.deployed", model, data={"golden": "1", "sha256": SHA}),
            requested(job, model),
            Event("job.claimed", model, "", job, data={"worker": "w", "attempt": 1}),
            published(version, model, job=job),
            Event("version.verified", model, version, job, data={"host_class": "h", "verdict": "passed"}),
            desired(version, model),
            Event("version.removed", model, f"1.{turn // 8 - 20}"),
            Event("job.finished", model, "", job, data={"outcome": "promoted", "report": {"gain": 0.4}}),
        ][kind]
        rows.append((n + 1, f"{n:x}", 1e9 + n, event.kind, event.model, event.version, event.job, event.actor, dumps(event.data), 1))
    with sqlite3.connect(path) as db:
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    db.close()


@pytest.mark.slow
def test_a_hundred_thousand_events_fold_within_a_second_from_a_snapshot(another: Opener, path: Path) -> None:
    another().state()
    write_many(path, 100_000)
    writer = another()
    writer.append(Event("x.y"))
    for _ in range(SNAPSHOT_EVERY - 1):
        writer.append(Event("x.y"))
    reader = another()
    begun = time.process_time()
    state = reader.state()
    took_s = time.process_time() - begun
    assert (state.seq, len(state.models), len(state.models["m3"].built)) == (100_000 + SNAPSHOT_EVERY, 10, 220)
    assert state == writer.state()
    print(f"folded from the snapshot in {took_s:.2f} s of CPU time")
    assert took_s <= 1.0


# Damage


def garble(path: Path, offset: int, length: int) -> None:
    """From another process: closing a file of one's own would drop SQLite's locks."""
    program = "import sys; f = open(sys.argv[1], 'r+b'); f.seek(int(sys.argv[2])); f.write(b'\\xa5' * int(sys.argv[3])); f.close()"
    subprocess.run([sys.executable, "-c", program, str(path), str(offset), str(length)], check=True)


def filled(path: Path, bulk: int = 500) -> State:
    journal = SqliteJournal(path)
    for event in (deployed(), published("1.1"), desired("1.1"), *[Event("x.y", "m", data={"bulk": "x" * bulk})] * 100):
        journal.append(event)
    state = journal.state()
    journal.close()
    return state


@pytest.mark.parametrize(("offset", "length"), [(0, 100), (4096, 60_000), (20_000, 8192)], ids=["header", "many pages", "few pages"])
def test_a_damaged_file_is_set_aside_once_and_the_known_state_put_back(path: Path, another: Opener, offset: int, length: int) -> None:
    known = filled(path)
    garble(path, offset, length)
    journal = another()
    state = journal.state()
    assert (state.frozen, state.epoch, list(state.models)) == (True, 2, [])
    (restarted,) = journal.read()
    assert restarted.kind == "journal.restarted"
    assert "damaged and set aside as journal.db.damaged-1" in restarted.data["reason"]
    state = catch_up(journal, known)
    assert (state.models["m"].desired, state.epoch, state.frozen) == ("1.1", 3, True)
    assert journal.append(Event("loop.unfrozen", actor="ann")).seq == known.seq + 2, "the timeline has a gap that says so"
    assert another().state() == journal.state()
    assert [file.name for file in path.parent.glob("*.damaged-?")] == ["journal.db.damaged-1"]
    assert "journal.db.damaged-1" in journal.warnings()[0]


def test_damage_in_use_is_noticed_and_serving_can_go_on(journal: SqliteJournal, another: Opener, path: Path) -> None:
    known = filled(path, 50_000)  # more than SQLite keeps in memory
    assert journal.state() == known
    follower = another()
    follower.state()
    garble(path, 4096, path.stat().st_size - 4096)
    with pytest.raises(StoreUnavailable):
        for _ in range(3):
            journal.read()
            journal.append(Event("x.y"))
    with pytest.raises(StoreWentBack):
        journal.state()
    assert catch_up(journal, known).models["m"].desired == "1.1"
    assert follower.state() == journal.state(), "who follows goes over to the new file"


def test_many_that_find_the_damage_at_once_set_it_aside_once(path: Path, another: Opener) -> None:
    filled(path)
    garble(path, 0, 200)
    program = "print(journal.append(Event('x.y', data={'by': sys.argv[2]})).seq)"
    seqs = sorted(int(output_of(process)) for process in [child(program, path, n) for n in range(4)])
    assert seqs == [2, 3, 4, 5]
    assert len(list(path.parent.glob("*.damaged-?"))) == 1
    assert another().state().seq == 5


def test_a_disk_that_damages_again_and_again_is_named(path: Path, another: Opener) -> None:
    for number in range(1, SET_ASIDE_LIMIT + 1):
        filled(path)
        garble(path, 0, 200)
        journal = SqliteJournal(path)
        journal.state()
        journal.close()
        assert (path.parent / f"journal.db.damaged-{number}").exists()
    garble(path, 0, 200)
    with pytest.raises(StoreUnavailable, match="the disk is failing"):
        another().state()


def test_an_older_copy_put_in_place_is_noticed(journal: SqliteJournal, path: Path, tmp_path: Path) -> None:
    filled(path)
    shutil.copy(path, tmp_path / "old.db")
    journal.append(desired("1"))
    known = journal.state()
    for file in path.parent.glob("journal.db*"):
        file.unlink()
    shutil.copy(tmp_path / "old.db", path)
    with pytest.raises(StoreWentBack, match="older copy"):
        journal.state()
    assert catch_up(journal, known).models["m"].desired == "1"


def test_a_copy_that_went_on_by_itself_is_noticed(journal: SqliteJournal, path: Path, tmp_path: Path) -> None:
    known = filled(path)
    shutil.copy(path, tmp_path / "old.db")
    journal.append(Event("x.y", "m", data={"by": "us"}))
    known = journal.state()
    for file in path.parent.glob("journal.db*"):
        file.unlink()
    shutil.copy(tmp_path / "old.db", path)
    stranger = SqliteJournal(path)
    for _ in range(3):
        stranger.append(Event("x.y", "m", data={"by": "them"}))
    stranger.close()
    with pytest.raises(StoreWentBack):
        journal.state()
    assert journal.recover(known).epoch == 2
    assert journal.append(Event("x.y")).seq == known.seq + 4


# The board


def test_a_damaged_board_is_thrown_away(journal: SqliteJournal, another: Opener, path: Path) -> None:
    journal.post("k", {"n": 1}, 60)
    board = path.with_name("board.db")
    for side in ("-wal", "-shm"):
        board.with_name(f"board.db{side}").unlink(missing_ok=True)
    garble(board, 0, 4096)
    other = another()
    assert other.board() == {}
    other.post("k", {"n": 2}, 60)
    journal.post("l", {"n": 3}, 60)
    assert journal.board() == other.board() == {"k": {"n": 2}, "l": {"n": 3}}
    assert journal.state() == State()


def test_a_board_that_was_deleted_is_begun_anew(journal: SqliteJournal, path: Path) -> None:
    journal.post("k", {"n": 1}, 60)
    for file in path.parent.glob("board.db*"):
        file.unlink()
    assert journal.board() == {}
    journal.post("k", {"n": 2}, 60)
    assert journal.board() == {"k": {"n": 2}}


def test_the_board_stays_small(journal: SqliteJournal, path: Path) -> None:
    for number in range(2000):
        journal.post(f"k{number % 7}", {"n": "x" * 500, "number": number}, 0.01 if number % 2 else 60)
    assert len(journal.board()) <= 7
    assert sum(file.stat().st_size for file in path.parent.glob("board.db*")) < 8 << 20
