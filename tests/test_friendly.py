"""What the friendly door reads and writes, as functions: any bytes, any JSON, any outputs; no server, no model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.friendly import read_input, write_answer
from app.api.json_tensors import tensors_of
from app.catalog.processing import Postprocess, Preprocess, Processor
from app.catalog.tensors import elements, to_array, to_tensor
from app.domain import InferenceResult, Signature, Tensor, TensorSpec
from app.errors import HoneError, InvalidRequest


def test_an_image_that_has_company_is_told_also_where_the_models_input_is_called_image() -> None:
    signature = Signature((TensorSpec("image", "FP32", (-1, 1, 4, 4)),), (TensorSpec("y", "FP32", (-1, 2)),), batchable=True)
    processor = Processor(signature, Preprocess.model_validate({"image": {"colour": "GRAY"}}))
    for body, said in (
        (b"{}", "object is empty"),
        (b'{"image": "aGk=", "top_k": 1}', "`image` comes alone"),
        (b'{"image": [[NaN]]}', "NaN and infinity have no JSON form"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            read_input(body, "application/json", processor, signature)
    assert read_input(b'{"image": [[[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,4]]]]}', "application/json", processor, signature).tensors


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from(["", "image/png", "application/json", "text/plain", "multipart/form-data; boundary=b", "x;=;"])
)
def test_no_bytes_end_in_anything_but_an_error_of_ours(data: bytes, kind: str) -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, 1, 2, 2)),), (TensorSpec("y", "FP32", (-1, 4)),))
    processor = Processor(signature, Preprocess.model_validate({"image": {"colour": "GRAY"}}))
    for body in (data, b"--b\r\n" + data, b'{"x":' + data, b"\x89PNG\r\n\x1a\n" + data):
        try:
            read_input(body, kind, processor, signature)
        except HoneError:
            pass


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "data", "image", "b"]), inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    JSON_VALUES,
    st.sampled_from(["FP32", "FP16", "BF16", "INT64", "UINT8", "BOOL", "BYTES"]),
    st.sampled_from([(), (-1,), (-1, 2), (1, -1, 2)]),
)
def test_any_json_becomes_whole_tensors_or_an_error_of_ours(document: Any, datatype: str, shape: tuple[int, ...]) -> None:
    signature = Signature((TensorSpec("x", datatype, shape),), ())
    try:
        (tensor,), _ = tensors_of(document, signature)
    except InvalidRequest:
        return
    assert len(tensor.shape) == len(shape)
    if datatype == "BYTES":
        assert len(elements(tensor)) == int(np.prod(tensor.shape))
    else:
        assert to_array(tensor).shape == tensor.shape


# -- answers


def test_large_plain_outputs_are_written_in_pieces_that_make_the_same_json() -> None:
    signature = Signature((), ())
    chance = np.random.default_rng(0)
    for shape in [(300_000,), (3, 100_000), (200_000, 2), (2, 3, 40_000), (70_000, 1, 1), (0, 5), (2, 0)]:
        values = chance.standard_normal(shape).astype(np.float32)
        if values.size:
            values.flat[values.size // 2] = np.nan
        result = InferenceResult([to_tensor("y", "FP32", values), to_tensor("z", "INT64", np.arange(3))], "m", "1", 1, 0, 0, 1)
        reply = write_answer(Processor(signature), result, False)
        answer = orjson.loads(b"".join(bytes(part) for part in reply.parts))
        assert answer["outputs"] == {"y": orjson.loads(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)), "z": [0, 1, 2]}
        assert reply.non_finite == answer.get("non_finite", 0) == (1 if values.size else 0)


def test_outputs_that_lie_unaligned_in_memory_are_read() -> None:
    data = b"\0" + struct.pack("<3f", 1, 2, 3)
    result = InferenceResult([Tensor("y", "FP32", (3,), memoryview(data)[1:])], "m", "1", 1, 0, 0, 1)
    reply = write_answer(Processor(Signature((), ())), result, False)
    assert orjson.loads(bytes(reply.parts[0]))["outputs"] == {"y": [1.0, 2.0, 3.0]}


def test_a_file_of_labels_reaches_the_answer(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    signature = Signature((), (TensorSpec("y", "FP32", (-1, 2)),))
    processor = Processor(signature, None, Postprocess.model_validate({"labels": "labels.txt", "top_k": 1}), tmp_path)
    result = InferenceResult([to_tensor("y", "FP32", np.array([[0.25, 0.75]]))], "m", "1", 1, 0, 0, 1)
    answer = orjson.loads(bytes(write_answer(processor, result, True).parts[0]))
    assert answer == {"model": "m", "version": "1", "predictions": [{"label": "yes", "index": 1, "probability": 0.75}]}
