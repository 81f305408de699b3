"""The models that are served in benchmarks, and one request to each in every form: binary, JSON, raw. Makes what a fresh clone lacks."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from app.demo import SHIPPED
from optimizers.host import cpu_budget

DEMO: Final = SHIPPED / "repository" / "digits"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BenchModel:
    """One model in a repository folder: a single FP32 input with a batch axis. `sample` is one row."""

    name: str
    path: Path
    input: str
    output: str
    shape: tuple[int, ...]

    def rows(self, count: int, seed: int = 0) -> Floats:
        """`count` rows with a few digits each, as clients send them."""
        values = np.random.default_rng(seed).standard_normal((count, *self.shape))
        return np.round(values, 4).astype(np.float32)

    def answer(self, rows: Floats) -> Floats:
        """What the model says, unbatched by anyone: computed here, on one thread."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        result: Floats = session.run([self.output], {self.input: rows})[0]
        return result


@dataclass(frozen=True)
class Body:
    """One POST: path, headers and bytes."""

    path: str
    headers: dict[str, str]
    data: bytes

    def http(self, host: str, port: int) -> bytes:
        """The whole request as it goes over the socket."""
        lines = [f"POST {self.path} HTTP/1.1", f"Host: {host}:{port}", f"Content-Length: {len(self.data)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + self.data


def binary_body(model: BenchModel, rows: Floats) -> Body:
    """The protocol's binary extension, both ways."""
    head = {
        "inputs": [{"name": model.input, "shape": rows.shape, "datatype": "FP32", "parameters": {"binary_data_size": rows.nbytes}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
    return Body(f"/v2/models/{model.name}/infer", headers, text + rows.tobytes())


def json_body(model: BenchModel, rows: Floats) -> Body:
    """The protocol's readable form."""
    document = {"inputs": [{"name": model.input, "shape": rows.shape, "datatype": "FP32", "data": _numbers(rows.ravel())}]}
    return Body(
        f"/v2/models/{model.name}/infer", {"Content-Type": "application/json"}, json.dumps(document, separators=(",", ":")).encode()
    )


def plain_bodies(rows: Floats) -> tuple[Body, Body]:
    """(binary, JSON) for the control: what people write who need no protocol."""
    nested = {"inputs": np.array(_numbers(rows.ravel())).reshape(rows.shape).tolist()}
    text = json.dumps(nested, separators=(",", ":")).encode()
    return (
        Body("/binary", {"Content-Type": "application/octet-stream"}, rows.tobytes()),
        Body("/json", {"Content-Type": "application/json"}, text),
    )


def linear(repository: Path, name: str = "linear", seed: int = 0) -> BenchModel:
    """Four numbers in, three out: nothing but overhead."""
    rng = np.random.default_rng(seed)
    tensors = [numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), label) for label, size in (("w", (4, 3)), ("b", 3))]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        tensors,
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = _place(repository, name)
    onnx.save(built, path)
    return described(name, path)


def copied(source: Path, repository: Path, name: str) -> BenchModel:
    """The newest version in `source` (a model's folder in Triton's layout, or an .onnx file) as version 1 of `name`. Its samples stay behind."""
    file = source
    if source.is_dir():
        versions = sorted((f for f in source.iterdir() if f.name.isdigit()), key=lambda f: int(f.name))
        if not versions:
            raise SystemExit(f"{source} holds no version folder (1/model.onnx)")
        file = next(versions[-1].glob("*.onnx"))
    path = _place(repository, name)
    shutil.copyfile(file, path)
    for data in file.parent.glob(file.name + ".*"):
        shutil.copyfile(data, path.with_name(data.name))
    return described(name, path)


def demo(repository: Path) -> BenchModel:
    """The demo's model with its model.yaml and samples, as `hone demo` serves it."""
    shutil.copytree(DEMO, repository / DEMO.name)
    return described(DEMO.name, repository / DEMO.name / "1" / "model.onnx")


def quantized(model: BenchModel, repository: Path, samples: Floats | None = None) -> BenchModel:
    """The same model in int8, in the form that this host computes rightly. Made-up samples do for a benchmark of speed."""
    from optimizers.artifact import Artifact
    from optimizers.base import Budget, optimize
    from optimizers.catalogue import parse_recipe
    from optimizers.samples import Samples

    name = f"{model.name}-int8"
    rows = model.rows(64, seed=9) if samples is None else samples
    (config,) = parse_recipe(["int8-static"])
    built = optimize(Artifact(model.path), config, Samples({model.input: rows}), Budget(threads=cpu_budget().cores))
    path = _place(repository, name)
    shutil.copyfile(built.path, path)
    return described(name, path)


def described(name: str, path: Path) -> BenchModel:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or not all(isinstance(size, int) for size in inputs[0].shape[1:]):
        raise SystemExit(f"{path}: benchmarks take models with one FP32 input of fixed shape behind its batch axis")
    return BenchModel(name, path, inputs[0].name, outputs[0].name, tuple(inputs[0].shape[1:]))


def _place(repository: Path, name: str) -> Path:
    folder = repository / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "model.onnx"


def _numbers(values: Any) -> list[float]:
    """Numbers as a client writes them: short."""
    return [float(f"{value:.4f}") for value in values]


def shifted(model: BenchModel, repository: Path, version: str, by: float) -> BenchModel:
    """The same model as another version of the same name, whose outputs are all `by` larger: nobody can mistake whose answer one is."""
    built = onnx.load(model.path)
    graph, (output,) = built.graph, [o for o in built.graph.output if o.name == model.output]
    for node in graph.node:
        node.output[:] = [f"{name}.unshifted" if name == model.output else name for name in node.output]
    graph.initializer.append(numpy_helper.from_array(np.array(by, np.float32), "shift"))
    graph.node.append(helper.make_node("Add", [f"{output.name}.unshifted", "shift"], [output.name]))
    path = repository / model.name / version / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(built, path)
    return described(model.name, path)


def heavy(repository: Path, name: str, megabytes: int = 45) -> BenchModel:
    """Weights of this size in three layers: what loading costs."""
    width = int((megabytes * 1e6 / 4 / 3) ** 0.5)
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((width, width), np.float32) * width**-0.5, f"w{i}") for i in range(3)]
    nodes = [helper.make_node("MatMul", ["x" if i == 0 else f"h{i}", f"w{i}"], ["y" if i == 2 else f"h{i + 1}"]) for i in range(3)]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", width])],
        weights,
    )
    path = _place(repository, name)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return described(name, path)
