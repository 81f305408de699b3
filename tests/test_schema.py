"""The OpenAPI document and the server that it describes: every example is taken, every answer fits, and random requests find no 5xx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.models import corrupt, scaled
from tests.running_server import DEMO, Running, server

SCHEMATHESIS = Path(sys.executable).parent / "st"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth"
NEEDS_A_PAST = {
    ("post", "/admin/models/{model}/rollback"), ("delete", "/admin/models/{model}/versions/{version}"), ("post", "/admin/models/{model}/promote"),
    ("get", "/admin/models/{model}/versions/{version}/curves"),
}  # fmt: skip
"""Conflicts (409), forbidden (403) or not there (404) for a model that was never changed."""
LEFT_OUT = r"(unload|freeze|timeline)$"
"""What would end the run for all others, or never ends."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with server(tmp_path_factory.mktemp("schema"), demo=True, feedback_token="labels") as running:
        yield running.ready("digits")


@pytest.fixture(scope="module")
def document(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = running.call("GET", "/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method != "parameters":
                yield method, path, operation


def fits(document: dict[str, Any], operation: dict[str, Any], answer: httpx.Response) -> None:
    """The answer's status is documented, and its JSON is what the schema says."""
    described = operation["responses"][str(answer.status_code)]
    described = document["components"]["responses"][described["$ref"].rpartition("/")[2]] if "$ref" in described else described
    schema = described.get("content", {}).get("application/json", {}).get("schema")
    if schema is not None:
        jsonschema.validate(answer.json(), {**schema, "components": document["components"]}, jsonschema.Draft202012Validator)


def filled(path: str, job: str = "") -> str:
    return path.replace("{model}", "digits").replace("{version}", "1").replace("{job}", job)


def test_every_example_is_taken_and_every_answer_fits(running: Running, document: dict[str, Any]) -> None:
    token = {"Authorization": f"Bearer {running.token}"}
    taken = 0
    for method, path, operation in operations(document):
        for content_type, described in operation.get("requestBody", {}).get("content", {}).items():
            if "example" not in described or (method, path) in NEEDS_A_PAST or path.endswith("unload"):
                continue
            assert content_type == "application/json"
            sent = {"Authorization": "Bearer labels"} if path.endswith("/feedback") else token
            answer = running.call(method.upper(), filled(path), json=described["example"], headers=sent)
            assert answer.is_success, (method, path, answer.text)
            fits(document, operation, answer)
            taken += 1
    assert taken >= 10
    job = running.admin("GET", "/admin/jobs")["jobs"][0]["id"]
    for method, path, operation in operations(document):
        if method == "get" and (method, path) not in NEEDS_A_PAST and "text/event-stream" not in str(operation["responses"]["200"]):
            answer = running.call("GET", filled(path, job), headers=token)
            assert answer.is_success, (path, answer.text)
            fits(document, operation, answer)
    running.admin("DELETE", f"/admin/jobs/{job}")


def test_images_and_forms_are_taken_as_described(running: Running, document: dict[str, Any], tmp_path: Path) -> None:
    predict = document["paths"]["/models/{model}/predict"]["post"]
    picture = (DEMO / "digit.png").read_bytes()
    for sent in ({"content": picture, "headers": {"Content-Type": "image/png"}}, {"files": {"file": picture}}):
        answer = running.call("POST", "/models/digits/predict", **sent)
        assert answer.is_success, answer.text
        fits(document, predict, answer)
    upload = document["paths"]["/admin/models"]["post"]
    answer = running.call(
        "POST", "/admin/models", headers={"Authorization": f"Bearer {running.token}"}, data={"name": "sent"},
        files={"model.onnx": scaled(tmp_path / "model.onnx").read_bytes()},
    )  # fmt: skip
    assert answer.status_code == 201, answer.text
    fits(document, upload, answer)


def test_errors_fit_the_document_too(running: Running, document: dict[str, Any]) -> None:
    token = {"Authorization": f"Bearer {running.token}"}
    promote = document["paths"]["/admin/models/{model}/promote"]["post"]
    for path, body, status in [("digits", {"version": "1"}, 409), ("nobody", {"version": "1"}, 404), ("digits", {"versoin": "1"}, 400)]:
        answer = running.call("POST", f"/admin/models/{path}/promote", json=body, headers=token)
        assert answer.status_code == status, answer.text
        fits(document, promote, answer)
    scaled(running.folder / "models" / "halved" / "1" / "model.onnx")
    running.ready("halved")
    corrupt(running.folder / "models" / "halved" / "2" / "model.onnx")
    load = document["paths"]["/admin/models/{model}/versions/{version}/load"]["post"]
    running.until(lambda: "2" in running.admin("GET", "/admin/models/halved")["failed"])
    answer = running.call("POST", "/admin/models/halved/versions/2/load", headers=token)
    assert answer.status_code == 400, answer.text
    fits(document, load, answer)


@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="needs schemathesis: pip install -c constraints.txt '.[dev]'")
def test_random_requests_find_no_server_error(running: Running) -> None:
    arguments = [
        "run", f"{running.url}/openapi.json", "--header", f"Authorization: Bearer {running.token}", "--checks", CHECKS, "--max-examples", "10",
        "--phases", "examples,coverage,fuzzing", "--exclude-path", "/admin/models/{model}", "--exclude-path-regex", LEFT_OUT, "--seed", "7",
        "--suppress-health-check", "all", "--continue-on-failure", "--generation-database", "none",
    ]  # fmt: skip
    found = subprocess.run([SCHEMATHESIS, *arguments], capture_output=True, text=True, timeout=400, cwd=running.folder)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert running.call("GET", "/v2/health/ready").status_code == 200 and "Traceback" not in running.log
    assert running.call("GET", "/v2/models/digits/ready").status_code == 200
