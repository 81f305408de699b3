"""Models that are odd, or wrong on purpose, as users of other servers reported them (one idea each). Nothing here is checked before it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.models import ELEMENT_TYPES, OPSET, save, value


def logarithm(path: Path) -> Path:
    """y = log x: −1, 0 and 1 become NaN, −inf and 0 (case 13)."""
    return save(path, [helper.make_node("Log", ["x"], ["y"])], [value("x", "FP32", ["N"])], [value("y", "FP32", ["N"])])


def upper_case(path: Path, locale: str) -> Path:
    """Upper-cases texts in a locale that the machine may not have (case 15)."""
    node = helper.make_node("StringNormalizer", ["x"], ["y"], case_change_action="UPPER", locale=locale)
    return save(path, [node], [value("x", "BYTES", ["N"])], [value("y", "BYTES", ["N"])])


def weight_as_input(path: Path) -> Path:
    """y = x · w, where w is both a weight (all ones) and an input that callers may set (case 19)."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    inputs = [value("x", "FP32", ["N", 4]), value("w", "FP32", [4, 3])]
    return save(path, [node], inputs, [value("y", "FP32", ["N", 3])], {"w": np.ones((4, 3), np.float32)})


def running_sum(path: Path) -> Path:
    """The first axis is time: y[t] = x[0] + … + x[t] (case 21)."""
    node = helper.make_node("CumSum", ["x", "axis"], ["y"])
    return save(path, [node], [value("x", "FP32", ["T", 4])], [value("y", "FP32", ["T", 4])], {"axis": np.int64(0)})


def half_with_cast_left(path: Path) -> Path:
    """A float16 product whose other factor a forgotten Cast makes float32 (case 23): no session opens."""
    nodes = [
        helper.make_node("Cast", ["i"], ["c"], "cast_left", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "w"], ["y"], "mul"),
    ]
    weights = [numpy_helper.from_array(np.array(2, np.float16), "w")]
    inner = [value("c", "FP16", ["N"])]
    graph = helper.make_graph(nodes, "half", [value("i", "INT64", ["N"])], [value("y", "FP16", ["N"])], weights, value_info=inner)
    return write(path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10))


def int8_resize(path: Path) -> Path:
    """Quantize, dequantize, resize linearly by two, quantize again, in steps of 1 (case 25)."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "s", "z"], ["b"]),
        helper.make_node("Resize", ["b", "", "", "sizes"], ["r"], mode="linear", coordinate_transformation_mode="half_pixel"),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    weights = {"sizes": np.array([1, 1, 1, 6]), "s": np.float32(1), "z": np.int8(0)}
    return save(path, nodes, [value("x", "FP32", [1, 1, 1, 3])], [value("y", "FP32", [1, 1, 1, 6])], weights)


def dynamic_int8(path: Path, width: int = 32, outputs: int = 8) -> Path:
    """x · w with the scale of x taken from the whole batch (case 31): a row's answer hangs on its company."""
    rng = np.random.default_rng(31)
    weights = {"w": rng.integers(-127, 128, (width, outputs)).astype(np.int8), "ws": np.float32(0.01), "wz": np.int8(0)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "w", "xz", "wz"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["scale"]),
        helper.make_node("Mul", ["float", "scale"], ["y"]),
    ]
    return save(path, nodes, [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", outputs])], weights)


def int8_linear(path: Path, width: int = 16, outputs: int = 4) -> Path:
    """x · w in int8 already, as quantize-dequantize pairs (case 33)."""
    rng = np.random.default_rng(33)
    weights = {
        "w": rng.integers(-127, 128, (width, outputs)).astype(np.int8), "ws": np.float32(0.01), "s": np.float32(0.05), "z": np.int8(0)
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "s", "z"], ["mq"]),
        helper.make_node("DequantizeLinear", ["mq", "s", "z"], ["y"]),
    ]
    return save(path, nodes, [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", outputs])], weights)


def with_external_data(path: Path, width: int = 64, location: str = "model.onnx.data", size: int | None = None) -> bytes:
    """y = x · w with w in another file; writes only the model, and returns what that file ought to hold."""
    weight = np.eye(width, dtype=np.float32)
    tensor = numpy_helper.from_array(weight, "w")
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, "offset": "0", "length": str(len(data) if size is None else size)}.items():
        tensor.external_data.add(key=key, value=text)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "external", [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", width])], [tensor])
    write(path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10))
    return data


def write(path: Path, model: onnx.ModelProto) -> Path:
    """As it is: loading and checking would stumble over what is wrong on purpose."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def json_input(name: str, datatype: str, shape: Sequence[int], data: Any) -> dict[str, Any]:
    assert datatype in ELEMENT_TYPES
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}


def binary_body(arrays: Mapping[str, tuple[str, Sequence[int], bytes]], **top: Any) -> tuple[dict[str, str], bytes]:
    """(headers, body) of an infer request in the binary tensor extension; `arrays` by name: datatype, shape and bytes."""
    import orjson

    inputs = [
        {"name": name, "datatype": datatype, "shape": list(shape), "parameters": {"binary_data_size": len(data)}}
        for name, (datatype, shape, data) in arrays.items()
    ]
    head = orjson.dumps({"inputs": inputs, **top})
    return {"Inference-Header-Content-Length": str(len(head))}, head + b"".join(data for _, _, data in arrays.values())
