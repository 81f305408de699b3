"""Trouble that users of other servers reported at the protocol's edge and with odd models, each tried against one live server."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.models import dependent_rows, identity, scalars, sum_of_scalars, without_inputs
from tests.odd_models import (
    binary_body,
    dynamic_int8,
    half_with_cast_left,
    int8_resize,
    json_input,
    logarithm,
    running_sum,
    upper_case,
    weight_as_input,
    with_external_data,
)
from tests.running_server import Running, server

SAMPLED = ("byte", "plain", "lavish", "scalars", "sum", "sum16", "log", "text", "weights", "time", "mean", "resize", "dynamic")
GOOD = (*SAMPLED, "constant", "hollow")
"""The last two have no inputs that could differ, so no reference is frozen."""
BROKEN = ("half", "locale", "external")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("cases")

    def at(name: str) -> Path:
        return folder / "models" / name / "1" / "model.onnx"

    identity(at("byte"), "UINT8")
    identity(at("plain"))
    identity(at("lavish"))
    (folder / "models" / "lavish" / "model.yaml").write_text("runtime: {instances: 100}\n")
    scalars(at("scalars"))
    sum_of_scalars(at("sum"))
    sum_of_scalars(at("sum16"), "BF16")
    without_inputs(at("constant"))
    identity(at("hollow"), shape=("N", 0))
    logarithm(at("log"))
    identity(at("text"), "BYTES", ("N",))
    weight_as_input(at("weights"))
    running_sum(at("time"))
    dependent_rows(at("mean"))
    int8_resize(at("resize"))
    dynamic_int8(at("dynamic"))
    half_with_cast_left(at("half"))
    upper_case(at("locale"), "xx_YY.UTF-8")
    with_external_data(at("external"))
    with server(folder) as running:
        yield running.ready(*GOOD)


def infer(running: Running, model: str, *inputs: dict[str, Any], **top: Any) -> httpx.Response:
    return running.call("POST", f"/v2/models/{model}/infer", content=json.dumps({"inputs": list(inputs), **top}))


def outputs(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: output for output in answer.json()["outputs"]}


def samples(running: Running, name: str, **labels: str) -> list[float]:
    """Values of a metric's series that carry these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in running.call("GET", "/metrics").text.splitlines() if line.startswith(name + "{")]
    return [float(line.rpartition(" ")[2]) for line in lines if all(each in line for each in wanted)]


@pytest.mark.parametrize("value", [256, -1, 1.5, True, "7", None, 2**64, 10**400, [[1]]])
def test_integers_out_of_range_are_refused_and_nothing_wraps(running: Running, value: object) -> None:
    answer = infer(running, "byte", json_input("x", "UINT8", [1, 1], [value]))
    assert answer.status_code == 400
    assert "'x'" in answer.json()["error"] and "UINT8" in answer.json()["error"]


EMPTY_BODIES = [b"", b"  \n", b"\0", b"null", b"[]", b'"x"', b"{", b"\xef\xbb\xbf{", b"\xff\xfe{\0", b'{"inputs":', b"[" * 100_000]


@pytest.mark.parametrize(
    "path", ["/v2/models/plain/infer", "/v2/repository/index", "/v2/repository/models/plain/load", "/models/plain/predict"]
)
def test_empty_and_broken_bodies_are_the_callers_fault(running: Running, path: str) -> None:
    optional = path.startswith("/v2/repository")
    for body in EMPTY_BODIES:
        if body == b"[]" and path.endswith("predict"):
            continue  # one row without a value: this model takes rows of any length
        headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "application/json"}
        answer = running.call("POST", path, content=body, headers=headers)
        assert answer.status_code == (200 if optional and not body else 400), (path, body[:20], answer.text)
        assert answer.status_code == 200 or answer.json()["error"], (path, body[:20])
    assert running.process.poll() is None


