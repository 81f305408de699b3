"""Closeness of answers on arrays whose right numbers can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optimizers.fidelity import (
    SQNR_CAP_DB,
    Fidelity,
    Floor,
    Met,
    cosines,
    divergence,
    judge,
    predicted,
    relative_errors,
    sqnrs,
    worst_element,
)  # fmt: skip
from optimizers.objections import class_notes, objections, too_few

AGREEMENT = Floor("agreement", 0.99)


def one_hot(classes: NDArray[np.int64], count: int = 3) -> NDArray[np.float32]:
    return (8 * np.eye(count, dtype=np.float32))[classes]


def classified(n: int, misses: int, count: int = 3) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """`misses` of `n` rows fall on the next class."""
    was = np.arange(n) % count
    now = np.where(np.arange(n) < misses, (was + 1) % count, was)
    return {"y": one_hot(was, count)}, {"y": one_hot(now, count)}


@pytest.mark.parametrize(
    ("n", "misses", "met"),
    [(300, 0, Met.MET), (299, 0, Met.TOO_FEW), (1000, 3, Met.MET), (1000, 6, Met.TOO_FEW), (1000, 11, Met.BELOW), (20, 0, Met.TOO_FEW)],
)
def test_a_floor_is_met_by_the_lower_bound_and_by_enough_samples(n: int, misses: int, met: Met) -> None:
    found = judge(*classified(n, misses), AGREEMENT)
    assert found.value == pytest.approx(1 - misses / n)
    assert found.met is met


def test_268_samples_without_a_miss_show_99_percent() -> None:
    floor = Floor("agreement", 0.99, min_samples=1)
    assert judge(*classified(268, 0), floor).met is Met.MET
    short = judge(*classified(267, 0), floor)
    assert short.met is Met.TOO_FEW
    assert "268 without a miss" in too_few(short, floor)


def test_a_class_that_collapsed_fails_though_the_whole_agrees() -> None:
    was = np.repeat([0, 1, 2], [500, 494, 6])
    now = np.where(was == 2, 1, was)
    found = judge({"y": one_hot(was)}, {"y": one_hot(now)}, AGREEMENT)
    assert found.value > 0.99
    assert [c.met for c in found.classes] == [Met.MET, Met.MET, Met.BELOW]
    assert any("class 2 has collapsed: 0 of 6" in text for text in objections(found))


def test_a_rare_class_is_unverified_and_named() -> None:
    was = np.repeat([0, 1, 7], [400, 400, 5])
    found = judge({"y": one_hot(was, 8)}, {"y": one_hot(was, 8)}, AGREEMENT)
    assert objections(found) == []
    assert any("unverified for 1 of 3 predicted classes (7)" in note for note in class_notes("live", found))


def test_of_a_few_samples_only_what_their_bounds_prove_is_held_against_a_candidate_that_others_show() -> None:
    """Three live inputs failed a version for an output of single values, of which 382 named ones had shown that it is kept."""
    rng = np.random.default_rng(0)
    wide, one = rng.normal(size=(300, 64)), rng.normal(size=300)

    def found(n: int, off: float) -> Fidelity:
        noise = np.where(np.arange(300) % 3, 0.0, off)
        return judge({"y": wide[:n], "s": one[:n]}, {"y": wide[:n], "s": (one + noise)[:n]}, Floor("cosine", 0.999))

    few, all_of_them = found(3, 0.5), found(300, 5.0)
    assert objections(few) == ["output 's' beside the judged one differs from golden's"] and objections(few, small=True) == []
    assert objections(all_of_them, small=True) == objections(all_of_them) != []
    assert objections(judge(*classified(60, 1), AGREEMENT)) and not objections(judge(*classified(60, 1), AGREEMENT), small=True)
    assert any("agreement" in text for text in objections(judge(*classified(20, 9), AGREEMENT), small=True))


def test_a_floor_per_class_is_held_where_there_are_samples_enough() -> None:
    was = np.repeat([0, 1], [600, 400])
    now = was.copy()
    now[600:606] = 0  # 6 of 400: not proven below 99 %, but 268 would have shown it and it is not there
    assert objections(judge({"y": one_hot(was)}, {"y": one_hot(now)}, AGREEMENT)) == []
    held = judge({"y": one_hot(was)}, {"y": one_hot(now)}, Floor("agreement", 0.99, per_class=0.99))
    assert [c.met for c in held.classes] == [Met.MET, Met.BELOW]


def test_accuracy_is_relative_to_goldens_and_paired() -> None:
    labels = np.zeros(1000, np.int64)
    was = np.where(np.arange(1000) < 800, 0, 1)  # golden: 80 % right
    now = was.copy()
    now[:20], now[980:] = 1, 0  # 20 lost, 20 won
    found = judge({"y": one_hot(was)}, {"y": one_hot(now)}, Floor("accuracy", 0.98), labels)
    assert (found.golden_accuracy, found.accuracy, found.value) == (0.8, 0.8, 1.0)
    assert found.low == pytest.approx(1 - 0.0105 / 0.8, abs=1e-3)  # 1.645 * sqrt(40) / 1000 = 0.0104
    assert found.met is Met.MET
    assert judge({"y": one_hot(was)}, {"y": one_hot(now)}, Floor("accuracy", 0.99), labels).met is Met.TOO_FEW


def test_kl_by_hand() -> None:
    golden, candidate = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert divergence(golden, candidate) == pytest.approx([expected])
    assert divergence(np.log(golden), np.log(candidate)) == pytest.approx([expected])
    assert divergence(np.array([[1e4, -1e4]]), np.array([[1e4, -1e4]])) == pytest.approx([0.0])


def test_cosine_and_sqnr_by_hand() -> None:
    golden = np.zeros((1, 20), np.float32)
    golden[0, :2] = 3, 4
    candidate = golden.copy()
    candidate[0, 1] = 3
    assert cosines(golden, candidate) == pytest.approx([21 / (5 * 18**0.5)])
    assert sqnrs(golden, candidate) == pytest.approx([10 * np.log10(25)])
    assert sqnrs(golden, golden) == pytest.approx([SQNR_CAP_DB])
    assert sqnrs(np.array([[1e10, 1e-160]]), np.array([[1e10, 0.0]])) == pytest.approx([SQNR_CAP_DB]), "a ratio that no float holds"
    assert cosines(np.zeros((1, 20)), np.zeros((1, 20))) == pytest.approx([1.0])


def test_a_shared_constant_does_not_hide_what_differs() -> None:
    """A regression around 1000: random answers of the same mean have a plain cosine of 0.999999."""
    rng = np.random.default_rng(0)
    golden, random = 1000 + rng.standard_normal((400, 1)), 1000 + rng.standard_normal((400, 1))
    assert cosines(golden, random).mean() < 0.5
    assert cosines(golden, golden + 0.001 * rng.standard_normal((400, 1))).mean() > 0.999
    assert judge({"y": golden}, {"y": golden + 5}, Floor("cosine", 0.999)).met is Met.BELOW


def test_scores_become_classes_as_their_form_says() -> None:
    assert predicted(np.array([[0.1, 0.9], [2, 1]], np.float32)).tolist() == [1, 0]
    assert predicted(np.array([[0.4], [0.6]], np.float32)).tolist() == [[0], [1]]
    assert predicted(np.array([[-3.0], [4.0]], np.float32)).tolist() == [[0], [1]]
    assert predicted(np.array([3, 1], np.int64)).tolist() == [3, 1]
    places = np.zeros((1, 2, 2, 2), np.float32)
    places[0, 1, 0, 1] = 5  # [n, classes, height, width]: class 1 in one place
    assert predicted(places).tolist() == [[[0, 1], [0, 0]]]
    assert predicted(np.array(["cat", "dog", "cat"], object)).tolist() == [0, 1, 0]


def test_texts_are_equal_or_not() -> None:
    golden = np.array([["a", "b"]] * 400, dtype=object)
    candidate = golden.copy()
    candidate[:100, 1] = "c"
    assert judge({"y": golden}, {"y": golden.copy()}, Floor("cosine", 0.999)).met is Met.MET
    assert judge({"y": golden}, {"y": candidate}, Floor("cosine", 0.999)).value == pytest.approx(0.875)


def test_more_non_finite_values_than_golden_are_an_objection_and_equal_ones_are_not() -> None:
    golden = np.ones((400, 20), np.float32)
    golden[0, 0] = np.nan
    more = golden.copy()
    more[5, 3] = np.inf
    same = judge({"y": golden}, {"y": golden.copy()}, Floor("cosine", 0.9))
    assert objections(same) == [] and same.bit_close
    assert any(
        "2 non-finite values, golden's has 1" in text for text in objections(judge({"y": golden}, {"y": more}, Floor("cosine", 0.9)))
    )


def test_the_worst_element_is_named() -> None:
    golden = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    candidate = golden.copy()
    candidate[1, 2, 0] += 2.3
    worst = worst_element("mask", golden, candidate)
    assert worst is not None and (worst.sample, worst.element) == (1, (2, 0))
    assert str(worst) == "mask[1, 2, 0] is 22.3 where golden says 20 (10.00% of its row's largest value)"


def test_relative_errors_survive_zeros_infinities_and_integers() -> None:
    golden = np.array([[0.0, 0.0], [np.inf, 2.0]])
    assert relative_errors(golden, golden).max() == 0
    assert np.isinf(relative_errors(golden, np.array([[0.0, 0.0], [np.nan, 2.0]]))[1, 0])
    assert relative_errors(np.array([[200]], np.uint8), np.array([[100]], np.uint8))[0, 0] == 0.5


def test_an_output_beside_the_judged_one_counts_too() -> None:
    golden, candidate = classified(400, 0)
    feature = np.random.default_rng(0).standard_normal((400, 32)).astype(np.float32)
    golden["feature"], candidate["feature"] = feature, feature[::-1].copy()
    found = judge(golden, candidate, AGREEMENT, judged="y")
    assert found.secondary_below == ("feature",)
    assert any("'feature' beside the judged one" in text for text in objections(found))


def test_no_number_of_samples_shows_a_floor_of_one() -> None:
    floor = Floor("agreement", 1.0)
    found = judge(*classified(1000, 0), floor)
    assert found.met is Met.TOO_FEW and "no number of samples" in too_few(found, floor)


def test_the_report_is_json() -> None:
    import json

    golden, candidate = classified(50, 1)
    candidate["y"][3, 0] = np.nan
    text = json.dumps(judge(golden, candidate, AGREEMENT).to_json(), allow_nan=False)
    assert '"metric": "agreement"' in text
