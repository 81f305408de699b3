"""What model.yaml says of inputs and outputs: sections that do not fit are rejected at load, and scores become labels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from pydantic import ValidationError

from app.catalog.processing import Postprocess, Preprocess, Processor
from app.catalog.tensors import bytes_tensor, to_array, to_tensor
from app.domain import Signature, Tensor, TensorSpec
from app.errors import InvalidRequest, ModelFailed, ModelRejected
from tests.pictures import image_processor, image_signature

# -- images: a section that does not fit


@pytest.mark.parametrize(
    ("shape", "datatype", "section", "says"),
    [
        ((-1, 1, 4, 6), "FP32", {}, "RGB makes 3 channels but input 'x' wants 1"),
        ((-1, 24), "FP32", {}, "same number of axes"),
        ((8, 3, 4, 6), "FP32", {}, "8 images at once"),
        ((-1, 3, 4, 6), "INT64", {}, "is INT64"),
        ((-1, 3, 4, 6), "UINT8", {"mean": 0.5}, "without divide_by, mean and std"),
        ((-1, 3, -1, -1), "FP32", {}, "needs `size`"),
        ((-1, 3, 4, 6), "FP32", {"size": 8}, r"images of \[8, 8\] but input 'x' wants \[4, 6\]"),
        ((-1, 3, 4, 6), "FP32", {"resize": "shorter"}, "needs `size`"),
        ((-1, 3, 4, 6), "FP32", {"resize": "shorter", "size": 5}, "larger than the shorter side"),
        ((-1, 3, 4, 6), "FP32", {"resize": "none", "size": 5}, "leave one of them out"),
        ((-1, 3, 4, 6), "FP32", {"input": "y"}, "not 'y'"),
    ],
)
def test_a_section_that_the_model_cannot_take_is_rejected_at_load(
    shape: tuple[int, ...], datatype: str, section: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelRejected, match=says):
        image_processor(shape, datatype, **section)


def test_a_model_that_wants_more_than_an_image_is_rejected() -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, 3, 4, 6)), TensorSpec("y", "FP32", (-1, 2))), ())
    with pytest.raises(ModelRejected, match="also wants y"):
        Processor(signature, Preprocess.model_validate({"image": {"input": "x"}}))


@pytest.mark.parametrize(
    "section",
    [
        {"image": {"size": True}}, {"image": {"size": "8"}}, {"image": {"sise": 8}}, {"image": {"mean": [1, 2]}}, {"image": {"std": 0}},
        {"image": {"mean": float("nan")}}, {"image": {"layout": "HW"}}, {"image": {"max_pixels": 10**12}}, {"text": {"max_length": 0}},
        {"image": {"resize": "shorter", "size": [8, 9]}},
    ],
)  # fmt: skip
def test_typos_and_silent_conversions_in_sections_are_errors(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate(section)


# -- answers


def scores(values: Any, datatype: str = "FP32", name: str = "scores") -> list[Tensor]:
    return [to_tensor(name, datatype, np.asarray(values, np.float32))]


def classifier(**section: Any) -> Processor:
    return Processor(image_signature(), None, Postprocess.model_validate({"labels": ["cat", "dog", "owl"]} | section))


def test_logits_become_labels_by_softmax_and_probabilities_stay() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    first, second = classifier().decode(scores(logits))["predictions"]
    assert [p["label"] for p in first] == ["dog", "owl", "cat"]
    assert [p["index"] for p in first] == [1, 2, 0]
    np.testing.assert_allclose([p["probability"] for p in first], expected[0][[1, 2, 0]], atol=1e-6)
    assert second[0]["label"] == "cat"
    kept = classifier().decode(scores([[0.2, 0.7, 0.1]], "FP16"))["predictions"][0]
    np.testing.assert_allclose([p["probability"] for p in kept], [0.7, 0.2, 0.1], atol=1e-3)
    squeezed = classifier().decode(scores(logits.reshape(2, 3, 1, 1)))["predictions"]
    assert squeezed == [first, second]


def test_one_row_is_answered_without_its_batch_and_top_k_is_kept() -> None:
    answer = classifier(top_k=1).decode(scores([[1, 3, 2]]), single=True)
    assert [p["label"] for p in answer["predictions"]] == ["dog"]


def test_activations_can_be_named() -> None:
    values = [[-1.0, 2.0, 0.0]]
    sigmoid = classifier(activation="sigmoid").decode(scores(values), single=True)["predictions"]
    np.testing.assert_allclose([p["probability"] for p in sigmoid], [0.880797, 0.5, 0.268941], atol=1e-6)
    assert classifier(activation="none").decode(scores(values), single=True)["predictions"][0]["probability"] == 2.0
    forced = classifier(activation="softmax").decode(scores([[0.2, 0.7, 0.1]]), single=True)["predictions"]
    assert forced[0]["probability"] < 0.5


def test_one_score_is_the_probability_of_the_second_class() -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("scores", "FP32", (-1, 1)),))
    processor = Processor(signature, None, Postprocess.model_validate({"labels": ["no", "yes"]}))
    rows = processor.decode(scores([[0.9], [0.2]]))["predictions"]
    assert [(row[0]["label"], row[0]["probability"]) for row in rows] == [("yes", 0.9), ("no", 0.8)]


def test_ties_and_missing_labels_are_by_index() -> None:
    processor = Processor(image_signature(), None, Postprocess.model_validate({"kind": "classification"}))
    predictions = processor.decode(scores([[1, 1, 1]]), single=True)["predictions"]
    assert [p["index"] for p in predictions] == [0, 1, 2]
    assert "label" not in predictions[0]
    by_task = Processor(image_signature(), task="classification")
    assert "predictions" in by_task.decode(scores([[1, 1, 1]]))


def test_nan_and_infinity_have_no_probability_and_are_counted() -> None:
    rows = [[1, 2, 3], [np.nan, 2, 3], [1, np.inf, 3], [-np.inf, 2, 3]]
    answer = classifier().decode(scores(rows))
    assert [len(row) for row in answer["predictions"]] == [3, 0, 0, 3]
    assert answer["non_finite"] == 3
    assert answer["predictions"][3][-1] == {"label": "cat", "index": 0, "probability": 0.0}


def test_plain_outputs_are_given_as_they_are_with_null_for_what_json_lacks() -> None:
    processor = Processor(image_signature())
    tensors = [
        *scores([[1.5, np.nan], [np.inf, 2]]),
        bytes_tensor("names", (2,), [b"caf\xc3\xa9", b"\xff"]),
        to_tensor("n", "INT64", np.array(7)),
        to_tensor("flag", "BOOL", np.array([True])),
    ]
    decoded = orjson.loads(orjson.dumps(processor.decode(tensors), option=orjson.OPT_SERIALIZE_NUMPY))
    assert decoded == {
        "outputs": {"scores": [[1.5, None], [None, 2.0]], "names": ["café", {"base64": "/w=="}], "n": 7, "flag": [True]},
        "non_finite": 2,
    }


def test_the_scores_are_found_among_several_outputs() -> None:
    outputs = (TensorSpec("label", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 3)))
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), outputs)
    processor = Processor(signature, task="classification")
    assert processor.output_names == ("probabilities",)
    assert processor.decode(scores([[0, 1, 0]], name="probabilities"), single=True)["predictions"][0]["index"] == 1
    with pytest.raises(ModelRejected, match="scores in floating point"):
        Processor(signature, None, Postprocess.model_validate({"kind": "classification", "output": "label"}))
    with pytest.raises(ModelFailed, match="probabilities"):
        processor.decode(scores([[0, 1, 0]], name="other"))


def test_labels_come_from_a_file_and_must_match_the_classes(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\ufeffcat\r\ndog\nowl\n\n", encoding="utf-8")
    processor = Processor(image_signature(), None, Postprocess.model_validate({"labels": "labels.txt"}), tmp_path)
    assert processor.labels == ("cat", "dog", "owl")
    with pytest.raises(ModelRejected, match="2 names but output 'scores' has 3"):
        Processor(image_signature(), None, Postprocess.model_validate({"labels": ["a", "b"]}))
    free = Signature((), (TensorSpec("scores", "FP32", (-1, -1)),))
    with pytest.raises(ModelFailed, match=r"3 classes; model\.yaml has 2 labels"):
        Processor(free, None, Postprocess.model_validate({"labels": ["a", "b"]})).decode(scores([[1, 2, 3]]))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ModelRejected, match="empty"):
        Processor(image_signature(), None, Postprocess.model_validate({"labels": "empty.txt"}), tmp_path)


def test_numbers_are_labels_and_yaml_words_are_explained() -> None:
    assert Postprocess.model_validate({"labels": [0, 1]}).labels == ("0", "1")
    with pytest.raises(ValidationError, match="quotes"):
        Postprocess.model_validate({"labels": [True, False]})
    with pytest.raises(ValidationError, match="empty"):
        Postprocess.model_validate({"labels": []})


def test_what_a_model_does_not_take_says_so() -> None:
    processor = Processor(image_signature())
    with pytest.raises(InvalidRequest, match=r"no preprocess\.image"):
        processor.encode_image(b"")
    with pytest.raises(InvalidRequest, match=r"no preprocess\.text"):
        processor.encode_text(["a"])


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, np.nan, -np.inf, 3.4e38], np.float32)
    back = to_array(to_tensor("x", "BF16", values))
    assert back[:3].tolist() == [1.0, 1.0, 1.015625]
    assert np.isnan(back[3]) and np.isneginf(back[4]) and np.isposinf(back[5])


def test_the_heavy_libraries_are_loaded_only_when_a_model_needs_them() -> None:
    script = (
        "import sys, app.catalog.processing; "
        "print([name for name in ('PIL', 'tokenizers', 'onnxruntime', 'onnx', 'torch', 'fastapi') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60).stdout.decode().strip() == "[]"
