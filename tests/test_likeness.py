"""Quality watched without labels: classes on which a version is another model, doubt that golden does not have, rows of other sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from app.catalog.model_config import ModelConfig
from app.control.normal import LEAST_ROWS, Normal, learned, other_shapes, shape_shift, with_news
from app.control.quality import sureness_shift, worst_class
from app.control.suspicion import Kind, Seen, suspicions
from app.domain import InferenceRequest, InferenceResult
from app.serving.mirror import Mirror
from app.telemetry.block import Block, Cost
from app.telemetry.likeness import Likeness, Row
from app.telemetry.window import Window
from tests.engines import tensor

CLASSIFIER = ModelConfig.model_validate({"task": "classification"})
RNG = np.random.default_rng(0)


def scores(count: int, sharpness: float = 6.0) -> NDArray[np.float32]:
    return (RNG.normal(size=(count, 5)) * sharpness / 2).astype(np.float32)


def rows(golden: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[Row, ...]:
    return Mirror("agreement", 0.99).rows([tensor("y", golden)], [tensor("y", other)])


def likeness(golden: NDArray[np.float32], other: NDArray[np.float32]) -> Likeness:
    found = Likeness()
    for at in range(0, len(golden), 32):
        found.add(rows(golden[at : at + 32], other[at : at + 32]))
    return found


def test_rows_are_held_to_hand_computed_entropy_and_margin() -> None:
    golden = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]], np.float32))
    other = np.array([[0.2, 0.7, 0.1], [0.0, 0.0, 1.0]], np.float32)  # probabilities are left as they are
    first, second = rows(golden, other)
    assert (first.group, first.same, second.group, second.same) == (0, False, 2, True)
    assert first.entropy == pytest.approx(-(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1)), abs=1e-6)
    assert first.margin == pytest.approx(0.5, abs=1e-6) and second.margin == pytest.approx(0.25, abs=1e-6)
    assert second.other_entropy == pytest.approx(0.0, abs=1e-6) and second.other_margin == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("golden", "other"),
    [
        (np.zeros((2, 3), np.float32), np.full((2, 3), np.nan, np.float32)),
        (np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)),
        (np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32)),
        (np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64)),
    ],
)
def test_what_are_no_scores_of_classes_says_nothing(golden: NDArray[np.float32], other: NDArray[np.float32]) -> None:
    assert rows(golden, other) == ()


def test_a_class_that_collapsed_is_found_though_the_whole_meets_its_floor() -> None:
    golden = scores(4000)
    other = golden.copy()
    rare = np.flatnonzero(golden.argmax(1) == 3)[:30]
    seen = np.concatenate([np.flatnonzero(golden.argmax(1) != 3), rare])
    other[rare[:24]] = np.roll(other[rare[:24]], 1, axis=1)
    found = worst_class(likeness(golden[seen], other[seen]), CLASSIFIER)
    assert found is not None and (found.group, found.agreed, found.compared) == (3, 6, 30)
    block = Block(0.0, 300.0, compared=len(seen), agreed=len(seen) - 24, likeness=likeness(golden[seen], other[seen]))
    said = suspicions(Seen([block], block, 0, 0), Normal(), CLASSIFIER, None)
    assert [one.kind for one in said] == [Kind.FIDELITY] and "6 of 30 live rows of class 3" in said[0].text


def test_a_few_flips_spread_over_the_classes_are_no_collapse_unless_a_floor_is_named() -> None:
    golden = scores(3000)
    other = golden.copy()
    flipped = RNG.choice(3000, 60, replace=False)
    other[flipped] = np.roll(other[flipped], 1, axis=1)
    assert worst_class(likeness(golden, other), CLASSIFIER) is None
    strict = ModelConfig.model_validate({"task": "classification", "quality": {"per_class_floor": 0.995}})
    assert worst_class(likeness(golden, other), strict) is not None
    assert worst_class(likeness(golden, other), ModelConfig.model_validate({"task": "regression"})) is None


def test_sureness_is_judged_by_its_size_against_what_was_usual_for_the_version() -> None:
    golden = scores(600)
    noisy = (golden + RNG.normal(size=golden.shape) * 0.05).astype(np.float32)
    fresh = likeness(golden, noisy)
    assert abs(fresh.entropy.effect) < 0.05
    assert sureness_shift(likeness(golden, noisy), fresh) is None
    shift = sureness_shift(likeness(golden, (golden * 0.35).astype(np.float32)), fresh)
    assert shift is not None and shift[0] > 0.5 and shift[1] < -0.2
    surer = sureness_shift(likeness(golden, (golden * 3).astype(np.float32)), fresh)
    assert surer is not None and surer[0] < -0.5 and surer[1] > 0
    assert sureness_shift(likeness(golden[:50], (golden[:50] * 0.35).astype(np.float32)), fresh) is None, "too few"
    softer = likeness(golden, (golden * 0.35).astype(np.float32))
    assert sureness_shift(softer, softer) is None, "a distilled model may be softer from its first hour on"


def test_the_first_hundred_answers_make_up_what_is_usual() -> None:
    golden = scores(64)
    normal = Normal()
    for _ in range(5):
        normal = with_news(normal, Block(0.0, 10.0, likeness=likeness(golden, golden)))
    assert normal.likeness.entropy.count == 128
    doubt = Block(0.0, 300.0, likeness=likeness(scores(300), scores(300) * 0))
    found = suspicions(Seen([doubt], doubt, 0, 0), normal, CLASSIFIER, None)
    assert Kind.CONFIDENCE in [one.kind for one in found]


def sized(counts: dict[int, int]) -> Block:
    found = Block(0.0, 10.0, requests=sum(counts.values()))
    for size, count in counts.items():
        cost = found.costs[0, size, 2] = Cost(count, count, count * 0.001)
        for _ in range(count):
            cost.cpu.add(0.001)
    return found


def test_rows_of_other_sizes_are_an_event_once() -> None:
    normal = Normal()
    for _ in range(3):
        normal = learned(normal, sized({12: 200}), 0)
    normal = with_news(normal, sized({12: 200}))
    assert shape_shift(sized({12: 150, 13: 50}), normal) == pytest.approx(0.25)
    assert other_shapes(normal, sized({12: 150, 13: 50})) is None
    assert other_shapes(normal, sized({14: LEAST_ROWS - 1})) is None, "too few"
    changed = other_shapes(normal, sized({14: 200}))
    assert changed is not None and other_shapes(changed, sized({14: 200})) is None


def test_the_window_keeps_and_merges_what_was_compared() -> None:
    now = [0.0]
    window = Window(clock=lambda: now[0])
    golden = scores(32)
    window.compared("m", "1.1", True, rows(golden, golden))
    now[0] = 60.0
    window.compared("m", "1.1", False, rows(golden, np.roll(golden, 1, axis=1)))
    merged = window.since("m", "1.1", 0.0, sketches=False)
    counted = Counter(golden.argmax(1).tolist())
    assert {group: compared for group, (_, compared) in merged.likeness.groups.items()} == {g: 2 * n for g, n in counted.items()}
    assert merged.likeness.entropy.count == 64 and merged.compared == 2


def test_an_answer_without_rows_is_not_kept_to_be_compared() -> None:
    mirror = Mirror("agreement", 0.99)
    asked, empty = InferenceRequest([tensor("x", scores(3))]), InferenceRequest([tensor("x", scores(0))])
    mirror.offer(empty, InferenceResult([tensor("y", scores(0))], "m", "1", 1, 0.0, 0.0, 0, 0.0, 0.0))
    assert not mirror.kept
    mirror.opens_at = 0.0
    mirror.offer(asked, InferenceResult([tensor("y", scores(3))], "m", "1", 1, 0.0, 0.0, 3, 0.0, 0.0))
    assert len(mirror.kept) == 1
