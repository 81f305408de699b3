"""`hone backup` and `hone restore` by hand: what comes back, what stays out, and what a hostile or damaged file gets."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.control.backup import backup
from app.domain import Event, State
from app.settings import Settings
from app.store import last_state
from app.store.merge import behind
from app.store.open import open_journal
from tests.models import scaled
from tests.odd_models import json_input
from tests.running_server import server
from tests.storage import read_only, small_disk

X = json_input("x", "FP32", [1, 4], [1, 2, 3, 4])


def hone(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main([*arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def journal(folder: Path) -> None:
    """An empty store in `folder`/state."""
    (folder / "state").mkdir()
    store = open_journal(str(folder / "state" / "journal.db"))
    store.append(Event("loop.frozen"))
    store.close()


def test_what_a_running_server_removes_in_the_middle_of_a_backup_is_left_out_and_told(tmp_path: Path) -> None:
    journal(tmp_path)
    folder = tmp_path / "state" / "models" / "m" / "1.1"
    for name in ("1.1", "1.2"):
        (folder.parent / name).mkdir(parents=True)
        (folder.parent / name / "model.onnx").write_bytes(b"weights")
        (folder.parent / name / "card.json").write_text("{}")
    settings = Settings(state=tmp_path / "state", repository=tmp_path / "models")

    def meanwhile(text: str) -> None:
        (folder / "model.onnx").unlink(missing_ok=True)

    told = backup(settings, tmp_path / "hone.tar", meanwhile)
    with tarfile.open(tmp_path / "hone.tar") as tar:
        names = tar.getnames()
    assert told["files"] == len(names) and told["notes"] == ["left out: state/models/m/1.1/model.onnx was removed meanwhile"]
    assert "state/models/m/1.1/card.json" in names and "state/models/m/1.2/model.onnx" in names


def answer(running: Any) -> Any:
    return running.call("POST", "/v2/models/m/infer", json={"inputs": [X]}).json()["outputs"][0]["data"]


def test_a_server_comes_back_on_another_machine_from_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Models, settings that a person changed, the epoch: with the first machine's folders gone."""
    first, second, file = tmp_path / "first", tmp_path / "second", str(tmp_path / "hone.tar")
    scaled(first / "models" / "m" / "1" / "model.onnx", 3.0)
    with server(first) as running:
        running.ready("m")
        running.admin("PATCH", "/admin/models/m/settings", 200, json={"queue_limit": 77})
        running.until(lambda: (first / "state" / "models" / "m" / "1" / "card.json").exists())
        folders = ["--state", str(first / "state"), "--repository", str(first / "models")]
        status, out, _ = hone("backup", file, *folders, "--json", capsys=capsys)
        assert status == 0 and json.loads(out)["files"] >= 3
    assert Path(file).stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as tar:
        names = tar.getnames()
    assert {"journal.jsonl", "repository/m/1/model.onnx", "state/models/m/1/card.json"} <= set(names)
    assert not [name for name in names if "token" in name or "captured" in name or name.endswith(".lock")]
    folders = ["--state", str(second / "state"), "--repository", str(second / "models")]
    status, out, _ = hone("restore", file, *folders, capsys=capsys)
    assert status == 0 and "restored m in epoch 2; the loop is frozen" in out
    with server(second) as running:
        running.ready("m")
        assert answer(running) == [3.0, 6.0, 9.0, 12.0]
        assert running.admin("GET", "/admin/models/m")["settings"]["queue_limit"] == 77
        assert running.admin("GET", "/admin/status")["frozen"] is True


def test_what_a_server_remembers_of_an_emptied_store_does_not_undo_a_restore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store was lost twice since the backup: what lies in last-state.json is of a later epoch than the backup's."""
    file, folders = str(tmp_path / "hone.tar"), ["--state", str(tmp_path / "state"), "--repository", str(tmp_path / "models")]
    journal(tmp_path)
    assert hone("backup", file, *folders, capsys=capsys)[0] == 0
    remembered = State(seq=40, epoch=3)
    last_state.save(tmp_path / "state" / "last-state.json", remembered)
    for path in (tmp_path / "state").glob("journal.db*"):
        path.unlink()
    assert hone("restore", file, *folders, capsys=capsys)[0] == 0
    store = open_journal(str(tmp_path / "state" / "journal.db"))
    after = store.state()
    store.close()
    assert after.epoch == 4 and not behind(after, remembered)
    assert last_state.load(tmp_path / "state" / "last-state.json") == after


def test_what_differs_is_named_and_left_unless_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folders = str(tmp_path / "hone.tar"), ["--state", str(tmp_path / "state"), "--repository", str(tmp_path / "models")]
    model = scaled(tmp_path / "models" / "m" / "1" / "model.onnx", 3.0)
    journal(tmp_path)
    assert hone("backup", file, *folders, capsys=capsys)[0] == 0
    kept = model.read_bytes()
    model.write_bytes(b"another")
    status, _, said = hone("restore", file, *folders, capsys=capsys)
    assert status == 1 and f"{model} differ from the backup" in said and model.read_bytes() == b"another"
    assert hone("restore", file, *folders, "--overwrite", capsys=capsys)[0] == 0
    assert model.read_bytes() == kept
    assert hone("restore", file, *folders, capsys=capsys)[0] == 0, "the same files are no conflict"