def test_broken_bodies_unload_nothing(running: Running) -> None:
    token = {"Authorization": f"Bearer {running.token}"}
    for body in EMPTY_BODIES[1:]:
        assert running.call("POST", "/v2/repository/models/plain/unload", content=body, headers=token).status_code == 400
    for path in ("optimize", "promote", "verify", "rollback"):
        answer = running.call("POST", f"/admin/models/plain/{path}", content=b"{", headers=token)
        assert answer.status_code == 400 and "not JSON" in answer.json()["error"], answer.text
    assert running.call("GET", "/v2/models/plain/ready").status_code == 200


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("gzip;q=0", None), ("br, *;q=0", None), ("gzip;q=0, deflate", "deflate")],
)
@pytest.mark.parametrize("binary", [True, False])
def test_packed_replies_say_so(running: Running, accepted: str, coding: str | None, binary: bool) -> None:
    ones = np.ones((1, 4096), np.float32)
    headers, body = binary_body({"x": ("FP32", ones.shape, ones.tobytes())}, parameters={"binary_data_output": binary})
    connection = http.client.HTTPConnection("127.0.0.1", running.port)  # unpacks nothing by itself
    connection.request("POST", "/v2/models/plain/infer", body, headers | {"Accept-Encoding": accepted})
    answer = connection.getresponse()
    raw = answer.read()
    connection.close()
    assert answer.getheader("Content-Encoding") == coding and answer.getheader("Content-Length") == str(len(raw))
    plain = gzip.decompress(raw) if coding == "gzip" else zlib.decompress(raw) if coding == "deflate" else raw
    head = int(answer.getheader("Inference-Header-Content-Length") or len(plain))
    assert json.loads(plain[:head])["outputs"][0]["shape"] == [1, 4096]
    assert not binary or plain[head:] == ones.tobytes()


def test_clients_that_leave_while_sending_are_cancelled_and_nothing_leaks(running: Running) -> None:
    before = len(running.log)
    cancelled = sum(samples(running, "hone_requests_total", model="plain", code="499"))
    headers, body = binary_body({"x": ("FP32", [1, 250_000], bytes(1_000_000))})
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(["POST /v2/models/plain/infer HTTP/1.1", "Host: x", *lines, f"Content-Length: {len(body)}"]) + "\r\n\r\n"
    part = (head.encode() + body)[:5000]
    stop, statuses = threading.Event(), set()

    def load() -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            while not stop.is_set():
                document = {"inputs": [json_input("x", "FP32", [1, 2], [1, 2])]}
                statuses.add(client.post("/v2/models/plain/infer", json=document).status_code)

    caller = threading.Thread(target=load)
    caller.start()
    late = []
    for turn in range(200):
        connection = socket.create_connection(("127.0.0.1", running.port))
        connection.sendall(part)
        if turn % 20:
            connection.close()
        else:
            late.append(connection)
    stop.wait(0.5)
    for connection in late:
        connection.close()
    counted = running.until(lambda: sum(samples(running, "hone_requests_total", model="plain", code="499")) - cancelled >= 200)
    stop.set()
    caller.join()
    assert counted and statuses == {200}
    assert sum(samples(running, "hone_requests_total", model="plain", code="499")) - cancelled == 200
    assert not samples(running, "hone_requests_total", model="plain", code="500")
    assert samples(running, "hone_inflight_requests", model="plain") == [0.0] == samples(running, "hone_queue_depth", model="plain")
    assert "Traceback" not in running.log[before:]
    whole = running.call("POST", "/v2/models/plain/infer", headers=headers, content=body)
    assert whole.status_code == 200


def test_scalars_go_in_and_out_as_they_are(running: Running) -> None:
    headers, body = binary_body({"x": ("FP32", [2], np.array([1, 2], np.float32).tobytes()), "s": ("FP32", [], np.float32(3).tobytes())})
    answers = [running.call("POST", "/v2/models/scalars/infer", headers=headers, content=body)]
    answers += [infer(running, "scalars", json_input("x", "FP32", [2], [1, 2]), json_input("s", "FP32", [], data)) for data in (3, [3])]
    for answer in answers:
        found = outputs(answer)
        assert (found["z"]["shape"], found["z"]["data"], found["y"]["data"]) == ([], [9.0], [3.0, 6.0])
    wrong = infer(running, "scalars", json_input("x", "FP32", [2], [1, 2]), json_input("s", "FP32", [1], [3]))
    assert wrong.status_code == 400 and "'s'" in wrong.json()["error"]


def test_a_model_without_inputs_answers_whoever_asks(running: Running) -> None:
    bodies: tuple[dict[str, Any], ...] = ({"inputs": []}, {"inputs": [], "outputs": [{"name": "y"}]})
    for body in bodies:
        assert outputs(running.call("POST", "/v2/models/constant/infer", json=body))["y"]["data"] == [0.0, 1.0, 2.0]
    assert running.call("POST", "/models/constant/predict", content=b"{}").json()["outputs"] == {"y": [0.0, 1.0, 2.0]}
    wrong = running.call("POST", "/models/constant/predict", content=b'{"x": 1}')
    assert wrong.status_code == 400 and "the model takes no input" in wrong.json()["error"]
    assert running.call("POST", "/v2/models/plain/infer", json={"inputs": []}).status_code == 400


