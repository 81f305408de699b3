"""The model that comes with Hone is what its description says: small, right, batchable, the same in both forms, with disjoint samples."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from app.catalog.model_config import load_model_config
from optimizers.samples import Samples

DEMO = Path(__file__).resolve().parents[1] / "app" / "demo_models"
DIGITS = DEMO / "repository" / "digits"
MODEL = DIGITS / "1" / "model.onnx"


@pytest.fixture(scope="module")
def session() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def judging() -> Samples:
    return Samples.load(DIGITS / "samples" / "judging.npz")


def test_both_forms_together_are_at_most_four_megabytes() -> None:
    assert sum(path.stat().st_size for path in (DIGITS / "1").iterdir()) <= 4_000_000


def test_it_reads_at_least_98_percent_of_images_it_never_saw(session: Any, judging: Samples) -> None:
    assert judging.labels is not None and len(judging) > 700
    (logits,) = session.run(None, judging.inputs)
    assert (logits.argmax(1) == judging.labels).mean() >= 0.98


def test_rows_answer_the_same_alone_and_together(session: Any, judging: Samples) -> None:
    (together,) = session.run(None, judging.rows(slice(0, 7)).inputs)
    alone = np.concatenate([session.run(None, judging.rows([i]).inputs)[0] for i in range(7)])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


def test_it_has_a_current_opset_and_a_free_batch() -> None:
    proto = onnx.load(MODEL)
    assert proto.opset_import[0].version >= 17
    (image,), (logits,) = proto.graph.input, proto.graph.output
    assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [0, 1, 32, 32]
    assert [d.dim_value for d in logits.type.tensor_type.shape.dim] == [0, 10]
    assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)


def test_training_calibration_and_judging_samples_share_no_image(judging: Samples) -> None:
    parts = [set(Samples.load(DIGITS / "samples" / f"{name}.npz").hashes()) for name in ("train", "calibration", "judging")]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 850 + 200 + 747


def test_its_model_yaml_names_files_that_are_there() -> None:
    config = load_model_config(DIGITS / "model.yaml")
    named = [config.samples.reference, config.samples.validation, config.samples.calibration, config.samples.train]
    assert all(name and (DIGITS / name).is_file() for name in named)
    assert config.source and (DIGITS / "1" / config.source.weights).is_file()
    assert (DEMO / "factories" / config.source.factory.partition(":")[0]).is_file()


def test_the_picture_that_the_demo_sends_is_read_as_a_six(session: Any) -> None:
    picture = Image.open(DEMO / "digit.png").convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.float32)[None, None] / 255
    assert session.run(None, {"image": pixels})[0].argmax() == 6


@pytest.mark.needs("torch")
def test_the_pytorch_form_computes_the_same(session: Any, judging: Samples) -> None:
    import torch
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("digits_resnet", DEMO / "factories" / "digits_resnet.py")
    assert spec is not None and spec.loader is not None
    factory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(factory)
    model = factory.build().eval()
    model.load_state_dict(load_file(DIGITS / "1" / "model.safetensors"))
    rows = judging.rows(slice(0, 32)).inputs["image"]
    with torch.no_grad():
        expected = model(torch.from_numpy(np.asarray(rows, np.float32))).numpy()
    np.testing.assert_allclose(session.run(None, {"image": rows})[0], expected, rtol=1e-3, atol=1e-4)
