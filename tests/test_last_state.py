"""What a process remembers by itself survives crashes, and damage to it is as good as no memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.domain import Event, State
from app.store.codec import dumps, loads, state_from_json
from app.store.last_state import load, save
from tests.journal_story import claimed, deployed, desired, published, requested, settings, told

KNOWN = told(
    deployed(), published("1.1"), desired("1.1", settings={"instances": 2}), settings("1", {"session_options": {"a": "b"}}), requested("j"),
    claimed("j"), deployed("gone"), Event("model.removed", "gone"), Event("mode.changed", "m", data={"mode": "observe"}), Event("loop.frozen"),
)  # fmt: skip


def test_the_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "state" / "last-state.json", State())
    save(tmp_path / "state" / "last-state.json", KNOWN)
    assert load(tmp_path / "state" / "last-state.json") == KNOWN
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["last-state.json"]
    assert (tmp_path / "state" / "last-state.json").stat().st_mode & 0o777 == 0o600


def test_the_name_of_the_last_event_comes_back_and_a_file_from_before_has_none(tmp_path: Path) -> None:
    path = tmp_path / "last-state.json"
    save(path, replace(KNOWN, last="ab12"))
    assert (found := load(path)) is not None and found.last == "ab12"
    assert state_from_json({name: value for name, value in loads(dumps(KNOWN)).items() if name != "last"}) == KNOWN


def test_no_file_is_no_memory(tmp_path: Path) -> None:
    assert load(tmp_path / "none.json") is None
    assert load(tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-3],
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"1.1"', b'"1.2"', 1),
        lambda data: data.replace(b'"format":1', b'"format":2'),
        lambda data: b"\xff\xfe\x00",
        lambda data: b"[]\n[]\n",
        lambda data: b"{}\n{}\n",
        lambda data: b"null",
    ],
)
def test_a_damaged_memory_is_none(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "last-state.json"
    save(path, KNOWN)
    path.write_bytes(damage(path.read_bytes()))
    assert load(path) is None


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    old, young = tmp_path / ".last-state.json.1-aa", tmp_path / ".last-state.json.2-bb"
    old.touch()
    os.utime(old, (1, 1))
    young.touch()
    save(tmp_path / "last-state.json", KNOWN)
    assert {path.name for path in tmp_path.iterdir()} == {"last-state.json", young.name}


def test_a_failed_save_leaves_the_former_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last-state.json"
    save(path, KNOWN)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(path, State())
    assert load(path) == KNOWN
    assert [file.name for file in tmp_path.iterdir()] == ["last-state.json"]
