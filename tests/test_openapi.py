"""The OpenAPI document is valid and tells the truth; the page at /docs needs nothing from elsewhere."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import onnxruntime
import orjson
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.applications import Starlette

from app.api import docs
from app.api.admin import Admin, Operations, Uploads, Views
from app.api.application import Surfaces
from app.api.auth import Guard
from app.api.docs import docs_routes
from app.api.friendly import read_input, write_answer
from app.api.openapi import Example, build_openapi
from app.api.predict import PATHS
from app.api.wire import encode_response, parse_infer, validate
from app.catalog.model_config import load_model_config
from app.catalog.processing import Processor
from app.catalog.tensors import to_array, to_tensor
from app.domain import InferenceResult, Signature, TensorSpec

DEMO = Path(__file__).parent.parent / "app" / "demo_models" / "repository" / "digits"
METHODS = ("get", "post", "put", "patch", "delete")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_openapi()


def each_operation(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, described in document["paths"].items():
        for method in METHODS:
            if method in described:
                yield method, path, described[method]


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """`schema` with the document's components where its references look for them."""
    return Draft202012Validator({**schema, "components": document["components"]})


def test_the_document_is_valid_openapi_31(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert [str(error) for error in OpenAPIV31SpecValidator(document).iter_errors()] == []
    assert orjson.loads(orjson.dumps(document)) == document


def test_every_schema_is_one_and_is_used(document: dict[str, Any]) -> None:
    written = orjson.dumps(document).decode()
    for name, schema in document["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert f'"#/components/schemas/{name}"' in written or name == "Datatype", f"nothing refers to {name}"


def test_every_operation_says_who_may_what_and_how_it_fails(document: dict[str, Any]) -> None:
    identities = [operation["operationId"] for _, _, operation in each_operation(document)]
    assert len(identities) == len(set(identities))
    for method, path, operation in each_operation(document):
        statuses = set(operation["responses"])
        assert any(status.startswith("2") for status in statuses), path
        if path.startswith("/admin"):
            assert "401" in statuses and {"admin": []} in operation["security"], path
            assert ({"viewer": []} in operation["security"]) is (method == "get"), path
            assert ("403" in statuses) is (method != "get"), path
        if "401" in statuses:
            assert any(operation["security"]), f"{path}: /docs would send no token"
        if "{" in path:
            assert "404" in statuses, path
        if "requestBody" in operation:
            assert {"400", "413"} <= statuses, path
        for status, response in operation["responses"].items():
            assert status < "400" or status == "503" or response == {"$ref": f"#/components/responses/Error{status}"}


def test_every_protocol_endpoint_is_there_with_and_without_its_version(document: dict[str, Any]) -> None:
    described = {(method, path) for method, path, _ in each_operation(document)}
    for suffix, method in [("", "get"), ("/ready", "get"), ("/config", "get"), ("/stats", "get"), ("/infer", "post")]:
        for middle in ("", "/versions/{version}"):
            assert (method, f"/v2/models/{{model}}{middle}{suffix}") in described
    for method, path in [
        ("get", "/v2"), ("get", "/v2/health/live"), ("get", "/v2/health/ready"), ("get", "/v2/models/stats"), ("get", "/metrics"),
        ("post", "/v2/repository/index"), ("post", "/v2/repository/models/{model}/load"), ("post", "/v2/repository/models/{model}/unload"),
        *(("post", path) for path in PATHS),
    ]:  # fmt: skip
        assert (method, path) in described


def test_the_admin_side_is_described_as_it_is_routed(document: dict[str, Any]) -> None:
    def nameless(path: str) -> str:
        return re.sub(r"{\w+}", "{}", path)

    router = Admin(cast(Views, None), cast(Operations, None), cast(Uploads, None), cast(Guard, None)).router()
    routed = {(method.lower(), nameless(getattr(route, "path", ""))) for route in router.routes for method in getattr(route, "methods", ())}
    described = {(method, nameless(path)) for method, path, _ in each_operation(document) if path.startswith("/admin")}
    assert described == routed


def test_every_example_fits_its_schema(document: dict[str, Any]) -> None:
    seen = 0
    for _, path, operation in each_operation(document):
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in (body.get("content", {}) for body in bodies):
            for described in content.values():
                if "example" in described:
                    seen += 1
                    errors = [error.message for error in validator(document, described["schema"]).iter_errors(described["example"])]
                    assert errors == [], path
    assert seen > 12


class Demo:
    """The demo's model, called in place."""

    def __init__(self) -> None:
        self.session = onnxruntime.InferenceSession(str(DEMO / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
        self.signature = Signature(
            (TensorSpec("image", "FP32", (-1, 1, 32, 32)),), (TensorSpec("logits", "FP32", (-1, 10)),), batchable=True
        )
        config = load_model_config(DEMO / "model.yaml")
        self.processor = Processor(self.signature, config.preprocess, config.postprocess, DEMO, config.task)

    def run(self, values: np.ndarray[Any, Any]) -> InferenceResult:
        (logits,) = self.session.run(["logits"], {"image": values})
        return InferenceResult([to_tensor("logits", "FP32", logits)], "digits", "1", 1, 0.0, 0.0, 1)


def test_an_upload_is_one_model_plain_or_packed(document: dict[str, Any]) -> None:
    upload = validator(document, {"$ref": "#/components/schemas/Upload"})
    assert all(upload.is_valid({"name": "m", form: ""}) for form in ("model.onnx", "model.onnx.packed"))
    assert not upload.is_valid({"name": "m"}) and not upload.is_valid({"model.onnx": ""})


def test_what_may_happen_meanwhile_is_said(document: dict[str, Any]) -> None:
    """The journal that is read may be away; others may load what is being unloaded."""
    for path in ("/admin/timeline", "/admin/models/{model}/explain"):
        assert "503" in document["paths"][path]["get"]["responses"]
    assert "409" in document["paths"]["/v2/repository/models/{model}/unload"]["post"]["responses"]


def example_of(document: dict[str, Any], path: str) -> Any:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]


def test_the_demo_model_reads_the_predict_example_as_a_seven(document: dict[str, Any]) -> None:
    demo = Demo()
    body = orjson.dumps(example_of(document, "/models/{model}/predict"))
    encoded = read_input(body, "application/json", demo.processor, demo.signature)
    reply = write_answer(demo.processor, demo.run(to_array(encoded.tensors[0])), encoded.single)
    answer = orjson.loads(bytes(reply.parts[0]))
    assert answer["predictions"][0]["label"] == "7"
    assert list(validator(document, {"$ref": "#/components/schemas/Prediction"}).iter_errors(answer)) == []
    shown = document["paths"]["/models/{model}/predict"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
    assert [prediction["label"] for prediction in shown["predictions"]] == [prediction["label"] for prediction in answer["predictions"]]


def test_the_demo_model_takes_the_infer_example(document: dict[str, Any]) -> None:
    demo = Demo()
    parsed = parse_infer(orjson.dumps(example_of(document, "/v2/models/{model}/infer")), None)
    assert validate(parsed.request, demo.signature) == 1
    reply = encode_response(demo.run(to_array(parsed.request.inputs[0])), parsed)
    answer = orjson.loads(bytes(reply.parts[0]))
    assert answer["id"] == "one"
    assert list(validator(document, {"$ref": "#/components/schemas/InferResponse"}).iter_errors(answer)) == []


def test_examples_can_be_of_another_model() -> None:
    document = build_openapi(Example("iris", "3", "x", "FP64", (1, 4), "y", (1.0, 2.0, 3.0, 4.0), b"\x89PNG"))
    infer = example_of(document, "/v2/models/{model}/versions/{version}/infer")
    assert infer["inputs"] == [{"name": "x", "shape": [1, 4], "datatype": "FP64", "data": [1.0, 2.0, 3.0, 4.0]}]
    assert base64.b64decode(example_of(document, "/models/{model}/predict")["image"]) == b"\x89PNG"
    parameters = document["paths"]["/v2/models/{model}"]["get"]["parameters"]
    assert parameters[0]["example"] == "iris"


def test_each_of_two_ports_describes_what_it_serves(document: dict[str, Any]) -> None:
    inference, admin = (set(build_openapi(serves=sides.serves)["paths"]) for sides in (Surfaces(admin=False), Surfaces(inference=False)))
    assert inference | admin == set(document["paths"])
    assert inference & admin == {"/v2/health/live", "/v2/health/ready", "/metrics"}
    assert {"/v2/models/{model}/infer", "/models/{model}/feedback", "/v2/repository/index"} <= inference
    assert {"/admin/models", "/v2/repository/models/{model}/load"} <= admin


# -- the page


class Site:
    """The page's routes, called without a socket."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._transport = httpx.ASGITransport(Starlette(routes=docs_routes(document)), raise_app_exceptions=False)

    def get(self, path: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://hone.test") as client:
                return await client.get(path)

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def site(document: dict[str, Any]) -> Site:
    return Site(document)


def assert_closed(response: httpx.Response) -> None:
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "http" not in policy and "unsafe-eval" not in policy and "*" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_and_all_it_asks_for_come_from_this_server(site: Site, document: dict[str, Any]) -> None:
    page = site.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert_closed(page)
    wanted = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(wanted) >= 5
    for address in wanted:
        got = site.get(f"/{address}")
        assert got.status_code == 200 and len(got.content) > 20, address
        if address != "openapi.json":
            assert_closed(got)
    assert site.get("/openapi.json").json() == document


def test_our_own_files_name_no_other_server_and_run_nothing_inline() -> None:
    for path in docs.OWN.iterdir():
        written = path.read_text()
        assert "://" not in written, path
        assert 'src="//' not in written and "@import" not in written, path
        assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=\"|style=\"", written), path
    assert "validatorUrl: null" in (docs.OWN / "docs.js").read_text(), "Swagger UI asks a validator on the internet otherwise"


@pytest.mark.parametrize("name", ["../docs.py", "..%2fdocs.py", "docs.html", "main.py", "%00"])
def test_the_page_serves_only_its_own_files(site: Site, name: str) -> None:
    assert site.get(f"/docs/{name}").status_code >= 400
