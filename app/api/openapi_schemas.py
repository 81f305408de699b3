"""Schemas of the OpenAPI document: what bodies look like that Hone reads and writes by hand. Data only; operations are in app.api.openapi."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from app.api.admin import LadderBody, ModeBody, OptimizeBody, PromoteBody, ReasonBody, SettingsBody
from app.api.labels import FeedbackBody, TrueLabel
from app.domain import BYTES, DATATYPE_SIZES, JobState, Mode, VersionState

Schema = dict[str, Any]
REF: Final = "#/components/schemas/"


def ref(name: str) -> Schema:
    return {"$ref": REF + name}


def obj(required: str = "", description: str = "", **properties: Schema) -> Schema:
    """An object; `required` names properties, blank-separated. More properties may come: readers ignore what they do not know."""
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required.split()
    return schema | ({"description": description} if description else {})


def array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def mapping(values: Schema, description: str = "") -> Schema:
    return {"type": "object", "additionalProperties": values} | ({"description": description} if description else {})


def text(description: str = "", **more: Any) -> Schema:
    return {"type": "string"} | ({"description": description} if description else {}) | more


def number(description: str = "", kind: str = "number", **more: Any) -> Schema:
    return {"type": kind} | ({"description": description} if description else {}) | more


def integer(description: str = "", **more: Any) -> Schema:
    return number(description, "integer", **more)


def flag(description: str = "") -> Schema:
    return {"type": "boolean"} | ({"description": description} if description else {})


SHAPE: Final = array(integer(minimum=0), description="Length of each axis, row-major; [] is a scalar.")
MODEL_SHAPE: Final = array(integer(minimum=-1), description="-1 is a variable axis.")
PARAMETERS: Final = mapping({"type": ["string", "number", "boolean"]}, "Unknown parameters are ignored.")
TENSOR_DATA: Final[Schema] = {
    "description": "Row-major, nested or flat. Integers in range without fraction, finite floats, true and false, strings for BYTES; "
    "FP16 and BF16 have no JSON form. In answers NaN and infinity are null, counted in the parameter `non_finite`.",
    "type": ["array", "number", "string", "boolean", "null"],
}
SPENT: Final = obj("count ns", count=integer(), ns=integer("Nanoseconds in all."))
SECONDS: Final = number("Unix time in seconds, for people; `seq` orders events.")

SCHEMAS: Final[dict[str, Schema]] = {
    "Error": obj("error", "Every error, from any endpoint.", error=text("What is wrong, by which rule, and what helps.")),
    "Datatype": {"type": "string", "enum": [*DATATYPE_SIZES, BYTES]},
    "Live": obj("live", live=flag()),
    "Ready": obj("ready", ready=flag(), live=flag(), reason=text("Why not, where it is not.")),
    "ServerMetadata": obj("name version extensions", name=text(), version=text(), extensions=array(text())),
    "TensorMetadata": obj("name datatype shape", name=text(), datatype=ref("Datatype"), shape=MODEL_SHAPE),
    "ModelMetadata": obj(
        "name versions platform inputs outputs",
        name=text(),
        versions=array(text(), description="Those that are loaded and answer under /versions/{version}."),
        platform=text(examples=["onnx_onnxv1"]),
        inputs=array(ref("TensorMetadata")),
        outputs=array(ref("TensorMetadata")),
        properties=mapping(text(), "Active version, its generation, and whether requests share calls of the model."),
    ),
    "ModelReady": obj("name ready", name=text(), ready=flag(), error=text("Why not, where it is not.")),
    "ModelConfiguration": obj(
        "name platform max_batch_size input output",
        "Triton's model configuration, as far as clients read it. `dims` come without the batch axis where max_batch_size is not 0.",
        name=text(),
        platform=text(),
        backend=text(),
        max_batch_size=integer(),
        input=array(obj("name data_type dims", name=text(), data_type=text(examples=["TYPE_FP32"]), dims=MODEL_SHAPE)),
        output=array(obj("name data_type dims", name=text(), data_type=text(), dims=MODEL_SHAPE)),
    ),
    "ModelStatistics": obj(
        "model_stats",
        model_stats=array(
            obj(
                "name version inference_count execution_count inference_stats",
                name=text(),
                version=text(),
                last_inference=integer("Unix time in milliseconds."),
                inference_count=integer("Rows."),
                execution_count=integer("Calls of the model."),
                inference_stats=mapping(SPENT, "success, fail, queue, compute_input, compute_infer, compute_output."),
                batch_stats=array(obj("batch_size", batch_size=integer(), compute_infer=SPENT)),
                memory_usage=array(obj(type=text(), id=integer(), byte_size=integer())),
            )
        ),
    ),
    "InferInput": obj(
        "name datatype shape",
        "With `data`, or with the parameter `binary_data_size` and its bytes after the JSON.",
        name=text(minLength=1),
        datatype=ref("Datatype"),
        shape=SHAPE,
        parameters=PARAMETERS,
        data=TENSOR_DATA,
    ),
    "InferRequest": obj(
        "inputs",
        id=text("Echoed in the answer."),
        parameters=PARAMETERS
        | {"description": "`priority` (1 highest, 0 default), `timeout` (µs), `binary_data_output`; unknown ones are ignored."},
        inputs=array(ref("InferInput"), minItems=1),
        outputs=array(
            obj("name", name=text(minLength=1), parameters=PARAMETERS | {"description": "`binary_data`: true for the binary form."}),
            description="Those wanted; default: all.",
        ),
    ),
    "InferResponse": obj(
        "model_name outputs",
        model_name=text(),
        model_version=text(),
        id=text(),
        outputs=array(
            obj("name datatype shape", name=text(), datatype=ref("Datatype"), shape=SHAPE, parameters=PARAMETERS, data=TENSOR_DATA)
        ),
    ),
    "IndexRequest": obj(ready=flag("Only versions that are ready.")),
    "Index": array(
        obj(
            "name version state reason",
            name=text(),
            version=text(),
            state={"type": "string", "enum": [state.value for state in VersionState]},
            reason=text(),
        )
    ),
    "LoadRequest": obj(parameters=mapping({}, "`file:VERSION/NAME`: a file in base64, where HONE_ALLOW_FILE_PARAMETERS=true.")),
    "UnloadRequest": obj(parameters=mapping({}, "`unload_dependents` is taken and means nothing here.")),
    "Nothing": {"type": "object"},
    "PredictJson": {
        "description": "One of the forms; which of them a model takes is in its model.yaml. NaN and infinity have no JSON form.",
        "anyOf": [
            obj("image", image=text("A PNG or JPEG file in base64, bare or as a data: URL.")),
            obj("text", text=text()),
            obj("texts", texts=array(text(), minItems=1)),
            obj("data", data=TENSOR_DATA | {"description": "The one input, nested as its shape; one row may leave the first axis out."}),
            mapping({}, "Each input's name with its nested list."),
            array({}, description="The one input as a bare nested list."),
        ],
    },
    "Label": obj("index probability", label=text("Where model.yaml names the classes."), index=integer(minimum=0), probability=number()),
    "Prediction": obj(
        "model version",
        "`predictions` from a classifier: a list of labels, the likeliest first, for one image, text or row; a list of such lists for a batch. "
        "Else `outputs`. Values that are not finite are null, a row without probabilities is empty, and `non_finite` counts them.",
        model=text(),
        version=text(),
        predictions={"type": "array", "items": {"anyOf": [ref("Label"), array(ref("Label"))]}},
        outputs=mapping(TENSOR_DATA),
        non_finite=integer(minimum=1),
    ),
    "Model": obj("name", "What is served under a name, what is desired, and why they differ where they do.", name=text()),
    "Deployed": obj(
        "model version ready",
        "What was made of an upload. `ready` is false where it takes longer to load than the call waits.",
        model=text(),
        version=text(),
        ready={"type": "boolean"},
        notes=array(text()),
    ),
    "ModelList": obj("models", models=array(ref("Model"))),
    "Version": obj("version", "One version with its parent, recipe, and proof on this class of host.", version=text()),
    "VersionList": obj("model versions", model=text(), versions=array(ref("Version"))),
    "Job": obj(
        "id model state",
        id=text(),
        model=text(),
        state={"type": "string", "enum": [state.value for state in JobState]},
        outcome=text("promoted, kept, refused, nothing_changed, not_applicable, failed, cancelled or inconclusive; empty while it runs."),
        report=mapping({}, "What was tried, measured and decided."),
    ),
    "JobList": obj("jobs", jobs=array(ref("Job"))),
    "Event": obj(
        "seq kind",
        "One decision or milestone.",
        seq=integer(minimum=0),
        at=SECONDS,
        kind=text("noun.past_participle", examples=["desired.changed"]),
        model=text(),
        version=text(),
        job=text(),
        actor=text("Who made it so."),
        data=mapping({}),
    ),
    "Timeline": obj("events", events=array(ref("Event"))),
    "Mode": {"type": "string", "enum": [mode.value for mode in Mode]},
    "Upload": {
        "type": "object",
        "required": ["name"],
        "anyOf": [{"required": ["model.onnx"]}, {"required": ["model.onnx.packed"]}],
        "properties": {
            "name": text("Name of the model.", examples=["digits2"]),
            "model.onnx": text(contentMediaType="application/octet-stream"),
            "model.onnx.packed": text("In its place: what `hone pack` writes.", contentMediaType="application/octet-stream"),
            "model.yaml": text("Default: all defaults.", contentMediaType="application/yaml"),
        },
        "additionalProperties": text(
            "Files of external data, and what model.yaml names beside itself.", contentMediaType="application/octet-stream"
        ),
    },
}
BODIES: Final[tuple[type[BaseModel], ...]] = (
    OptimizeBody,
    PromoteBody,
    ReasonBody,
    SettingsBody,
    ModeBody,
    LadderBody,
    FeedbackBody,
    TrueLabel,
)


def all_schemas() -> dict[str, Schema]:
    """Those above, and the admin bodies as their own models describe them."""
    schemas = dict(SCHEMAS)
    for body in BODIES:
        schema = body.model_json_schema(ref_template=REF + "{model}")
        schema.pop("$defs", None)
        schemas[body.__name__] = schema
    return schemas