def test_tensors_without_elements_are_answered(running: Running) -> None:
    for model, shape in (("hollow", [2, 0]), ("plain", [0, 3]), ("plain", [3, 0]), ("text", [0]), ("byte", [0, 0])):
        datatype = {"text": "BYTES", "byte": "UINT8"}.get(model, "FP32")
        (output,) = infer(running, model, json_input("x", datatype, shape, [])).json()["outputs"]
        assert (output["shape"], output["data"]) == (shape, [])
    wrong = infer(running, "plain", json_input("x", "FP32", [2**63, 0], []))
    assert wrong.status_code == 400 and "63 bits" in wrong.json()["error"]


def test_a_model_that_nobody_asked_yet_has_statistics(running: Running) -> None:
    for path in ("/v2/models/stats", "/v2/models/sum16/stats", "/v2/models/sum16/versions/1/stats"):
        found = {row["name"]: row for row in running.call("GET", path).json()["model_stats"]}
        assert found["sum16"]["version"] == "1" and found["sum16"]["inference_stats"]["success"]["count"] == 0


def test_a_slash_at_the_end_of_a_path_changes_nothing(running: Running) -> None:
    body = {"inputs": [json_input("x", "FP32", [1, 2], [1, 2])]}
    answer = running.call("POST", "/v2/models/plain/infer/", json=body)
    assert answer.status_code == 200 and answer.headers["hone-version"] == "1"
    assert running.call("GET", "/v2/").json()["name"] == "hone" and running.call("GET", "/metrics/").status_code == 200
    assert running.call("GET", "/admin/models/").status_code == 401
    assert running.call("GET", "/nothing/").status_code == running.call("GET", "//").status_code == 404


