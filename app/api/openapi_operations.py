"""What can be asked of Hone, as a table of operations with examples for one model: the source of the OpenAPI document.

Data only. How it becomes a document is in app.api.openapi, what bodies look like in app.api.openapi_schemas.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Final

from app.api.openapi_schemas import Schema, ref

JSON_TYPE: Final = "application/json"
BINARY_TYPE: Final = "application/octet-stream"
INFER_ERRORS: Final = "400 404 413 415 422 429 501 503 504"
"""What any call of a model may be answered with."""

_SEVEN: Final = ("........", ".######.", ".....##.", "....##..", "...##...", "...##...", "..##....", "........")


@dataclass(frozen=True, slots=True)
class Example:
    """A model that the examples are for; the default is the demo's, which `hone demo` serves."""

    model: str = "digits"
    version: str = "1"
    input: str = "image"
    datatype: str = "FP32"
    shape: tuple[int, ...] = (1, 1, 32, 32)
    output: str = "logits"
    data: tuple[float, ...] = ()
    image_png: bytes = b""

    def tensor(self) -> Schema:
        data = list(self.data) or [int(_SEVEN[row // 4][column // 4] == "#") for row in range(32) for column in range(32)]
        return {"name": self.input, "shape": list(self.shape), "datatype": self.datatype, "data": data}

    def png(self) -> bytes:
        return self.image_png or _png(_SEVEN)


@dataclass(frozen=True, slots=True)
class Operation:
    """One line of the table. `answers`: (status, description, schema name); `body`: (content type, schema, example); `either`: also
    documented under /versions/{version}; `who`: which tokens will do, "" where none will as well."""

    method: str
    path: str
    tag: str
    summary: str
    answers: tuple[tuple[int, str, str], ...]
    errors: str = ""
    body: tuple[tuple[str, Schema, Any], ...] = ()
    body_needed: bool = True
    who: tuple[str, ...] = ()
    query: tuple[tuple[str, Schema, str], ...] = ()
    headers: tuple[str, ...] = ()
    details: str = ""
    answer_type: str = JSON_TYPE
    either: bool = False
    also: str = ""
    """Another content type of the good answer."""
    sample: Any = None
    """An example of the good answer."""


READ: Final = ("viewer", "admin")
CHANGE: Final = ("admin",)


def _json(name: str, example: Any = None) -> tuple[tuple[str, Schema, Any], ...]:
    return ((JSON_TYPE, ref(name), example),)


def operations(example: Example) -> list[Operation]:
    """Everything that is served, in the order in which people read it."""
    tensor, image = example.tensor(), base64.b64encode(example.png()).decode()
    labels = [("7", 0.65), ("8", 0.104), ("1", 0.07)]
    predicted = {
        "model": example.model, "version": example.version,
        "predictions": [{"label": label, "index": int(label), "probability": probability} for label, probability in labels],
    }  # fmt: skip
    logits = [-0.86, 0.96, -1.21, 0.71, -0.87, 1.04, -0.93, 1.14, 1.23, 0.75]
    inferred = {
        "model_name": example.model, "model_version": example.version, "id": "one",
        "outputs": [{"name": example.output, "datatype": "FP32", "shape": [1, 10], "data": logits}],
    }  # fmt: skip
    infer = {"id": "one", "inputs": [tensor], "outputs": [{"name": example.output}]}
    return [
        Operation(
            "POST", "/models/{model}{either}/predict", "predict", "Ask a model the friendly way", ((200, "The answer.", "Prediction"),),
            INFER_ERRORS,
            (
                ("image/png", {}, None), ("image/jpeg", {}, None), (JSON_TYPE, ref("PredictJson"), {"image": image}),
                ("text/plain", {"type": "string"}, None),
                ("multipart/form-data", {"type": "object", "properties": {"file": {"type": "string", "contentMediaType": "image/png"}}}, None),
                (BINARY_TYPE, {}, None),
            ),
            headers=("Content-Encoding", "X-Request-Id"), either=True, sample=predicted,
            details="Images, texts and JSON tensors, as the model's `preprocess` declares; model.yaml's `postprocess` says how its outputs "
            "read. A form has one file. A body of application/octet-stream is known by its first bytes.",
        ),
        Operation(
            "POST", "/v2/models/{model}{either}/infer", "inference", "Infer", ((200, "The outputs.", "InferResponse"),), INFER_ERRORS,
            ((JSON_TYPE, ref("InferRequest"), infer), (BINARY_TYPE, {}, None)),
            headers=("Inference-Header-Content-Length", "Content-Encoding", "Accept-Encoding", "X-Request-Id"), also=BINARY_TYPE, either=True, sample=inferred,
            details="Binary form: the JSON, then the raw little-endian tensors in the order of the inputs; the header "
            "Inference-Header-Content-Length says where the JSON ends, `binary_data_size` how long each tensor is. With the header 0 the body "
            "is the model's one input alone. Without it the body is JSON.",
        ),
        Operation(
            "POST", "/models/{model}/feedback", "predict", "True labels of answers given before", ((200, "What was taken.", "Nothing"),),
            "400 401 404 413", _json("FeedbackBody", {"labels": [{"id": "one", "label": 7}]}), who=("feedback",),
            details="By the X-Request-Id of each answer, once. Labels only ask the loop to look. Off unless HONE_FEEDBACK_TOKEN is set.",
        ),
        Operation("GET", "/v2", "models", "The server and its extensions", ((200, "Metadata.", "ServerMetadata"),)),
        Operation(
            "GET", "/v2/models/{model}{either}", "models", "What a model takes and gives", ((200, "Metadata.", "ModelMetadata"),), "404 503",
            either=True,
        ),
        Operation(
            "GET", "/v2/models/{model}{either}/ready", "models", "Whether a model answers",
            ((200, "It does.", "ModelReady"), (503, "Not now; `error` says why.", "ModelReady")), "404", either=True,
        ),
        Operation(
            "GET", "/v2/models/{model}{either}/config", "models", "Triton's model configuration", ((200, "Configuration.", "ModelConfiguration"),),
            "404 503", either=True,
        ),
        Operation(
            "GET", "/v2/models/{model}{either}/stats", "models", "Statistics of a model", ((200, "Since the server's start.", "ModelStatistics"),),
            "401 404", either=True, who=("", *READ), details="Open, unless HONE_METRICS says otherwise.",
        ),
        Operation(
            "GET", "/v2/models/stats", "models", "Statistics of all models", ((200, "Since the server's start.", "ModelStatistics"),), "401 404",
            who=("", *READ), details="Open, unless HONE_METRICS says otherwise.",
        ),
        Operation(
            "POST", "/v2/repository/index", "repository", "All models and versions with their state", ((200, "The index.", "Index"),), "400 413",
            _json("IndexRequest", {"ready": False}), body_needed=False,
        ),
        Operation(
            "POST", "/v2/repository/models/{model}/load", "repository", "Load a model", ((200, "It is loaded.", "Nothing"),),
            "400 401 403 404 409 413 501 503 507", _json("LoadRequest", {}), body_needed=False, who=CHANGE,
        ),
        Operation(
            "POST", "/v2/repository/models/{model}/unload", "repository", "Unload a model", ((200, "It is unloaded.", "Nothing"),),
            "400 401 403 404 409 413 503", _json("UnloadRequest", {}), body_needed=False, who=CHANGE,
        ),
        *_admin(example),
        Operation("GET", "/v2/health/live", "operation", "Whether the process lives", ((200, "It does.", "Live"),)),
        Operation(
            "GET", "/v2/health/ready", "operation", "Whether requests should come here", ((200, "Yes.", "Ready"), (503, "Not now.", "Ready")),
        ),
        Operation(
            "GET", "/metrics", "operation", "Metrics in Prometheus' text form", ((200, "Metrics.", ""),), "401 404",
            who=("", *READ), answer_type="text/plain", details="Open, unless HONE_METRICS says otherwise.",
        ),
    ]  # fmt: skip


def _admin(example: Example) -> list[Operation]:
    model, reason = "/admin/models/{model}", {"reason": "asked for"}

    def read(path: str, summary: str, schema: str, errors: str = "401", **more: Any) -> Operation:
        return Operation("GET", path, "admin", summary, ((200, summary + ".", schema),), errors, who=READ, **more)

    def change(method: str, path: str, summary: str, status: int = 200, errors: str = "404", body: Any = (), **more: Any) -> Operation:
        schema = more.pop("schema", "Nothing")
        all_errors = " ".join(sorted({"401", "403", "503", *errors.split(), *(["400", "413"] if body else [])}))
        return Operation(
            method, path, "admin", summary, ((status, more.pop("said", "Done."), schema),), all_errors, body, who=CHANGE, **more
        )

    return [
        read("/admin/status", "The server, its host and what it decided at start", "Nothing"),
        read("/admin/models", "All models", "ModelList"),
        change(
            "POST", "/admin/models", "Upload and deploy a model", 201, "409 411 415 501 507",
            (("multipart/form-data", ref("Upload"), None),), said="Checked and deployed.", schema="Deployed",
            details="A form with `name` and the files: model.onnx, or its packed form; its external data under its own file name where it has some; model.yaml, "
            "with the labels, tokenizer and samples that it names. "
            "All of it is checked before anything changes.",
        ),
        read(model, "One model", "Model", "401 404"),
        change("DELETE", model, "Remove a model", said="It is served no longer.", errors="404 409"),
        read(f"{model}/explain", "Why the active version is the active one", "Model", "401 404 503"),
        read(f"{model}/versions", "Versions with their lineage, fidelity and speed", "VersionList", "401 404"),
        read(
            f"{model}/versions/{{version}}/curves", "What each layer costs when it alone is cut, as a picture", "", "400 401 404", answer_type="image/svg+xml",
            details="For versions that sensitivity-pruning built, or a method with rank=sensitivity.",
        ),
        change("DELETE", f"{model}/versions/{{version}}", "Remove a built version", errors="404 409", said="Its weights go, its card stays."),
        change("POST", f"{model}/versions/{{version}}/load", "Load a version beside the active one", errors="400 404 409 501 507", said="It answers under /versions."),
        change(
            "POST", f"{model}/optimize", "Ask for a better version", 202, "404 409", _json("OptimizeBody", {"recipe": ["graph"], **reason}),
            body_needed=False, said="The job is in the journal.", schema="Job",
        ),
        change("POST", f"{model}/verify", "Prove a version on this class of host", 202, "404 409", _json("ReasonBody", reason), body_needed=False, said="Under way.", schema="Job"),
        change("POST", f"{model}/promote", "Make a version the desired one", errors="404 409", body=_json("PromoteBody", {"version": example.version, **reason}), schema="Model"),
        change("POST", f"{model}/rollback", "Back to what was before, at once", errors="404 409", body=_json("ReasonBody", reason), body_needed=False, schema="Model"),
        change("PATCH", f"{model}/settings", "Change run-time settings on the live server", errors="404 409", body=_json("SettingsBody", {"batch_limit": 8}), schema="Model"),
        change("PUT", f"{model}/mode", "How far the loop goes by itself", body=_json("ModeBody", {"mode": "approve"})),
        change("PUT", f"{model}/ladder", "Which versions may answer in its place under load", errors="404 409", body=_json("LadderBody", {"rungs": []})),
        change("DELETE", f"{model}/capture", "Delete the captured live inputs"),
        read(
            "/admin/jobs", "Jobs", "JobList", "400 401",
            query=(("model", {"type": "string"}, "Only this model's."), ("open", {"type": "boolean"}, "Only those that are not finished.")),
        ),
        read("/admin/jobs/{job}", "One job", "Job", "401 404"),
        change("DELETE", "/admin/jobs/{job}", "Cancel a job", 202, "404 409", said="Asked for.", schema="Job"),
        read(
            "/admin/timeline", "What was decided, by whom and why", "Timeline", "400 401 503", also="text/event-stream",
            query=(
                ("model", {"type": "string"}, "Only this model's."),
                ("after", {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, "Only later events; without it the newest."),
                ("limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "Most events; with `follow` of those that were before."),
                ("follow", {"type": "boolean"}, "Server-sent events until you leave: those first, then what happens."),
            ),
        ),
        change("POST", "/admin/freeze", "Stop all change but rollback", errors=""),
        change("POST", "/admin/unfreeze", "Allow it again", errors=""),
    ]  # fmt: skip


def _png(rows: tuple[str, ...]) -> bytes:
    """A grey PNG of a few pixels: '#' is ink (white), '.' is paper (black)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + bytes(255 * (pixel == "#") for pixel in row) for row in rows)
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
