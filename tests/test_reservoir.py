"""The reservoir of live inputs: small, fair, private, and whole on bad disks."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalog import durable
from app.catalog.model_config import Capture
from app.catalog.reservoir import (
    FILL_INTERVAL_S,
    MAX_SAMPLE_BYTES,
    MOST_FOLLOWED_BYTES,
    Kept,
    Reservoir,
    by_form,
    captured_before,
    load_captured,
    victim,
)
from app.catalog.sample_file import MOST_TEXTS, one_row
from app.catalog.tensors import bytes_tensor, elements, to_tensor
from app.domain import Signature, Tensor, TensorSpec
from tests.captures import ROWS, call, opened, take
from tests.storage import read_only, small_disk, tree
from tests.test_cards import in_child

CALLS = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 3)),), False, "rows depend on each other")


# ---- reservoir
def test_nothing_is_taken_before_it_is_known_what_a_row_is(tmp_path: Path) -> None:
    reservoir = Reservoir(tmp_path / "captured")
    assert not reservoir.offer(*call(1)) and not reservoir.pending and reservoir.store_pending() == 0
    assert tree(tmp_path) == []


def test_one_row_of_a_batch_is_kept_and_a_whole_call_where_rows_depend(tmp_path: Path) -> None:
    take(opened(tmp_path / "rows"), *call(10, rows=3))
    rows = load_captured(tmp_path / "rows")
    assert rows is not None and (rows.stacked, rows.origin, rows.inputs["x"].shape) == (True, "captured", (1, 4))
    assert rows.inputs["x"][0, 0] in (10, 11, 12) and len(set(rows.inputs["x"][0])) == 1
    take(opened(tmp_path / "calls", signature=CALLS), *call(10, rows=3))
    calls = load_captured(tmp_path / "calls")
    assert calls is not None and not calls.stacked and calls.inputs["x"][:, :, 0].tolist() == [[10, 11, 12]]


def test_an_input_with_nan_is_kept_only_where_its_answer_has_none(tmp_path: Path) -> None:
    poison, whole = (Tensor("x", "FP32", (1, 4), np.full(4, value, np.float32).tobytes()) for value in (np.nan, 1))
    lost, answer = (Tensor("y", "FP32", (1, 3), np.full(3, value, np.float32).tobytes()) for value in (np.nan, 1))
    for number, (asked, answered, stored) in enumerate([(poison, lost, 0), (poison, answer, 1), (whole, lost, 1)]):
        reservoir = opened(tmp_path / str(number))
        assert reservoir.offer([asked], [answered]) and reservoir.store_pending() == stored


def test_text_and_half_precision_come_back_as_values(tmp_path: Path) -> None:
    signature = Signature(
        (TensorSpec("t", "BYTES", (-1, 2)), TensorSpec("h", "BF16", (-1,)), TensorSpec("n", "INT64", (-1,))), (TensorSpec("y", "FP32", (-1,)),), True
    )  # fmt: skip
    inputs = [
        bytes_tensor("t", (2, 2), ["é".encode(), b"", b"bb", b"ccc"]),
        to_tensor("h", "BF16", np.array([1.5, 1.5], "f4")), to_tensor("n", "INT64", np.array([7, 7], "i8")),
    ]  # fmt: skip
    take(opened(tmp_path / "captured", signature=signature), inputs, [to_tensor("y", "FP32", np.zeros(2, "f4"))])
    found = load_captured(tmp_path / "captured")
    assert found is not None and found.inputs["t"].tolist() in ([["é", ""]], [["bb", "ccc"]])
    assert found.inputs["h"].tolist() == [1.5] and found.inputs["n"].dtype == np.int64


@pytest.mark.parametrize(("rows", "taken"), [(MOST_TEXTS // 2, True), (MOST_TEXTS // 2 + 1, False)])
def test_a_row_of_very_many_texts_is_not_looked_for(rows: int, taken: bool) -> None:
    signature = Signature((TensorSpec("t", "BYTES", (-1, 2)),), (TensorSpec("y", "FP32", (-1,)),), True)
    texts = bytes_tensor("t", (rows, 2), [str(number // 2).encode() for number in range(2 * rows)])
    found = one_row([texts], [to_tensor("y", "FP32", np.zeros(rows, "f4"))], signature)
    assert (found is not None) == taken
    if found is not None:
        first, second = elements(found[0][0])
        assert first == second and 0 <= int(first) < rows


def test_a_call_that_cannot_be_cut_or_is_too_large_is_left(tmp_path: Path) -> None:
    reservoir = opened(tmp_path / "captured")
    inputs, outputs = call(1, rows=2)
    assert not reservoir.offer(inputs, call(1, rows=3)[1]) and not reservoir.pending
    big = opened(tmp_path / "big", signature=replace(CALLS, inputs=(TensorSpec("x", "UINT8", (-1,)),)))
    assert not big.offer([Tensor("x", "UINT8", (MAX_SAMPLE_BYTES + 1,), bytes(MAX_SAMPLE_BYTES + 1))], outputs) and not big.pending


def test_who_follows_sees_each_of_the_next_requests_whatever_is_stored(tmp_path: Path) -> None:
    reservoir = opened(tmp_path / "captured")
    take(reservoir, *call(1))
    reservoir._opens_at = time.monotonic() + 3600
    complete: list[bool] = []
    seen = reservoir.follow(3, lambda: complete.append(True))
    assert seen == [] == complete
    for value in range(10, 15):
        assert not reservoir.offer(*call(value))
    assert complete == [True] and not reservoir.pending and len(reservoir) == 1
    (together,) = by_form(seen)
    assert together.inputs["x"][:, 0].tolist() == [10, 11, 12] and together.stacked
    off = opened(tmp_path / "off", Capture(mode="off"))
    assert off.follow(3, lambda: complete.append(True)) == [] and len(complete) == 2 and not off.offer(*call(1))


def test_who_follows_large_requests_sees_fewer(tmp_path: Path) -> None:
    reservoir = opened(tmp_path / "captured", signature=replace(CALLS, inputs=(TensorSpec("x", "UINT8", (-1,)),)))
    large = [Tensor("x", "UINT8", (MAX_SAMPLE_BYTES,), bytes(MAX_SAMPLE_BYTES))]
    complete: list[bool] = []
    seen = reservoir.follow(24, lambda: complete.append(True))
    for _ in range(24):
        reservoir.offer(large, call(1)[1])
    assert len(seen) == MOST_FOLLOWED_BYTES // MAX_SAMPLE_BYTES and complete == [True]


def test_earlier_samples_are_told_from_later_ones_and_kept_apart_by_form(tmp_path: Path) -> None:
    free = Signature((TensorSpec("x", "FP32", (-1, -1)),), (TensorSpec("y", "FP32", (-1, 3)),), True)
    reservoir = opened(tmp_path / "captured", signature=free)
    for width in (4, 4, 6, 4, 6):
        reservoir._opens_at = 0.0
        take(reservoir, [to_tensor("x", "FP32", np.ones((1, width), "f4"))], call(1)[1])
        time.sleep(0.002)
    moments = [kept.at for kept in reservoir._kept]
    before = captured_before(tmp_path / "captured", moments[4] - 0.0005, 24)
    assert sorted((len(each), each.inputs["x"].shape[1]) for each in before) == [(1, 6), (3, 4)]
    assert sum(map(len, captured_before(tmp_path / "captured", moments[4] + 1, 2))) == 2
    assert captured_before(tmp_path / "captured", moments[0] - 1, 24) == captured_before(tmp_path / "none", time.time(), 24) == []


def test_captured_inputs_are_for_the_owner_only(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        take(opened(tmp_path / "captured"), *call(1), caller="203.0.113.9")
    finally:
        os.umask(previous)
    assert (tmp_path / "captured").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "captured").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"203.0.113" not in path.read_bytes(), "an address is stored"


def test_the_reservoir_stays_within_its_bounds_and_survives_a_restart(tmp_path: Path) -> None:
    capture = Capture(samples=6)
    reservoir = opened(tmp_path / "captured", capture)
    for value in range(10):
        reservoir._opens_at = 0.0
        take(reservoir, *call(value, top=value % 3))
    assert len(reservoir) == 6 == len(list((tmp_path / "captured").glob("*.sample")))
    again = opened(tmp_path / "captured", capture)
    found = again.load()
    assert len(again) == 6 and found is not None and len(found) == 6
    assert len(opened(tmp_path / "captured", Capture(samples=2))) == 2, "a smaller bound holds at once"


def test_too_old_samples_go(tmp_path: Path) -> None:
    take(opened(tmp_path / "captured"), *call(1))
    time.sleep(0.05)
    reservoir = opened(tmp_path / "captured", Capture(max_age_h=0.04 / 3600))
    assert len(reservoir) == 0 and load_captured(tmp_path / "captured") is None


@pytest.mark.parametrize("change", ["off", "clear", "golden"])
def test_switching_off_clearing_and_a_new_golden_delete_everything(tmp_path: Path, change: str) -> None:
    reservoir = opened(tmp_path / "captured")
    take(reservoir, *call(1))
    reservoir._opens_at = 0.0
    assert reservoir.offer(*call(2))
    if change == "off":
        reservoir.configure(Capture(mode="off"), ROWS, True, "g")
        assert not reservoir.offer(*call(3))
    elif change == "golden":
        opened(tmp_path / "captured", golden="another")
    else:
        assert reservoir.clear() == 1
    if change != "golden":
        assert not reservoir.pending and reservoir.store_pending() == 0 and len(reservoir) == 0
    assert tree(tmp_path) == []


def test_a_caller_that_floods_gives_way_to_others(tmp_path: Path) -> None:
    reservoir = opened(tmp_path / "captured", Capture(samples=10, per_caller=3))
    for value in range(12):
        reservoir._opens_at = 0.0
        take(reservoir, *call(value), caller="loud")
    assert len(reservoir) == 10, "alone it may fill what nobody else wants"
    for value in range(7):
        reservoir._opens_at = 0.0
        take(reservoir, *call(100 + value), caller=f"quiet{value}")
    found = reservoir.load()
    assert found is not None and Counter(bool(value >= 100) for value in found.inputs["x"][:, 0]) == {True: 7, False: 3}
    reservoir._opens_at = 0.0
    assert not reservoir.offer(*call(1), caller="loud")
    assert reservoir._opens_at < time.monotonic() + FILL_INTERVAL_S * 60, "its offers must not shut out the others"


def test_classes_are_evened_out(tmp_path: Path) -> None:
    reservoir = opened(tmp_path / "captured", Capture(samples=9))
    for value in range(30):
        reservoir._opens_at = 0.0
        take(reservoir, *call(value, top=0 if value % 5 else 1 + value % 2))
    groups = Counter(kept.group for kept in reservoir._kept)
    assert groups == {"0": 3, "1": 3, "2": 3}


@given(st.lists(st.floats(0, 1000), min_size=3, max_size=40, unique=True))
def test_the_victim_is_never_the_newest_and_keeps_the_span(moments: list[float]) -> None:
    kept = [Kept(Path("x"), at, "", "c", 1) for at in sorted(moments)]
    chosen = victim(kept, per_caller=100)
    assert 0 < chosen < len(kept) - 1


def test_an_offer_that_is_not_due_costs_less_than_two_microseconds(tmp_path: Path) -> None:
    reservoir = opened(tmp_path / "captured")
    inputs, outputs = call(1)
    reservoir._opens_at = time.monotonic() + 3600

    def once() -> float:
        started = time.thread_time()
        for _ in range(20_000):
            reservoir.offer(inputs, outputs, "c")
        return (time.thread_time() - started) / 20_000

    assert min(once() for _ in range(5)) < 2e-6


def test_a_disk_that_is_full_or_read_only_costs_samples_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", 64 << 20, inodes=4) as disk:
        reservoir = opened(disk / "captured")
        for value in range(3):
            reservoir._opens_at = 0.0
            take(reservoir, *call(value))
        assert caplog.text.count("cannot be stored") == 1 and not reservoir.pending, "told once"
        assert not [name for name in tree(disk) if durable.TEMPORARY in name]
    (tmp_path / "ro").mkdir()
    with read_only(tmp_path / "ro"):
        take(opened(tmp_path / "ro" / "captured"), *call(1))


def test_a_damaged_sample_is_left_out(tmp_path: Path) -> None:
    reservoir = opened(tmp_path / "captured")
    for value in range(3):
        reservoir._opens_at = 0.0
        take(reservoir, *call(value))
    first, second, _ = sorted((tmp_path / "captured").glob("*.sample"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"no header")
    found = load_captured(tmp_path / "captured")
    assert found is not None and len(found) == 1
    assert len(opened(tmp_path / "captured")) == 2


def test_a_kill_while_storing_leaves_whole_samples(tmp_path: Path) -> None:
    def store_for_ever() -> None:
        reservoir = opened(tmp_path / "captured")
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        while True:
            reservoir._opens_at = 0.0
            take(reservoir, *call(1, rows=1))

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for _ in range(5):
        assert in_child(store_for_ever) == -signal.SIGALRM
        found, names = load_captured(tmp_path / "captured"), list((tmp_path / "captured").glob("*.sample"))
        assert found is not None and len(found) == len(names)
        durable.sweep(tmp_path / "captured")
        assert not [name for name in tree(tmp_path) if durable.TEMPORARY in name]