def test_a_target_that_is_no_path_is_malformed(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ") and b"the target 'x:80' is no path" in answer


def test_settings_of_model_yaml_that_the_server_would_not_take_hold_up_no_other(running: Running) -> None:
    path = "/admin/models/lavish/settings"
    assert "at most" in running.admin("PATCH", path, 400, json={"instances": 200})["error"]
    changed = running.admin("PATCH", path, 200, json={"queue_limit": 7})
    assert (changed["settings"]["queue_limit"], changed["settings"]["instances"]) == (7, 100)


@pytest.mark.parametrize("value", [True, "7", 7.0, 1.5, -1, 2**70, [7], None])
def test_a_setting_of_another_kind_is_refused_and_changes_nothing(running: Running, value: object) -> None:
    before = running.admin("GET", "/admin/models/plain")["generation"]
    refused = running.admin("PATCH", "/admin/models/plain/settings", 400, json={"queue_limit": value})
    assert "queue_limit" in refused["error"] or value is None
    assert running.admin("GET", "/admin/models/plain")["generation"] == before


def test_a_change_of_an_unloaded_model_is_taken_at_once_and_holds_when_it_is_loaded(running: Running) -> None:
    running.admin("PATCH", "/admin/models/lavish/settings", 200, json={"queue_limit": 8})
    running.admin("POST", "/v2/repository/models/lavish/unload", 200)
    began = time.monotonic()
    undone = running.admin("POST", "/admin/models/lavish/rollback", 200)
    assert time.monotonic() - began < 20 and (undone["state"], undone["reason"]) == ("unloaded", "")
    running.admin("POST", "/v2/repository/models/lavish/load", 200)
    assert running.admin("GET", "/admin/models/lavish")["settings"]["queue_limit"] != 8


def test_callers_who_load_and_unload_against_each_other_are_told_and_do_not_wait(running: Running) -> None:
    seen: list[tuple[int, float]] = []
    until = time.monotonic() + 3

    def call(what: str) -> None:
        with httpx.Client(base_url=running.url, timeout=150, headers={"Authorization": f"Bearer {running.token}"}) as client:
            while time.monotonic() < until:
                began = time.monotonic()
                answer = client.post(f"/v2/repository/models/log/{what}")
                seen.append((answer.status_code, time.monotonic() - began))

    callers = [threading.Thread(target=call, args=(what,)) for what in ("load", "unload") * 2]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    running.admin("POST", "/v2/repository/models/log/load", 200)
    assert {status for status, _ in seen} <= {200, 409} and max(took for _, took in seen) < 30


def test_callers_with_different_scalars_are_never_merged(running: Running) -> None:
    wrong: list[Any] = []

    def call(factor: int) -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            for _ in range(40):
                document = {"inputs": [json_input("x", "FP32", [2], [1, 2]), json_input("s", "FP32", [], factor)]}
                found = outputs(client.post("/v2/models/scalars/infer", json=document))
                if found["y"]["data"] != [factor, 2 * factor] or found["z"]["data"] != [3 * factor]:
                    wrong.append(found)

    callers = [threading.Thread(target=call, args=(factor,)) for factor in (2, 3, 5, 7)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_nan_and_infinity_come_back_whole_or_marked(running: Running) -> None:
    before = sum(samples(running, "hone_nonfinite_outputs_total", model="log"))
    values = np.array([-1, 0, 1], np.float32)
    headers, body = binary_body({"x": ("FP32", [3], values.tobytes())}, parameters={"binary_data_output": True})
    raw = running.call("POST", "/v2/models/log/infer", headers=headers, content=body)
    np.testing.assert_array_equal(np.frombuffer(raw.content[-12:], np.float32), [np.nan, -np.inf, 0])
    marked = outputs(infer(running, "log", json_input("x", "FP32", [3], [-1, 0, 1])))["y"]
    assert marked["data"] == [None, None, 0.0] and marked["parameters"]["non_finite"] == 2
    assert sum(samples(running, "hone_nonfinite_outputs_total", model="log")) >= before + 1
    assert sum(samples(running, "hone_nonfinite_inputs_total", model="log")) == 0
    headers, body = binary_body({"x": ("FP32", [3], np.full(3, np.nan, np.float32).tobytes())})
    poisoned = outputs(running.call("POST", "/v2/models/log/infer", headers=headers, content=body))["y"]
    assert poisoned["data"] == [None, None, None]
    assert sum(samples(running, "hone_nonfinite_inputs_total", model="log")) >= 1


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_nan_and_infinity_do_not_come_in_as_json(running: Running, word: str) -> None:
    document = '{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[' + word + "]}]}"
    answer = running.call("POST", "/v2/models/plain/infer", content=document)
    assert answer.status_code == 400 and "binary" in answer.json()["error"]


@pytest.mark.parametrize("element", ["1", "NaN"])
def test_what_has_no_json_form_says_so_also_where_the_json_is_none(running: Running, element: str) -> None:
    document = '{"inputs":[{"name":"x","datatype":"BF16","shape":[1],"data":[' + element + "]}]}"
    answer = running.call("POST", "/v2/models/sum16/infer", content=document)
    assert answer.status_code == 400 and "'x': BF16 has no JSON form; send it as binary" in answer.json()["error"]


@pytest.mark.parametrize("most", [2**63, 2**64 - 1])
def test_priority_and_timeout_are_64_bit_numbers_as_clients_have_them(running: Running, most: int) -> None:
    parameters = {"priority": most, "timeout": most}
    assert outputs(infer(running, "plain", json_input("x", "FP32", [1, 1], [1]), parameters=parameters))["y"]["data"] == [1]
    refused = infer(running, "plain", json_input("x", "FP32", [1, 1], [1]), parameters={"timeout": -1})
    assert refused.status_code == 400 and "timeout is -1; it is an integer of 64 bits: microseconds" in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("5", "the body is 5; it must be a JSON object"), ("", "the body is missing"), ('{"version": 5}', "version is 5; it should be a"),
        ('{"version": "1", "resaon": "x"}', "resaon is nothing that this takes; did you mean 'reason'? Known are version, reason"),
        ("{}", "version is missing"),
    ],
)  # fmt: skip
def test_admin_bodies_say_what_is_wrong_with_which_value(running: Running, body: str, said: str) -> None:
    assert said in running.admin("POST", "/admin/models/plain/promote", 400, content=body)["error"]


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", "application/xml"])
def test_admin_bodies_are_json_whatever_their_type_says(running: Running, kind: str) -> None:
    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": kind}
    answer = running.call("POST", "/admin/models/plain/promote", content='{"version": "1"}', headers=headers)
    assert answer.status_code == 409 and "is the desired one already" in answer.json()["error"]


def test_texts_return_unchanged(running: Running) -> None:
    texts = ["accused’s", "模型", "𝛑", "", "a\0b", "e\u0301"]
    items = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    headers, body = binary_body({"x": ("BYTES", [len(texts)], items)})
    assert outputs(running.call("POST", "/v2/models/text/infer", headers=headers, content=body))["y"]["data"] == texts
    assert outputs(infer(running, "text", json_input("x", "BYTES", [len(texts)], texts)))["y"]["data"] == texts
    headers, body = binary_body({"x": ("BYTES", [1], struct.pack("<I", 3) + b"\xff\xfe\x80")})
    refused = running.call("POST", "/v2/models/text/infer", headers=headers, content=body)
    assert refused.status_code == 400 and "UTF-8" in refused.json()["error"]


