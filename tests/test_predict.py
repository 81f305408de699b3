"""The friendly door: what people send, by every content type, through the real handler to a real ONNX model."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnxruntime
import orjson
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from app.api.bodies import Body, BodyBudget, Grant
from app.api.exchange import Exchange, until_done_or_gone
from app.api.friendly import MAX_JSON_BYTES
from app.api.multipart import parse_multipart
from app.api.predict import Predict
from app.catalog.processing import Postprocess, Preprocess, Processor
from app.catalog.tensors import to_array, to_tensor
from app.domain import InferenceRequest, InferenceResult, Signature, TensorSpec
from app.errors import Cancelled, InvalidRequest, NotFound, PayloadTooLarge, UnsupportedMediaType

P = ParamSpec("P")
T = TypeVar("T")
KINDS = {"FP32": TensorProto.FLOAT, "FP16": TensorProto.FLOAT16, "INT64": TensorProto.INT64}


class LocalService:
    """A data plane of one process: each model is a session called in place."""

    def __init__(self) -> None:
        self.models: dict[str, tuple[onnxruntime.InferenceSession, Signature, Processor]] = {}
        self.requests: list[InferenceRequest] = []

    def add(self, name: str, nodes: list[Any], signature: Signature, processor: Processor) -> None:
        values = [
            [helper.make_tensor_value_info(s.name, KINDS[s.datatype], [None if d == -1 else d for d in s.shape]) for s in specs]
            for specs in (signature.inputs, signature.outputs)
        ]
        graph = helper.make_graph(nodes, "g", values[0], values[1])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.models[name] = session, signature, processor

    def _find(self, model: str) -> tuple[onnxruntime.InferenceSession, Signature, Processor]:
        if model not in self.models:
            raise NotFound(f"no model {model!r}")
        return self.models[model]

    def processor(self, model: str) -> Processor:
        return self._find(model)[2]

    def admit(self, model: str, version: str | None) -> Signature:
        return self._find(model)[1]

    async def infer(
        self, model: str, version: str | None, request: InferenceRequest, headers: Mapping[bytes, bytes] | None = None
    ) -> InferenceResult:
        session, signature, _ = self._find(model)
        self.requests.append(request)
        names = list(request.outputs or [spec.name for spec in signature.outputs])
        answers = session.run(names, {tensor.name: to_array(tensor) for tensor in request.inputs})
        kinds = {spec.name: spec.datatype for spec in signature.outputs}
        outputs = [to_tensor(name, kinds[name], answer) for name, answer in zip(names, answers, strict=True)]
        return InferenceResult(outputs, model, version or "1", 1, 0.0, 0.0, 1)


class Threads:
    """A pool, as app.api.offload has one."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.used = 0
        self.budget = BodyBudget(4 << 20)
        self.most_room = 0

    def room(self, count: int) -> Grant:
        grant = Grant(self.budget)
        grant.grow(count)
        self.most_room = max(self.most_room, self.budget.used_bytes)
        return grant

    async def run_in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self.used += 1
        return await asyncio.get_running_loop().run_in_executor(self.pool, partial(function, *args, **kwargs))