def backed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, Path, list[str]]:
    """A backup with a file for each of the two folders, an empty target for it, and the target as arguments."""
    first, second, file = tmp_path / "first", tmp_path / "second", str(tmp_path / "hone.tar")
    scaled(first / "models" / "m" / "1" / "model.onnx", 3.0)
    journal(first)
    (first / "state" / "models" / "m" / "1").mkdir(parents=True)
    (first / "state" / "models" / "m" / "1" / "card.json").write_text("{}")
    (second / "models").mkdir(parents=True)
    folders = ["--state", str(first / "state"), "--repository", str(first / "models")]
    assert hone("backup", file, *folders, capsys=capsys)[0] == 0
    return file, second, ["--state", str(second / "state"), "--repository", str(second / "models")]


@pytest.mark.parametrize("mood", [read_only, partial(small_disk, size_bytes=1 << 20)], ids=["read-only", "too small"])
def test_a_repository_that_cannot_take_its_files_is_told_before_anything_is_changed(
    mood: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target, folders = backed_up(tmp_path, capsys)
    with mood(target / "models"):
        status, _, said = hone("restore", file, *folders, capsys=capsys)
    assert status == 1 and str(target / "models") in said, said
    assert not (target / "state" / "models" / "m").exists() and not (target / "state" / "journal.db").exists()


def test_a_restore_that_fails_half_way_says_how_far_it_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _, folders = backed_up(tmp_path, capsys)
    replace = os.replace

    def fails(source: Path, place: Path) -> None:
        if str(place).endswith("model.onnx"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, place)

    monkeypatch.setattr(os, "replace", fails)
    status, _, said = hone("restore", file, *folders, capsys=capsys)
    assert status == 1 and "1 of 2 files were put back" in said and "nothing was changed" not in said
    monkeypatch.undo()
    assert hone("restore", file, *folders, capsys=capsys)[0] == 0


def test_files_that_lie_deep_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = Path("m", "1", *[f"d{number}" for number in range(15)], "vocabulary.txt")
    place = tmp_path / "first" / "models" / deep
    place.parent.mkdir(parents=True)
    place.write_text("words")
    file, target, folders = backed_up(tmp_path, capsys)
    assert hone("restore", file, *folders, capsys=capsys)[0] == 0
    assert (target / "models" / deep).read_text() == "words"


def test_links_that_lead_elsewhere_are_told_of_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    journal(tmp_path)
    (tmp_path / "secret").write_text("not yours")
    (tmp_path / "models" / "m" / "labels.txt").symlink_to(tmp_path / "secret")
    file = tmp_path / "hone.tar"
    status, out, _ = hone("backup", str(file), "--state", str(tmp_path / "state"), "--repository", str(tmp_path / "models"), capsys=capsys)
    assert status == 0 and "left out" in out and "outside the repository" in out
    assert b"not yours" not in file.read_bytes()


def test_a_model_called_captured_and_two_links_to_one_folder_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is left out is a model's captured inputs, in the state folder alone; a link that leads back up ends there."""
    journal(tmp_path)
    scaled(tmp_path / "models" / "captured" / "1" / "model.onnx")
    (tmp_path / "models" / "again").symlink_to("captured")
    (tmp_path / "models" / "captured" / "up").symlink_to("..")
    for folder in ("captured", "reference"):
        (tmp_path / "state" / "models" / "m" / folder).mkdir(parents=True)
        (tmp_path / "state" / "models" / "m" / folder / "inputs").write_text("private")
    file = tmp_path / "hone.tar"
    status, _, said = hone("backup", str(file), "--state", str(tmp_path / "state"), "--repository", str(tmp_path / "models"), capsys=capsys)
    assert status == 0, said
    with tarfile.open(file) as tar:
        names = set(tar.getnames())
    assert {"repository/captured/1/model.onnx", "repository/again/1/model.onnx", "state/models/m/reference/inputs"} <= names
    assert "state/models/m/captured/inputs" not in names


def entry(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
    return info, content


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry("repository/../../evil")], "none that Hone makes"),
        ([entry("/etc/evil")], "none that Hone makes"),
        ([entry("state/admin-token")], "none that Hone makes"),
        ([entry("repository/m/link", b"", tarfile.SYMTYPE)], "none that Hone makes"),
        ([entry("repository/m/pipe", b"", tarfile.FIFOTYPE)], "none that Hone makes"),
        ([entry("repository/m/a")], "holds no journal.jsonl"),
        ([entry("journal.jsonl", b"{}")], "not a whole backup"),
        ([entry("repository/m/a"), entry("repository/m/a")], "not a whole backup"),
    ],
)
def test_nothing_of_a_hostile_file_is_restored(
    entries: list[tuple[tarfile.TarInfo, bytes]], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target = tmp_path / "evil.tar", tmp_path / "target"
    with tarfile.open(file, "w") as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    status, _, told = hone("restore", str(file), "--state", str(target / "state"), "--repository", str(target / "models"), capsys=capsys)
    assert status == 1 and said in told
    assert not (target / "models").exists() and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_backup_is_said_so(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(content)
    status, _, said = hone(
        "restore", str(file), "--state", str(tmp_path / "state"), "--repository", str(tmp_path / "models"), capsys=capsys
    )
    assert status == 1 and "hone backup FILE" in said
    status, _, said = hone("restore", str(tmp_path / "nowhere"), "--state", str(tmp_path / "state"), capsys=capsys)
    assert status == 1 and "nowhere" in said


def test_a_backup_that_cannot_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "such" / "x.tar", "create it"),
        (tmp_path / "x.tar", "no journal"),
    ):
        status, _, said = hone("backup", str(target), "--state", str(tmp_path / "state"), capsys=capsys)
        assert status == 1 and reason in said
    assert not list(tmp_path.iterdir())