@pytest.mark.parametrize(("model", "said"), [("half", "cast_left"), ("locale", "xx_YY.UTF-8"), ("external", "model.onnx.data")])
def test_a_broken_model_says_why_and_harms_nobody(running: Running, model: str, said: str) -> None:
    lines = running.call("POST", "/v2/repository/index").json()
    running.until(lambda: said in running.call("POST", f"/v2/models/{model}/infer").text)
    answer = infer(running, model, json_input("x", "FP32", [1, 1], [1]))
    assert answer.status_code == 503 and said in answer.json()["error"]
    assert str(running.folder) not in answer.text, "paths are nobody's business"
    assert running.call("GET", f"/v2/models/{model}/ready").status_code == 503
    assert running.call("GET", "/v2/health/ready").status_code == 200
    assert {line["name"]: line["state"] for line in lines}["plain"] == "READY"


def test_a_weight_that_is_listed_as_an_input_is_a_weight(running: Running) -> None:
    metadata = running.call("GET", "/v2/models/weights").json()
    assert [spec["name"] for spec in metadata["inputs"]] == ["x"]
    assert outputs(infer(running, "weights", json_input("x", "FP32", [1, 4], [1] * 4)))["y"]["data"] == [4, 4, 4]
    overridden = infer(running, "weights", json_input("x", "FP32", [1, 4], [1] * 4), json_input("w", "FP32", [4, 3], [2] * 12))
    assert overridden.status_code == 400 and "'w'" in overridden.json()["error"]
    [golden] = running.admin("GET", "/admin/models/weights/versions")["versions"]
    assert any("listed as inputs" in note for note in golden["notes"]), golden


@pytest.mark.parametrize("model", ["time", "mean", "dynamic"])
def test_rows_that_mind_their_company_are_served_unbatched(running: Running, model: str) -> None:
    metadata = running.call("GET", f"/v2/models/{model}").json()
    assert metadata["properties"]["batching"].startswith("none: ")
    width = metadata["inputs"][0]["shape"][1]
    rows = np.random.default_rng(4).normal(size=(6, width)).astype(np.float32) * np.array([[1], [1000], [1], [1000], [1], [1000]])

    def call(values: Any) -> list[float]:
        answer = infer(running, model, json_input("x", "FP32", values.shape, values.astype(np.float32).ravel().tolist()))
        return list(outputs(answer)["y"]["data"])

    alone = [call(rows[at : at + 1]) for at in range(6)]
    together: dict[int, list[float]] = {}
    callers = [threading.Thread(target=lambda at=at: together.update({at: call(rows[at : at + 1])})) for at in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for at in range(6):
        np.testing.assert_allclose(together[at], alone[at], rtol=1e-5, atol=1e-5)


def test_an_int8_graph_answers_as_it_does_unoptimized(running: Running) -> None:
    """Halves are rounded to even between the steps; some releases of ONNX Runtime fused that away."""
    answer = outputs(infer(running, "resize", json_input("x", "FP32", [1, 1, 1, 3], [2, 7, 4])))
    assert answer["y"]["data"] == [2, 3, 6, 6, 5, 4]


def test_all_models_come_back_after_a_restart_as_they_were(running: Running) -> None:
    """Golden is held to its frozen outputs at each load: scalars, texts, fixed first axes and NaN must be comparable too."""
    frozen = [running.folder / "state" / "models" / model / "reference" / "meta.json" for model in SAMPLED]
    running.until(lambda: all(path.exists() for path in frozen))
    running.restart().ready(*GOOD)
    states = {model["name"]: (model["state"], model["failed"]) for model in running.admin("GET", "/admin/models")["models"]}
    assert {name: states[name] for name in GOOD} == dict.fromkeys(GOOD, ("ready", {}))
    assert "not frozen yet" not in running.log


def test_statistics_of_a_version_that_is_not_there(running: Running) -> None:
    model = running.admin("GET", "/admin/models")["models"][0]["name"]
    answer = running.call("GET", f"/v2/models/{model}/versions/99/stats")
    assert answer.status_code == 404 and "has no version '99'" in answer.json()["error"]
    assert running.call("GET", f"/v2/models/{model}/versions/1/stats").status_code == 200
