"""Which requests share a call, in which order, how they lie in the arena, and whose output is whose."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import InferenceRequest, InferenceResult, Tensor
from app.errors import InvalidRequest
from app.serving.batcher import Queue, Work, key_of
from app.serving.layout import Planner, Sizes, gather, split, wanted
from app.serving.rates import Rates
from app.serving.shm import ALIGNMENT, Arena, read_all, write_all
from tests.engines import request


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def work(loop: asyncio.AbstractEventLoop, batchable: bool = True, priority: int = 0, **arrays: Any) -> Work:
    made = request(priority=priority, **arrays)
    key, rows, alone = key_of(made.inputs, batchable)
    future: asyncio.Future[InferenceResult] = loop.create_future()
    return Work(made, key, rows, alone, future, 0.0)


def floats(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_requests_of_one_kind_share_a_batch_up_to_the_limit_of_rows(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue()
    pieces = [work(loop, x=floats(rows, 3)) for rows in (1, 2, 3, 1, 2)]
    for piece in pieces:
        queue.push(piece)
    assert queue.take(4) == pieces[:2], "the third would pass the limit, and nobody overtakes it"
    assert queue.take(4) == pieces[2:4]
    assert queue.take(4) == pieces[4:]
    assert (len(queue), queue.rows) == (0, 0)


def test_a_request_larger_than_the_limit_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue()
    large, small = work(loop, x=floats(9, 3)), work(loop, x=floats(1, 3))
    queue.push(large)
    queue.push(small)
    assert queue.take(4) == [large]
    assert queue.take(4) == [small]


def test_what_was_taken_is_let_go_while_others_wait(loop: asyncio.AbstractEventLoop) -> None:
    """Large bodies were kept until the queue was empty, and then all freed at once: 32 of 100 MB held up the event loop for 600 ms."""
    queue = Queue()
    for _ in range(4):
        queue.push(work(loop, x=floats(9, 3)))
    for left in (3, 2, 1):
        taken = weakref.ref(queue.take(4)[0].future)
        assert taken() is None and len(queue) == left


@pytest.mark.parametrize(
    "other",
    [
        {"x": floats(1, 4)},
        {"x": floats(1, 3).astype(np.float64)},
        {"y": floats(1, 3)},
        {"x": floats(1, 3), "y": floats(1, 3)},
    ],
    ids=["shape", "datatype", "name", "one more input"],
)
def test_requests_that_differ_in_anything_but_rows_do_not_mix(other: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue()
    first, stranger, third = work(loop, x=floats(1, 3)), work(loop, **other), work(loop, x=floats(2, 3))
    for piece in (first, stranger, third):
        queue.push(piece)
    assert queue.take(8) == [first, third]
    assert queue.take(8) == [stranger]


@pytest.mark.parametrize(
    "arrays",
    [{"x": floats(2, 3), "s": np.float32(1)}, {"x": floats(2, 3), "y": floats(1, 3)}, {"x": floats(0, 3)}],
    ids=["scalar", "rows differ", "no rows"],
)
def test_requests_without_common_rows_run_alone(arrays: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue()
    pieces = [work(loop, **arrays) for _ in range(2)]
    for piece in pieces:
        queue.push(piece)
    assert [queue.take(8), queue.take(8)] == [[pieces[0]], [pieces[1]]]


def test_what_is_not_proven_batchable_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue()
    pieces = [work(loop, batchable=False, x=floats(1, 3)) for _ in range(2)]
    for piece in pieces:
        queue.push(piece)
    assert queue.take(8) == pieces[:1]


def test_priority_goes_first_zero_is_the_middle_and_order_of_arrival_decides_within(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue()
    low, default, high, default_too = (work(loop, priority=p, x=floats(1, 3)) for p in (9, 0, 1, 0))
    for piece in (low, default, high, default_too):
        queue.push(piece)
    assert queue.rows_before(default.priority) == 3
    assert [queue.take(1)[0] for _ in range(4)] == [high, default, default_too, low]


def test_a_batch_is_filled_up_from_lower_levels(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue()
    low, high = work(loop, priority=9, x=floats(1, 3)), work(loop, priority=1, x=floats(1, 3))
    queue.push(low)
    queue.push(high)
    assert queue.take(8) == [high, low]


def test_a_level_goes_with_the_last_of_its_work(loop: asyncio.AbstractEventLoop) -> None:
    """Callers choose priorities: ever new ones must not make the next batch ever slower while the queue is never empty."""
    queue = Queue()
    waits = work(loop, priority=5000, x=floats(1, 3))
    queue.push(waits)
    for priority in range(1, 1001):
        piece = work(loop, priority=priority, x=floats(1, 3))
        queue.push(piece)
        if priority % 2:
            assert queue.take(1) == [piece]
        else:
            queue.drop(piece)
        assert len(queue._order) == len(queue._levels) == 1
    assert list(queue) == [waits] and queue.take(1) == [waits] and not queue._order


def test_dropped_work_is_never_taken_and_not_counted(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue()
    pieces = [work(loop, x=floats(1, 3)) for _ in range(500)]
    for piece in pieces:
        queue.push(piece)
    for piece in pieces[::2]:
        queue.drop(piece)
        queue.drop(piece)
    assert (len(queue), queue.rows) == (250, 250)
    assert list(queue) == pieces[1::2]
    taken = []
    while batch := queue.take(7):
        taken += batch
    assert taken == pieces[1::2]
    assert (len(queue), queue.rows) == (0, 0)


kinds = st.tuples(st.sampled_from([2, 3]), st.integers(1, 6), st.sampled_from([0, 1, 9]), st.booleans())


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(kinds, st.sampled_from(["take", "drop", "front", "late"])), max_size=60), st.integers(1, 8))
def test_whatever_comes_and_goes_each_piece_is_taken_once_and_batches_are_lawful(steps: list[Any], limit: int) -> None:
    loop = asyncio.new_event_loop()
    queue = Queue()
    inside: list[Work] = []
    taken: list[Work] = []
    for step in steps:
        if step == "take":
            batch = queue.take(limit)
            assert bool(batch) == bool(inside)
            if len(batch) > 1:
                assert sum(piece.rows for piece in batch) <= limit
                assert len({piece.key for piece in batch}) == 1
                assert not any(piece.alone for piece in batch)
            if batch:
                assert batch[0].level == min(piece.level for piece in inside)
                assert len({piece.late for piece in batch}) == 1 or batch[0].late, "who is in time does not wait for a larger call"
            for piece in batch:
                inside.remove(piece)
            taken += batch
        elif step == "drop":
            if inside:
                queue.drop(inside.pop(len(inside) // 2))
        elif step == "front":
            if taken:
                piece = taken.pop()
                queue.push(piece, front=True)
                inside.append(piece)
        elif step == "late":
            for piece in queue.heads():
                assert not piece.late and piece in inside
                queue.fall_behind(piece)
        else:
            width, rows, priority, batchable = step
            piece = work(loop, batchable=batchable, priority=priority, x=np.zeros((rows, width), np.float32))
            queue.push(piece)
            inside.append(piece)
        assert len(queue) == len(inside)
        assert queue.rows == sum(piece.rows for piece in inside)
        assert sorted(map(id, queue)) == sorted(map(id, inside))
        late = [piece for piece in inside if piece.late]
        assert (queue.late, queue.late_rows) == (len(late), sum(piece.rows for piece in late))
        assert (queue.oldest_late() in late) if late else queue.oldest_late() is None
    loop.close()


def test_a_batch_lies_input_by_input_row_by_row_aligned(loop: asyncio.AbstractEventLoop) -> None:
    batch = [work(loop, x=floats(n, 3), y=np.full((n, 1), n, np.int64)) for n in (1, 2)]
    plan = Planner().plan(batch, 3, texts_out=False)
    inputs, outputs, end, parts = orjson.loads(plan.message)
    arena = Arena()
    assert write_all(arena.fd, gather(batch, plan)) == end
    assert outputs is None
    assert parts is None
    (name, datatype, shape, offset, size), second = inputs
    assert (name, datatype, shape) == ("x", "FP32", [3, 3])
    stored = np.frombuffer(read_all(arena.fd, size, offset), np.float32).reshape(shape)
    assert np.array_equal(stored, np.concatenate([floats(1, 3), floats(2, 3)]))
    assert second[3] % ALIGNMENT == 0
    assert np.frombuffer(read_all(arena.fd, second[4], second[3]), np.int64).tolist() == [1, 2, 2]
    arena.close()


def test_more_buffers_than_one_system_call_takes_are_written_whole() -> None:
    arena = Arena()
    pieces = [bytes([n % 251]) * (n % 7) for n in range(5000)]
    assert write_all(arena.fd, pieces) == sum(map(len, pieces))
    assert read_all(arena.fd, sum(map(len, pieces)), 0) == b"".join(pieces)
    with pytest.raises(EOFError, match="were promised"):
        read_all(arena.fd, 10, sum(map(len, pieces)) - 5)
    arena.close()


def test_outputs_are_those_that_anyone_asked_for(loop: asyncio.AbstractEventLoop) -> None:
    def asking(*names: str) -> Work:
        piece = work(loop, x=floats(1, 3))
        piece.request.outputs = names or None
        return piece

    assert wanted([asking("a"), asking("a")]) == ("a",)
    assert wanted([asking("b"), asking("a", "b")]) == ("b", "a")
    assert wanted([asking("b"), asking()]) is None


def test_answers_are_cut_by_rows_and_given_in_the_order_asked(loop: asyncio.AbstractEventLoop) -> None:
    batch = [work(loop, x=floats(rows, 1)) for rows in (1, 2)]
    batch[0].request.outputs = ("q", "p")
    data = floats(3, 2).tobytes() + bytes(40) + np.arange(3, dtype=np.int64).tobytes()
    described: list[Any] = [("p", "FP32", [3, 2], 0, 24, None), ("q", "INT64", [3], 64, 24, None)]
    first, second = split(batch, described, data, 3) or []
    assert [(o.name, o.shape) for o in first] == [("q", (1,)), ("p", (1, 2))]
    assert bytes(second[0].data) == floats(3, 2)[1:].tobytes()
    assert np.frombuffer(second[1].data, np.int64).tolist() == [1, 2]


def test_an_output_without_rows_cannot_be_cut(loop: asyncio.AbstractEventLoop) -> None:
    batch = [work(loop, x=floats(1, 1)), work(loop, x=floats(1, 1))]
    assert split(batch, [("p", "FP32", [], 0, 4, None)], bytes(4), 2) is None
    assert split(batch[:1], [("p", "FP32", [], 0, 4, None)], bytes(4), 1) is not None


@pytest.mark.parametrize("batchable", [True, False])
def test_a_size_that_does_not_add_up_is_refused_before_it_shifts_its_neighbours(batchable: bool) -> None:
    sizes = Sizes()

    def check(data: Any) -> None:
        inputs = [Tensor("x", "FP32", (2, 3), data), Tensor("t", "BYTES", (2,), bytes(11))]
        key, rows, _ = key_of(inputs, batchable)
        sizes.check(inputs, key, rows)

    for _ in range(2):
        check(bytes(24))
        check(memoryview(floats(2, 3)))
        for wrong in (bytes(8), bytes(28), bytearray(23), b""):
            with pytest.raises(InvalidRequest, match=r"'x': shape \[2, 3\] of FP32 takes 24 bytes, not " + str(len(wrong))):
                check(wrong)


def test_memoryviews_with_large_items_are_measured_in_bytes(loop: asyncio.AbstractEventLoop) -> None:
    view = memoryview(floats(2, 3).reshape(-1))
    made = InferenceRequest([Tensor("x", "FP32", (2, 3), view)])
    key, rows, alone = key_of(made.inputs, True)
    piece = Work(made, key, rows, alone, loop.create_future(), 0.0)
    arena = Arena()
    plan = Planner().plan([piece], 2, texts_out=False)
    write_all(arena.fd, gather([piece], plan))
    assert read_all(arena.fd, 24, 0) == floats(2, 3).tobytes()
    arena.close()


def test_rates_know_nothing_first_and_then_follow() -> None:
    rates = Rates()
    assert rates.wall_s(1) == 0.0
    for _ in range(30):
        rates.learn(1, 0.010, 0.008, 0.0)
        rates.learn(8, 0.040, 0.032, 0.0)
    assert rates.wall_s(1) == pytest.approx(0.010)
    assert rates.wall_s(4) == pytest.approx(0.020, abs=0.021), "an unseen size goes by its nearest neighbour"
    assert rates.drain_s(80, 8, 2) == pytest.approx(0.2)
    assert rates.least_wall_s(1000) == pytest.approx(0.040) and rates.least_drain_s(80, 8, 2) == pytest.approx(0.2)
    assert rates.reaches(8) and rates.reaches(2) and not rates.reaches(9)
    assert rates.least_wall_s(4) == pytest.approx(0.010), "no less than one row takes"
    assert rates.rows_within(0.010, 8) == 1
    assert rates.rows_within(1.0, 8) == 8
    for _ in range(60):
        rates.learn(1, 0.020, 0.016, 0.0)
    assert rates.wall_s(1) == pytest.approx(0.020, rel=0.05)
    assert rates.worst_cpu_s(1) == 0.016


def test_rows_of_requests_larger_than_a_batch_are_reckoned_by_what_such_calls_take() -> None:
    rates = Rates()
    for _ in range(6):
        rates.learn(64, 0.080, 0.0, 0.0)
    assert rates.drain_s(128, 16, 2) == pytest.approx(0.080), "two calls on two lanes, not eight of 80 ms"


def test_a_small_call_is_not_expected_to_take_longer_than_a_larger_one_whatever_it_took_in_a_bad_moment() -> None:
    rates = Rates()
    rates.learn(4, 0.2, 0.01, 1.0)
    assert rates.wall_s(4) == 0.2
    for _ in range(3):
        rates.learn(16, 0.01, 0.01, 2.0)
    assert rates.wall_s(4) == rates.wall_s(16) == 0.01 and rates.wall_s(1) <= 0.01
    assert rates.drain_s(4, 16, 1) == 0.01