class Door:
    """The handler, called as the server calls it."""

    def __init__(self, service: LocalService) -> None:
        self.service, self.threads = service, Threads()

    def post(self, model: str, body: bytes, content_type: str = "", version: str | None = None) -> dict[str, Any]:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            raise AssertionError("the handler answers by returning")

        async def read_body(exchange: Exchange) -> Body:
            return Body((await exchange.receive())["body"])

        headers = [(b"content-type", content_type.encode())] if content_type else []
        path = {"model": model, **({"version": version} if version else {})}
        exchange = Exchange({"type": "http", "headers": headers, "path_params": path, "client": ("192.0.2.1", 5)}, receive, send, True)
        reply = asyncio.run(Predict(self.service, self.threads, read_body)(exchange))
        assert exchange.rows == (exchange.result.outputs[0].shape[0] if exchange.result else -1)
        payload = b"".join(bytes(part) for part in reply.parts)
        assert (b"content-length", b"%d" % len(payload)) in reply.headers
        answer: dict[str, Any] = orjson.loads(payload)
        return answer


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Door:
    """`shades` says which of four quarters of a 2×2 grey picture is the brightest, `lengths` counts tokens, `pair` adds two inputs."""
    service = LocalService()
    shades = Signature((TensorSpec("x", "FP32", (-1, 1, 2, 2)),), (TensorSpec("scores", "FP32", (-1, 4)),), batchable=True)
    service.add(
        "shades",
        [helper.make_node("Flatten", ["x"], ["scores"])],
        shades,
        Processor(
            shades,
            Preprocess.model_validate({"image": {"colour": "GRAY", "interpolation": "box"}}),
            Postprocess.model_validate({"labels": ["top left", "top right", "bottom left", "bottom right"], "top_k": 2}),
        ),
    )
    folder = tmp_path_factory.mktemp("lengths")
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("input_ids", "attention_mask")
    lengths = Signature(tuple(TensorSpec(n, "INT64", (-1, -1)) for n in names), (TensorSpec("n", "INT64", (-1,)),), batchable=True)
    service.add(
        "lengths",
        [
            helper.make_node("Constant", [], ["axes"], value=helper.make_tensor("a", TensorProto.INT64, [1], [1])),
            helper.make_node("Mul", ["input_ids", "attention_mask"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "axes"], ["n"], keepdims=0),
        ],
        lengths,
        Processor(lengths, Preprocess.model_validate({"text": {"tokenizer": "tokenizer.json"}}), None, folder),
    )
    pair = Signature(
        (TensorSpec("a", "FP32", (-1, 3)), TensorSpec("b", "FP16", (-1, 3))), (TensorSpec("sum", "FP32", (-1, 3)),), batchable=True
    )
    service.add(
        "pair",
        [helper.make_node("Cast", ["b"], ["wide"], to=TensorProto.FLOAT), helper.make_node("Add", ["a", "wide"], ["sum"])],
        pair,
        Processor(pair),
    )
    return Door(service)


def png(pixels: Any = ((0, 0), (255, 90)), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.kron(np.asarray(pixels, np.uint8), np.ones((8, 8), np.uint8))).save(buffer, kind)
    return buffer.getvalue()


def form(*parts: tuple[str, str | None, str, bytes], boundary: str = "b0und") -> tuple[bytes, str]:
    body = b""
    for name, filename, content_type, data in parts:
        file = f'; filename="{filename}"' if filename is not None else ""
        kind = f"Content-Type: {content_type}\r\n" if content_type else ""
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n{kind}\r\n'.encode() + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


# -- images


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_is_answered_with_labels_the_likeliest_first(door: Door, kind: str) -> None:
    answer = door.post("shades", png(kind=kind), f"image/{kind.lower()}")
    assert (answer["model"], answer["version"]) == ("shades", "1")
    assert [p["label"] for p in answer["predictions"]] == ["bottom left", "bottom right"]
    assert answer["predictions"][0]["index"] == 2
    assert 0.2 < answer["predictions"][1]["probability"] < answer["predictions"][0]["probability"] < 0.6


def test_every_way_to_send_the_same_image_gives_the_same_answer(door: Door) -> None:
    file = png()
    encoded = base64.b64encode(file).decode()
    bodies = [
        (file, "image/png"), (file, "IMAGE/PNG; name=x"), (file, "application/octet-stream"), (file, ""),
        (file, "application/x-www-form-urlencoded"),
        (orjson.dumps({"image": encoded}), "application/json"),
        (orjson.dumps({"image": f"data:image/png;base64,{encoded}"}), "application/json; charset=utf-8"),
        form(("file", "digit.png", "image/png", file)),
        form(("anything", "digit.bin", "application/octet-stream", file), ("note", None, "", b"ignored")),
        form(("file", "digit.txt", "text/plain", file)),
    ]  # fmt: skip
    answers = [door.post("shades", body, kind) for body, kind in bodies]
    assert all(answer == answers[0] for answer in answers)
    assert door.post("shades", file, "image/png", version="1.2")["version"] == "1.2"


def test_images_are_decoded_off_the_event_loop_and_small_json_is_not(door: Door) -> None:
    before = door.threads.used
    door.post("shades", png(), "image/png")
    assert door.threads.used == before + 1
    door.post("pair", b'{"a": [1, 2, 3], "b": [1, 2, 3]}', "application/json")
    assert door.threads.used == before + 1


def test_the_request_says_who_asks_and_asks_only_for_the_scores(door: Door) -> None:
    door.post("shades", png(), "image/png")
    request = door.service.requests[-1]
    assert request.caller == "192.0.2.1"
    assert request.outputs == ("scores",)
    assert 0 <= time.monotonic() - request.received_at < 30
    assert request.request_id


