"""Cards, proofs and publishing: whatever is killed, filled up or raced, what is there is whole, and a job's try is there once."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.api.auth import token_file
from app.catalog import durable
from app.catalog.cards import CardFile, Cards, Draft, GoldenCard, Proof, RowsProof
from app.catalog.state_folder import StateFolder
from app.domain import RuntimeSettings, Signature, TensorSpec, Verdict
from app.errors import Conflict, InsufficientStorage, InvalidRequest, ModelRejected, NotAllowed, NotFound
from optimizers.artifact import Artifact, sha256_of
from tests.storage import largest_file, read_only, small_disk, tree

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 2)),), True)
GOLDEN = GoldenCard("m", "1", "aa", (CardFile("model.onnx", 3, "bb"),), SIGNATURE, RowsProof(True, "rows alone = rows together"))
FORK = multiprocessing.get_context("fork")


def draft(job: str, try_index: int = 0) -> Draft:
    return Draft(job, try_index, "1", "aa", "1", ({"method": "graph", "level": "all"},), SIGNATURE, RowsProof(True, "proven"), "to test")


@pytest.fixture
def cards(tmp_path: Path) -> Cards:
    cards = Cards(StateFolder(tmp_path / "state").prepare())
    cards.write_golden(GOLDEN)
    return cards


def build(cards: Cards, name: str, data: bytes = b"weights") -> Path:
    """What a job leaves in its scratch folder."""
    folder = cards.state.scratch / name
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph of " + name.encode())
    (folder / "model.onnx.data").write_bytes(data)
    return folder


def assert_whole(cards: Cards) -> None:
    """What must hold at any time, for any observer."""
    built = cards.built("m")
    tries = [(card.draft.job, card.draft.try_index) for card in built]
    assert len(tries) == len(set(tries)), "a job's try was published twice"
    assert [card.version for card in built] == [f"1.{i + 1}" for i in range(len(built))], "a number is missing or was given twice"
    for card in built:
        cards.verify(card)
        assert card.sha256 == sha256_of(*Artifact(cards.path(card)).files())
    assert not cards.problems("m")


def in_child(act: Callable[[], Any]) -> int:
    """Run `act` in a forked process; returns its exit code, negative for a signal."""
    process = FORK.Process(target=act)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


# ---- golden
def test_goldens_card_is_written_once_and_reads_as_it_was(cards: Cards) -> None:
    first = cards.golden("m", "1")
    assert first is not None and replace(first, seen_at=0.0) == GOLDEN and first.seen_at > 0
    assert cards.write_golden(replace(GOLDEN, facts={"other": 1})) == first


def test_another_golden_puts_the_old_card_and_its_proofs_aside(cards: Cards) -> None:
    cards.write_proof(GOLDEN, Proof("h", "aa", "aa", Verdict.PASSED))
    assert [proof.host_class for proof in cards.proofs(GOLDEN, "aa")] == ["h"]
    other = cards.write_golden(replace(GOLDEN, sha256="cc"))
    assert cards.golden("m", "1") == other and cards.proofs(other, "cc") == []
    assert tree(cards.state.version("m", "1")) == ["card-aa.json", "card.json", "proofs-aa", "proofs-aa/h.json"]


def test_facts_may_hold_numpys_numbers_and_what_json_lacks(cards: Cards) -> None:
    card = cards.write_golden(replace(GOLDEN, version="2", facts={"a": np.float32(1.5), "n": float("nan"), "l": [np.int64(3)]}))
    assert cards.golden("m", "2") is not None and json.loads(cards.state.card("m", "2").read_bytes())["facts"] == {
        "a": 1.5,
        "n": None,
        "l": [3],
    }
    assert card.version == "2"


# ---- publishing
def test_built_versions_are_numbered_under_their_golden(cards: Cards) -> None:
    first = cards.publish("m", build(cards, "a"), draft("j1"))
    second = cards.publish("m", build(cards, "b"), draft("j1", 1))
    assert (first.version, second.version) == ("1.1", "1.2") and tree(cards.state.scratch) == []
    assert cards.built("m") == [first, second] and cards.card("m", "1.2") == second
    assert {file.name for file in first.files} == {"model.onnx", "model.onnx.data"} and first.bytes == len("graph of a" + "weights")
    assert cards.publish("m", build(cards, "c"), draft("j2"), taken=["1.7", "2.9", "junk"]).version == "1.8"
    cards.write_golden(replace(GOLDEN, version="2"))
    assert cards.publish("m", build(cards, "d"), replace(draft("j3"), golden="2")).version == "2.1"


def test_the_same_try_is_published_once(cards: Cards) -> None:
    first = cards.publish("m", build(cards, "a"), draft("j"))
    assert cards.publish("m", build(cards, "again"), draft("j")) == first
    assert cards.publish("m", cards.state.scratch / "gone", draft("j")) == first
    assert tree(cards.state.scratch) == []
    assert_whole(cards)


def test_a_job_cannot_publish_when_golden_changed_or_was_removed(cards: Cards) -> None:
    folder = build(cards, "a")
    cards.write_golden(replace(GOLDEN, sha256="cc"))
    with pytest.raises(Conflict, match="replaced"):
        cards.publish("m", folder, draft("j"))
    cards.remove_model("m")
    with pytest.raises(Conflict, match="removed"):
        cards.publish("m", folder, draft("j"))
    with pytest.raises(Conflict, match="removed"):
        cards.publish("other", folder, draft("j"))
    assert cards.built("m") == []


@pytest.mark.parametrize("spoil", ["empty", "absent", "link", "pipe"])
def test_what_a_job_left_is_checked(cards: Cards, tmp_path: Path, spoil: str) -> None:
    folder = build(cards, "a")
    (folder / "model.onnx").unlink()
    if spoil == "empty":
        (folder / "model.onnx").touch()
    elif spoil == "link":
        (folder / "model.onnx").symlink_to(tmp_path)
    elif spoil == "pipe":
        os.mkfifo(folder / "model.onnx")
    with pytest.raises(ModelRejected):
        cards.publish("m", folder, draft("j"))
    assert cards.built("m") == [] and not [name for name in tree(cards.state.root) if durable.TEMPORARY in name]


def _die_at(event: int) -> Callable[[], None]:
    """Arrange that this process is killed at its n-th file operation from now."""
    left = [event]
    watched = {
        "open",
        "os.mkdir",
        "os.link",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.listdir",
        "os.scandir",
        "shutil.rmtree",
        "fcntl.flock",
    }

    def hook(name: str, _: object) -> None:
        if name in watched:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def test_a_kill_at_any_file_operation_loses_nothing_and_publishes_nothing_twice(tmp_path: Path) -> None:
    before_it_was_there = after = 0
    for event in range(1, 500):
        cards = Cards(StateFolder(tmp_path / f"state{event}").prepare())
        cards.write_golden(GOLDEN)
        cards.publish("m", build(cards, "first"), draft("first"))
        folder, arm = build(cards, "built"), _die_at(event)

        def publish(cards: Cards = cards, folder: Path = folder, arm: Callable[[], None] = arm) -> None:
            arm()
            cards.publish("m", folder, draft("killed"))

        code = in_child(publish)
        assert code in (0, -signal.SIGKILL)
        cards.state.prepare()
        assert_whole(cards)
        there = len(cards.built("m")) == 2
        assert there or (folder / "model.onnx").is_file(), "neither published nor still there to publish"
        card = cards.publish("m", folder, draft("killed"))
        assert card.version == "1.2" and len(cards.built("m")) == 2
        assert_whole(cards)
        assert tree(cards.state.scratch) == [] and not [name for name in tree(cards.state.models) if durable.TEMPORARY in name]
        if code == 0:
            break
        before_it_was_there, after = before_it_was_there + (not there), after + there
    assert code == 0 and before_it_was_there >= 15 and after >= 5, (before_it_was_there, after)


def test_kills_at_random_moments_lose_nothing(cards: Cards) -> None:
    chooser = random.Random(7)

    def forever() -> None:
        for count in range(10_000):
            name = f"{os.getpid()}-{count}"
            cards.publish("m", build(cards, name, os.urandom(chooser.randrange(1, 200_000))), draft(name))

    for _ in range(12):
        process = FORK.Process(target=forever)
        process.start()
        time.sleep(chooser.uniform(0.01, 0.12))
        process.kill()
        process.join(60)
        cards.state.prepare()
        assert_whole(cards)
    assert len(cards.built("m")) > 0


def test_processes_that_publish_at_once_get_a_number_each_and_share_a_try(cards: Cards) -> None:
    def publish(who: int) -> None:
        for count in range(6):
            cards.publish("m", build(cards, f"own-{who}-{count}"), draft(f"own-{who}-{count}"))
            cards.publish("m", build(cards, f"shared-{who}-{count}"), draft(f"shared-{count}"))

    processes = [FORK.Process(target=publish, args=(who,)) for who in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(cards.built("m")) == 3 * 6 + 6
    assert_whole(cards)


def test_a_sweep_beside_a_publish_takes_nothing_from_it(cards: Cards) -> None:
    def sweep() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            cards.state.sweep()

    sweeper = FORK.Process(target=sweep)
    sweeper.start()
    try:
        for count in range(25):
            cards.publish("m", build(cards, f"b{count}"), draft(f"j{count}"))
            cards.write_proof(cards.built("m")[-1], Proof("h", cards.built("m")[-1].sha256, "aa", Verdict.PASSED))
    finally:
        sweeper.kill()
        sweeper.join(30)
    assert len(cards.built("m")) == 25
    assert_whole(cards)


# ---- storage
def test_a_disk_that_is_full_at_any_step_leaves_the_job_its_files(tmp_path: Path) -> None:
    failed = 0
    for inodes in range(14, 40):
        with small_disk(tmp_path / f"d{inodes}", 64 << 20, inodes) as disk:
            cards = Cards(StateFolder(disk / "state").prepare())
            cards.write_golden(GOLDEN)
            folder = build(cards, "a")
            before = tree(disk)
            try:
                cards.publish("m", folder, draft("j"))
                break
            except InsufficientStorage as error:
                assert "no room" in str(error)
            assert [name for name in tree(disk) if not name.endswith(".lock")] == [name for name in before if not name.endswith(".lock")]
            failed += 1
    assert failed >= 2


def test_a_copy_from_another_disk_that_finds_no_room_leaves_nothing(cards: Cards, tmp_path: Path) -> None:
    with small_disk(tmp_path / "other", 8 << 20) as other:
        elsewhere = replace(cards, state=cards.state)
        folder = other / "built"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"x" * 300_000)
        before = tree(cards.state.root)
        with largest_file(100_000), pytest.raises(InsufficientStorage):
            elsewhere.publish("m", folder, draft("j"))
        assert tree(cards.state.root) == before
        assert elsewhere.publish("m", folder, draft("j")).version == "1.1" and tree(other) == []
    assert_whole(cards)


def test_room_for_twice_the_size_is_required_before_building(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 40 << 20) as disk:
        cards = Cards(StateFolder(disk / "state").prepare())
        cards.require_space(10 << 20)
        with pytest.raises(InsufficientStorage, match="building a version"):
            cards.require_space(16 << 20)


def test_a_read_only_state_is_said_so(cards: Cards) -> None:
    card = cards.publish("m", build(cards, "a"), draft("j"))
    folder = build(cards, "b")
    with read_only(cards.state.root):
        assert cards.built("m") == [card]
        cards.verify(card)
        for change in (
            lambda: cards.publish("m", folder, draft("k")),
            lambda: cards.remove_weights("m", "1.1"),
            lambda: cards.write_proof(card, Proof("h", card.sha256, "aa", Verdict.PASSED)),
            lambda: cards.write_golden(replace(GOLDEN, version="3")),
            lambda: StateFolder(cards.state.root / "new").prepare(),
        ):
            with pytest.raises(NotAllowed, match="make it writable"):
                change()


def test_the_place_that_refuses_is_named_where_those_above_it_do_not(tmp_path: Path) -> None:
    inner = tmp_path / "models"
    inner.mkdir()
    for refused in (inner, inner / ".hone-tmp-1"):
        with pytest.raises(NotAllowed, match=f"{inner} cannot be written.*make it writable"), durable.storage_errors("preparing", tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied", str(refused))


def test_the_admin_token_says_what_it_needs_and_is_made_once_there_is_room(tmp_path: Path) -> None:
    with largest_file(0), pytest.raises(InsufficientStorage, match=f"admin token: no room in {tmp_path}.*free some"):
        token_file(tmp_path)
    assert token_file(tmp_path) == token_file(tmp_path) != ""


def test_damage_is_found_by_the_hash_and_a_torn_card_is_no_version(cards: Cards) -> None:
    card = cards.publish("m", build(cards, "a"), draft("j"))
    other = cards.publish("m", build(cards, "b"), draft("k"))
    path = cards.path(card)
    spoilt = bytearray(path.read_bytes())
    stamp = path.stat()
    spoilt[3] ^= 1
    path.write_bytes(spoilt)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ModelRejected, match=r"model\.onnx differs"):
        cards.verify(card)
    torn = cards.state.card("m", "1.1")
    torn.write_bytes(torn.read_bytes()[:-40])
    assert cards.built("m") == [other] and "1.1 has no whole card" in cards.problems("m")[0]
    with pytest.raises(NotFound):
        cards.card("m", "1.1")
    assert cards.publish("m", build(cards, "c"), draft("l")).version == "1.3", "a number is never given twice"


def test_a_card_of_a_newer_hone_is_not_misread(cards: Cards) -> None:
    path = cards.state.card("m", "1")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2, "new": True}))
    assert cards.golden("m", "1") is None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    assert cards.golden("m", "1") is not None, "an unknown key alone is ignored"


# ---- weights
def test_weights_go_and_cards_stay(cards: Cards) -> None:
    for name in ("a", "b", "c"):
        cards.publish("m", build(cards, name), draft(name))
    assert cards.prune("m", keep={"1.2"}) == ["1.1", "1.3"] and cards.prune("m", keep={"1.2"}) == []
    assert [cards.has_weights(card) for card in cards.built("m")] == [False, True, False]
    with pytest.raises(NotFound, match="hone optimize m"):
        cards.verify(cards.built("m")[0])
    assert cards.publish("m", build(cards, "d"), draft("d")).version == "1.4"
    assert cards.publish("m", build(cards, "e"), draft("a")).version == "1.1", "the same try is not built into another version"
    with pytest.raises(InvalidRequest):
        cards.remove_weights("m", "1")
    with pytest.raises(NotFound):
        cards.remove_weights("m", "1.9")


def test_a_removed_model_keeps_its_cards_and_its_numbers(cards: Cards) -> None:
    cards.publish("m", build(cards, "a"), draft("a"))
    (cards.state.captured("m")).mkdir()
    (cards.state.reference("m")).mkdir()
    cards.remove_model("m")
    cards.remove_model("never-there")
    assert tree(cards.state.model("m")) == [".lock", "1", "1.1", "1.1/card.json", "1/card-aa.json"]
    cards.write_golden(replace(GOLDEN, sha256="cc"))
    assert cards.publish("m", build(cards, "b"), replace(draft("b"), golden_sha256="cc")).version == "1.2"


# ---- proofs
def test_a_proof_holds_for_these_files_this_golden_and_this_host_class(cards: Cards) -> None:
    card = cards.publish("m", build(cards, "a"), draft("j"))
    settings = RuntimeSettings(intra_op_threads=2, session_options=(("session.x64quantprecision", "1"),))
    proof = Proof(
        "x86_64-avx2-ort1.32.0-cpu", card.sha256, "aa", Verdict.PASSED, "99.4 %", {"agreement": np.float64(0.994)}, settings=settings
    )
    cards.write_proof(card, proof)
    found = cards.proof(card, "aa", proof.host_class)
    assert found is not None and (found.verdict, found.settings, found.fidelity) == (Verdict.PASSED, settings, {"agreement": 0.994})
    assert cards.proof(card, "cc", proof.host_class) is None and cards.proof(card, "aa", "x86_64-avx512-ort1.32.0-cpu") is None
    cards.write_proof(card, replace(proof, verdict=Verdict.FAILED))
    assert [found.verdict for found in cards.proofs(card, "aa")] == [Verdict.FAILED]
    with pytest.raises(Conflict, match="measure again"):
        cards.write_proof(card, replace(proof, sha256="other"))


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_layout_that_was_not_proven_is_not_taken_but_what_makes_it_compute_rightly_is(verdict: Verdict) -> None:
    options = (("session.x64quantprecision", "1"),)
    careful = RuntimeSettings(1, 2, 16, 512)
    found = RuntimeSettings(2, 1, 4, 512, graph_level="basic", session_options=options)
    proof = Proof("here", "aa", "aa", verdict, settings=found)
    expected = found if verdict is Verdict.PASSED else replace(careful, graph_level="basic", session_options=options)
    assert proof.settings_over(careful) == expected and replace(proof, settings=None).settings_over(careful) is None


@pytest.mark.parametrize("text", ["..", "../1", "1/..", "1.2.3", "", "01", "1.0", "a", "1\n", "١"])
def test_no_version_name_reaches_another_path(cards: Cards, text: str) -> None:
    with pytest.raises(InvalidRequest):
        cards.card("m", text)
    with pytest.raises(InvalidRequest):
        cards.proof(GOLDEN, "aa", f"../{text}")


def test_the_state_is_for_its_owner_only(cards: Cards) -> None:
    cards.publish("m", build(cards, "a"), draft("j"))
    for path in (cards.state.root, cards.state.models, cards.state.version("m", "1.1"), cards.state.staging):
        assert path.stat().st_mode & 0o077 == 0, path


def test_weights_and_leftovers_go_from_a_disk_that_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 20, inodes=24) as disk:
        cards = Cards(StateFolder(disk / "state").prepare())
        cards.write_golden(GOLDEN)
        card = cards.publish("m", build(cards, "a"), draft("j"))
        with pytest.raises(OSError, match="No space"):
            for count in range(100):
                (disk / f"filler{count}").touch()
        cards.remove_weights("m", "1.1")
        assert not cards.has_weights(card) and cards.card("m", "1.1") == card


def test_what_cannot_be_a_state_folder_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc/hone")):
        with pytest.raises(NotAllowed, match=f"{place}.*(--state|make it writable)"):
            StateFolder(place).prepare()
