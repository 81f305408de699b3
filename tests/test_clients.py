"""What real clients of the protocol send, and what they make of the answers: NVIDIA's tritonclient against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.models import heavy, identity
from tests.running_server import Running, server

http = pytest.importorskip("tritonclient.http")
from tritonclient.utils import InferenceServerException  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def small_model(path: Path) -> None:
    """y = relu(x @ w): one input of four features."""
    weight = numpy_helper.from_array(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("clients")
    for name in ("plain", "text", "half"):
        (folder / "models" / name / "1").mkdir(parents=True)
    small_model(folder / "models" / "plain" / "1" / "model.onnx")
    identity(folder / "models" / "text" / "1" / "model.onnx", "BYTES")
    identity(folder / "models" / "half" / "1" / "model.onnx", "FP16")
    with server(folder) as running:
        yield running.ready("plain", "text", "half")


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with http.InferenceServerClient(f"127.0.0.1:{running.port}") as client:
        yield client


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("plain") and client.is_model_ready("plain", "1")
    assert client.get_server_metadata()["name"] == "hone"
    metadata = client.get_model_metadata("plain")
    assert [tensor["datatype"] for tensor in metadata["inputs"]] == ["FP32"]
    assert client.get_model_config("plain")["input"][0]["data_type"] == "TYPE_FP32"
    assert client.is_model_ready("nobody") is False


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer_in_all_forms(client: Any, binary_in: bool, binary_out: bool, compression: str | None) -> None:
    metadata = client.get_model_metadata("plain")
    name, shape = metadata["inputs"][0]["name"], [3, metadata["inputs"][0]["shape"][1]]
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 7
    given = http.InferInput(name, shape, "FP32")
    given.set_data_from_numpy(value, binary_data=binary_in)
    wanted = http.InferRequestedOutput(metadata["outputs"][0]["name"], binary_data=binary_out)
    answer = client.infer(
        "plain", [given], outputs=[wanted], request_id="mine", request_compression_algorithm=compression, response_compression_algorithm=compression
    )  # fmt: skip
    alone = client.infer("plain", [given])
    assert answer.get_response()["id"] == "mine"
    np.testing.assert_allclose(answer.as_numpy(metadata["outputs"][0]["name"]), alone.as_numpy(metadata["outputs"][0]["name"]), rtol=1e-5)


def test_strings_come_back_as_they_went(client: Any) -> None:
    metadata = client.get_model_metadata("text")
    rank = len(metadata["inputs"][0]["shape"])
    texts = np.array(["naïve", "模型", "", "a\0b"], dtype=object).reshape([4] + [1] * (rank - 1))
    given = http.InferInput(metadata["inputs"][0]["name"], list(texts.shape), "BYTES")
    given.set_data_from_numpy(texts)
    answer = client.infer("text", [given]).as_numpy(metadata["outputs"][0]["name"])
    assert [item.decode() for item in answer.ravel()] == list(texts.ravel())


def test_half_precision_goes_as_binary(client: Any) -> None:
    metadata = client.get_model_metadata("half")
    shape = [2 if size == -1 else size for size in metadata["inputs"][0]["shape"]]
    value = np.ones(shape, dtype=np.float16)
    given = http.InferInput(metadata["inputs"][0]["name"], shape, "FP16")
    given.set_data_from_numpy(value)
    np.testing.assert_array_equal(client.infer("half", [given]).as_numpy(metadata["outputs"][0]["name"]), value)


def test_errors_are_told(client: Any) -> None:
    given = http.InferInput("nonsense", [1, 4], "FP32")
    given.set_data_from_numpy(np.ones((1, 4), dtype=np.float32))
    with pytest.raises(InferenceServerException, match="nonsense"):
        client.infer("plain", [given])
    with pytest.raises(InferenceServerException, match="no model"):
        client.get_model_metadata("nobody")


def test_statistics_count_rows_and_calls(client: Any) -> None:
    before = client.get_inference_statistics("plain")["model_stats"][0]
    metadata = client.get_model_metadata("plain")
    given = http.InferInput(metadata["inputs"][0]["name"], [5, metadata["inputs"][0]["shape"][1]], "FP32")
    given.set_data_from_numpy(np.zeros(given.shape(), dtype=np.float32))
    client.infer("plain", [given])
    after = client.get_inference_statistics("plain", "1")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 1
    assert {size["batch_size"] for size in after["batch_stats"]} >= {5}


def test_index_load_and_unload(client: Any, running: Running) -> None:
    assert {(model["name"], model["state"]) for model in client.get_model_repository_index()} == {
        ("plain", "READY"), ("text", "READY"), ("half", "READY"),
    }  # fmt: skip
    with pytest.raises(InferenceServerException):
        client.unload_model("half")
    token = {"Authorization": f"Bearer {running.token}"}
    client.unload_model("half", headers=token)
    assert client.is_model_ready("half") is False
    client.load_model("half", headers=token)
    assert client.is_model_ready("half")
    with pytest.raises(InferenceServerException, match="nobody"):
        client.load_model("nobody", headers=token)


def test_the_state_folder_holds_its_secret(running: Running) -> None:
    assert Path(running.folder / "state" / "admin-token").stat().st_mode & 0o777 == 0o600


def test_a_load_may_bring_the_files_where_the_operator_allows_it(tmp_path: Path) -> None:
    big = heavy(tmp_path / "big.onnx", 640, 1).read_bytes()
    with server(tmp_path, allow_file_parameters="true", max_body_bytes=str(4 << 20)) as running:
        running.until(lambda: running.answers("/v2/health/live"))
        client = http.InferenceServerClient(running.url.removeprefix("http://"))
        authorized = {"Authorization": f"Bearer {running.token}"}
        client.load_model("m", authorized, config="{}", files={"file:1/model.onnx": big})
        assert len(big) > 1 << 20 and client.is_model_ready("m")
        for files, said in (
            ({"file:1/model.onnx": big, "file:2/model.onnx": big[:100]}, "called"),
            ({"file:1/model.onnx": 3 * big}, "passes"),
        ):
            with pytest.raises(InferenceServerException, match=said):
                client.load_model("m", authorized, config="{}", files=files)
        with pytest.raises(InferenceServerException, match=r"model\.yaml"):
            client.load_model("m", authorized, config='{"max_batch_size": 3}')
        assert not list((tmp_path / "state" / "staging").iterdir())