# -- plain JSON


@pytest.mark.parametrize(
    "document",
    [
        [[[[1, 2], [3, 4]]]],
        {"data": [[[[1, 2], [3, 4]]]]},
        {"inputs": [[[[1, 2], [3, 4]]]]},
        {"instances": [[[[1, 2], [3, 4]]]]},
        {"inputs": {"x": [[[[1, 2], [3, 4]]]]}},
        {"x": [[[[1.0, 2], [3, 4]]]]},
    ],
)
def test_a_tensor_in_any_plain_form_is_a_batch(door: Door, document: Any) -> None:
    answer = door.post("shades", orjson.dumps(document), "application/json")
    (row,) = answer["predictions"]
    assert row[0]["label"] == "bottom right"


def test_one_row_without_its_batch_axis_is_answered_as_one_row(door: Door) -> None:
    answer = door.post("shades", b"[[[1, 2], [3, 4]]]", "application/json")
    assert [p["label"] for p in answer["predictions"]] == ["bottom right", "bottom left"]


def test_several_inputs_are_named_and_half_precision_is_converted(door: Door) -> None:
    answer = door.post("pair", b'{"a": [[1, 2, 3]], "b": [[0.5, 0.25, -1]]}', "application/json")
    assert answer["outputs"] == {"sum": [[1.5, 2.25, 2.0]]}


def test_what_a_body_has_become_counts_against_the_budget_until_it_is_answered(door: Door) -> None:
    door.threads.most_room = 0
    door.post("pair", b'{"a": [[1, 2, 3], [4, 5, 6]], "b": [[1, 2, 3], [4, 5, 6]]}', "application/json")
    assert door.threads.most_room == 2 * 3 * (4 + 2) and door.threads.budget.used_bytes == 0


@pytest.mark.parametrize(
    ("model", "document", "says"),
    [
        ("shades", [[[1, 2], [3, 4]], [[1, 2], [3]]], "wants lists of 2 along axis 3|has 1"),
        ("shades", [[[1, 2], [3, "4"]]], "element 3 is '4'"),
        ("shades", [[[1, 2], [3, True]]], "element 3 is true"),
        ("shades", [[[1, 2], [3, None]]], "null"),
        ("shades", [[[1, 2], [3, 1e39]]], "1e.39"),
        ("shades", [1, 2, 3, 4], "nested 1 deep"),
        ("shades", 7, "nested 0 deep"),
        ("shades", [[[1, 2, 3], [3, 4, 5]]], "has 3 on axis 3, not 2"),
        ("shades", {}, "empty"),
        ("shades", {"y": [1]}, "no input 'y'"),
        ("shades", {"data": [1], "more": 1}, "'more'"),
        ("shades", {"x": {"y": 1}}, "is an object"),
        ("shades", {"image": "!!"}, "not base64"),
        ("shades", {"image": base64.b64encode(b"GIF89a").decode()}, "neither PNG nor JPEG"),
        ("shades", {"image": "aGk=", "top_k": 1}, "`image` comes alone"),
        ("shades", {"image": ["aGk="]}, "`image` comes alone"),
        ("shades", {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}, "/v2/models/{model}/infer"),
        ("shades", {"text": "hello"}, "no input 'text'"),
        ("pair", [[1, 2, 3]], "2 inputs: name them"),
        ("pair", {"a": [[1, 2, 3]]}, "'b' is missing"),
        ("pair", {"a": [[1, 2, 3]], "b": [[1, 2, 70000]]}, "element 2 is 70000; FP16 takes numbers up to"),
        ("pair", {"a": [[1, 2, 3]], "b": [[1, 2, 3], [1, 2, 3]]}, "rows"),
        ("lengths", {"texts": "good"}, "list of strings"),
        ("lengths", {"texts": ["good", 1]}, "list of strings"),
        ("lengths", {"texts": []}, "no text"),
        ("lengths", {"text": "good", "more": 1}, "`text` comes alone"),
        ("lengths", {"input_ids": [[1.5]], "attention_mask": [[1]]}, "1.5"),
    ],
)
def test_wrong_json_is_refused_with_what_is_wrong(door: Door, model: str, document: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        door.post(model, orjson.dumps(document), "application/json")


@pytest.mark.parametrize(
    "body", [b"", b" ", b"{", b"\0", b"[" * 100_000, b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"NaN", b"[NaN]", b"null"]
)
def test_broken_json_is_refused_never_an_accident(door: Door, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        door.post("shades", body, "application/json")


def test_json_over_its_limit_names_the_better_form(door: Door) -> None:
    with pytest.raises(PayloadTooLarge, match=r"/v2/models/.*binary"):
        door.post("pair", b"[" + b"1," * (MAX_JSON_BYTES // 2) + b"1]", "application/json")


def test_a_client_that_left_before_its_request_was_queued_leaves_no_work_behind() -> None:
    async def work() -> None:
        raise AssertionError("nobody waits for it")

    async def gone(*_: Any) -> Any:
        raise AssertionError("nobody is there")

    async def leaving(coroutine: Coroutine[Any, Any, None]) -> None:
        connection = SimpleNamespace(loop=asyncio.get_running_loop(), lost=True, on_lost=None)
        scope: Any = {"headers": [], "path_params": {"model": "m"}, "hone.connection": connection}
        await until_done_or_gone(Exchange(scope, gone, gone, False), coroutine)

    coroutine = work()
    with pytest.raises(Cancelled):
        asyncio.run(leaving(coroutine))
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


# -- texts


def test_texts_are_taken_plain_and_as_json(door: Door) -> None:
    expected = {"n": [2 + 3]}
    for body, kind in [
        (b"good bad", "text/plain"), (b"good bad", "text/plain; charset=ISO-8859-1"), (b'{"text": "good bad"}', "application/json"),
        form(("text", None, "", b"good bad")), form(("file", "a.txt", "text/plain; charset=utf-8", b"good bad")),
    ]:  # fmt: skip
        assert door.post("lengths", body, kind)["outputs"] == expected
    assert door.post("lengths", b'{"texts": ["good bad bad", "good"]}', "application/json")["outputs"] == {"n": [8, 2]}


def test_texts_that_are_no_text_are_refused(door: Door) -> None:
    with pytest.raises(InvalidRequest, match="byte 0 is 0xff"):
        door.post("lengths", b"\xff", "text/plain")
    with pytest.raises(UnsupportedMediaType, match="utf-16"):
        door.post("lengths", b"a", "text/plain; charset=utf-16")


# -- what nobody can take


@pytest.mark.parametrize("kind", ["image/gif", "application/xml", "text/html", "video/mp4", "nonsense", "application/octet-stream"])
def test_other_content_types_are_refused_with_those_that_are_taken(door: Door, kind: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="image/png"):
        door.post("shades", b"GIF89a...", kind)


def test_images_and_texts_for_models_without_them_say_what_to_send(door: Door) -> None:
    with pytest.raises(InvalidRequest, match=r"no preprocess\.image"):
        door.post("pair", png(), "image/png")
    with pytest.raises(InvalidRequest, match=r"no preprocess\.text"):
        door.post("pair", b"hello", "text/plain")
    with pytest.raises(InvalidRequest, match=r'the body is empty; send its inputs as application/json, \{"a": \[\.\.\.\], "b"'):
        door.post("pair", b"", "application/json")


def test_unknown_models_are_refused_before_the_body_is_read(door: Door) -> None:
    with pytest.raises(NotFound):
        door.post("nobody", b"x" * 100, "image/png")


def test_broken_forms_are_refused(door: Door) -> None:
    body, kind = form(("file", "a.png", "image/png", png()))
    for broken, broken_kind, says in [
        (body[:-10], kind, "cut off"), (body, "multipart/form-data", "boundary"), (b"hello", kind, "no multipart form|cut off"),
        (*form(("a", "1.png", "", png()), ("b", "2.png", "", png())), "2 files"), (*form(("a", None, "", b"x")), "no file"),
        (*form(*[("a", None, "", b"x")] * 33), "more than 32"),
        (body.replace(b'; name="file"', b""), kind, "no name"), (body, kind + "x" * 2000, "no multipart form"),
    ]:  # fmt: skip
        with pytest.raises(InvalidRequest, match=says):
            door.post("shades", broken, broken_kind)


def test_a_forms_bytes_come_out_as_they_went_in() -> None:
    data = bytes(range(256)) * 300 + b"\r\n--b0un\r\n--"
    body, kind = form(("file", "naïve.png", "image/png", data))
    (part,) = parse_multipart(body, kind)
    assert (part.data, part.filename, part.content_type) == (data, "naïve.png", "image/png")
