"""The schema of model.yaml: what a model is, how it should behave, what may be done to it. The only place that lists its keys.

`load_model_config` reads a file into it; every error names the key with its file and line, the rule and the remedy.
It reads no model file, and knows neither the repository nor what the values are used for.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from app.catalog import config_errors, yaml_file
from app.catalog.sections import Postprocess, Preprocess
from app.domain import Mode, Signature, TensorSpec
from app.errors import ModelRejected
from optimizers.catalogue import config_types

MAX_BYTES: Final = yaml_file.MAX_BYTES
FILE_NAME: Final = "model.yaml"

Positive: TypeAlias = Annotated[float, Field(gt=0)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Metric: TypeAlias = Literal["auto", "agreement", "accuracy", "cosine", "sqnr_db"]
SamplesFrom: TypeAlias = Annotated[str, Field(min_length=1, max_length=4096)]

CAPTURED: Final = "captured"
DEFAULT_FLOORS: Final[dict[str, float]] = {"agreement": 0.99, "accuracy": 0.99, "cosine": 0.999, "sqnr_db": 20.0}
DEFAULT_METRICS: Final[dict[str, Metric]] = {
    "classification": "agreement",
    "regression": "cosine",
    "embedding": "cosine",
    "generic": "cosine",
}


class Strict(BaseModel):
    """Unknown keys and silent conversions are errors: what is ignored or guessed is a model that misbehaves later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DeclaredTensor(Strict):
    """One input or output of a PyTorch model, which cannot say so itself."""

    name: Annotated[str, Field(min_length=1, max_length=255)]
    """Its name in requests and answers; inputs are given to forward() in this order."""
    datatype: Literal["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64"]
    """As in the Open Inference Protocol."""
    shape: Annotated[tuple[Annotated[int, Field(ge=-1)], ...], Field(strict=False, max_length=16)]
    """-1 is a variable dimension; the first is the batch."""


class Source(Strict):
    """The PyTorch source of the model: needed to serve a PyTorch model, and for the methods that train."""

    factory: Annotated[str, Field(max_length=512)]
    """FILE.py:FUNCTION that returns the module without weights; the file lies in a folder that the operator allowed (HONE_FACTORIES)."""
    weights: Annotated[str, Field(min_length=1, max_length=255)] = "model.safetensors"
    """Name of the .safetensors file in the version's folder."""
    inputs: Annotated[tuple[DeclaredTensor, ...], Field(strict=False, max_length=64)] = ()
    """What forward() takes; needed to serve the PyTorch model itself (platform torch)."""
    outputs: Annotated[tuple[DeclaredTensor, ...], Field(strict=False, max_length=64)] = ()
    """What forward() returns; needed to serve the PyTorch model itself (platform torch)."""

    def signature(self) -> Signature:
        """Raises ModelRejected where inputs or outputs are not declared."""
        if not self.inputs or not self.outputs:
            raise ModelRejected(
                "a PyTorch model does not say what it takes and gives: declare source.inputs and source.outputs in model.yaml, "
                "each with name, datatype and shape, or export the model to ONNX"
            )
        specs = [tuple(TensorSpec(t.name, t.datatype, t.shape) for t in tensors) for tensors in (self.inputs, self.outputs)]
        return Signature(specs[0], specs[1])

    @field_validator("factory")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        file, _, function = value.rpartition(":")
        if not file.endswith(".py") or not function.isidentifier():
            raise ValueError("expected FILE.py:FUNCTION, such as resnet.py:build")
        if ".." in Path(file).parts:
            raise ValueError("'..' may not stand in the path; name the file as seen from its folder in HONE_FACTORIES")
        return value

    @field_validator("weights")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if "/" in value or "\0" in value or value.startswith(".") or not value.endswith(".safetensors"):
            raise ValueError("expected the name of a .safetensors file in the version's folder, such as model.safetensors")
        return value


CLEARLY_MISSED: Final = 0.75
"""So many late answers break any promise, also one that lets half of them be late."""


@dataclass(frozen=True, slots=True)
class Promise:
    """At least `share` of the answers come within `threshold_s`."""

    share: float
    threshold_s: float

    @property
    def text(self) -> str:
        return f"p{self.share * 100:g} ≤ {self.threshold_s * 1e3:g} ms"

    @property
    def most_missed(self) -> float:
        """Share of late answers from which it is clearly broken: twice what it allows, where that is not nearly all."""
        return min(2 * (1 - self.share), CLEARLY_MISSED)


class Objective(Strict):
    """What the model is held to in production. Each is optional; without any, the version's own proof is the yardstick."""

    p50_ms: Positive | None = None
    """Half of the requests are answered within this many milliseconds."""
    p95_ms: Positive | None = None
    """95 % of the requests are answered within this many milliseconds."""
    p99_ms: Positive | None = None
    """99 % of the requests are answered within this many milliseconds."""
    throughput_rps: Positive | None = None
    """Requests per second that the model must be able to serve: looked into where as many come and fewer are answered."""
    error_rate: Share | None = None
    """Largest share of requests that may fail by the server's or the model's fault."""
    memory_mb: Positive | None = None
    """Largest memory of the version's runner, in MiB (PSS)."""
    cpu_s_per_request: Positive | None = None
    """Largest CPU time per request of its runner, in seconds."""
    fidelity: Share | None = None
    """Least agreement with the golden version on live requests."""
    availability: Share | None = None
    """Least share of the requests of five minutes that are answered, neither refused nor failed."""

    @property
    def promise(self) -> Promise | None:
        """The one that is counted; None where none is named."""
        return next(iter(self.promises), None)

    @property
    def promises(self) -> list[Promise]:
        """Of latency, the one that is counted first: p95, else p99, else p50. The others are read off the sketches."""
        named = ((0.95, self.p95_ms), (0.99, self.p99_ms), (0.5, self.p50_ms))
        return [Promise(share, ms / 1e3) for share, ms in named if ms is not None]

    @model_validator(mode="after")
    def _in_order(self) -> Objective:
        named = [(k, v) for k in ("p50_ms", "p95_ms", "p99_ms") if (v := getattr(self, k)) is not None]
        for (low, low_ms), (high, high_ms) in itertools.pairwise(named):
            if low_ms > high_ms:
                raise ValueError(f"{low} = {low_ms:g} is above {high} = {high_ms:g}; a higher quantile is never faster")
        return self


class Quality(Strict):
    """What a version must keep of the golden version's quality before it may serve."""

    metric: Metric = "auto"
    """`agreement` (same top class as golden), `accuracy` (right answers on labelled samples, relative to golden's), `cosine` or `sqnr_db` \
(closeness of the outputs); `auto`: agreement for classification, else cosine."""
    floor: float | None = None
    """The lower confidence bound must reach this. Default: 0.99 for agreement and accuracy, 0.999 for cosine, 20 for sqnr_db."""
    per_class_floor: Share | None = None
    """The same for each predicted class alone (classification); unset: classes are reported, and judged together."""
    min_samples: Annotated[int, Field(ge=1, le=1_000_000)] = 300
    """Fewer judging samples than this are inconclusive. 99 % agreement cannot be shown with fewer than 268."""

    @model_validator(mode="after")
    def _floor_fits_metric(self) -> Quality:
        if self.floor is not None and self.metric != "sqnr_db" and not 0 <= self.floor <= 1:
            raise ValueError(f"floor = {self.floor:g} is no share; {self.metric} lies between 0 and 1 (99 % is 0.99)")
        return self

    def resolved(self, task: str) -> tuple[str, float]:
        """Metric and floor that hold for a model of `task`."""
        metric = DEFAULT_METRICS[task] if self.metric == "auto" else self.metric
        return metric, DEFAULT_FLOORS[metric] if self.floor is None else self.floor


class SampleSources(Strict):
    """Where samples come from: an .npz whose keys are the input names (`labels` for labels), a folder of images with one subfolder for each \
label, FILE.py:FUNCTION in a folder that the operator allowed, or the word `captured` (live inputs). Paths are relative to model.yaml."""

    reference: SamplesFrom | None = None
    """Frozen at the first deploy, with golden's outputs, and anew only where another is named; judges every version. A quarter is left to calibrate with where neither `calibration` nor `train` is named. Default: made up from the signature."""
    calibration: SamplesFrom | None = None
    """What int8 is calibrated with; never judges. Default: a part of the captured inputs."""
    validation: SamplesFrom | None = None
    """Labelled samples that judge accuracy."""
    train: SamplesFrom | None = None
    """What the methods that train may learn from."""


class Batching(Strict):
    """How requests share a call."""

    limit: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Most rows in one call. Default: tuned on this host."""
    rows: Literal["auto", "independent", "dependent"] = "auto"
    """Whether a row's answer is the same in any company. `auto`: proven at deploy; `dependent`: never batched; `independent`: your word for it."""


class Runtime(Strict):
    """How versions are run. What is set here is never tuned; what is not set is measured on each class of host."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads within one call."""
    instances: Annotated[int, Field(ge=1, le=256)] | None = None
    """Calls at the same time."""
    queue_limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests that may wait; more are answered 429."""
    spin_us: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """How long idle threads spin for work, in microseconds; burns CPU on cores that others could use."""
    lone_threads: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Threads of a call that finds nobody else, in a second session that holds the weights again; 0: none. Default: all cores while memory is plenty and nothing else is set here."""
    warm_versions: Annotated[int, Field(ge=1, le=32)] = 3
    """Versions kept loaded at most: active, previous, golden."""


class Capture(Strict):
    """A small reservoir of live inputs, to judge and calibrate with. `capture: off` keeps none."""

    mode: Literal["on", "off"] = "on"
    """`off`: no input is ever stored."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Most samples kept."""
    max_age_h: Annotated[float, Field(gt=0, le=24 * 366)] = 168.0
    """Older ones are deleted."""
    per_caller: Annotated[int, Field(ge=1, le=100_000)] = 64
    """A caller's samples beyond this many give way first to those of others."""

    @model_validator(mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """`off` and `on` are booleans in YAML 1.1, as a section or as its mode."""
        if isinstance(value, bool | str):
            value = {"mode": value}
        if isinstance(value, dict) and isinstance(value.get("mode"), bool):
            value = {**value, "mode": "on" if value["mode"] else "off"}
        return value


class Limits(Strict):
    """Bounds of a runner, and of a caller."""

    memory_mb: Annotated[int, Field(ge=16)] | None = None
    """Most memory of one runner, in MiB; a version that needs more is not loaded. Default: what the memory ledger has left."""
    load_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """A version that is not ready by then has failed to load."""
    caller_share: Annotated[float, Field(ge=0.5, le=1)] = 0.75
    """Of the requests that wait, or of their rows, the share beyond which one caller (by address) gets 429 as soon as all of them would wait \
for a quarter of what is promised, while others are served too. 1: never, for servers whose callers come through a few proxies."""


class Budget(Strict):
    """What may be spent on the model in a day; rolling back needs none."""

    job_cpu_s: Annotated[float, Field(ge=0)] = 14_400.0
    """CPU seconds of optimization jobs."""
    builds: Annotated[int, Field(ge=0)] = 24
    """Versions built."""
    swaps: Annotated[int, Field(ge=0)] = 12
    """Changes of the active version."""


class Rollout(Strict):
    """How a candidate that passed offline takes over under traffic: a share of live requests first, judged beside the incumbent, then a \
watch in which the previous version keeps a share."""

    canary: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False, max_length=10)] = (0.05, 0.25)
    """Shares of live requests, in order; all of them follow. Empty: no canary, the offline proof decides."""
    header: Annotated[str, Field(max_length=255)] | None = None
    """Name of a request header whose value decides which version answers, so that a caller stays with one. Default: all callers, in turns of a quarter of a second."""
    min_samples: Annotated[int, Field(ge=8, le=100_000)] = 50
    """Fewer answers of either version than this are inconclusive."""
    max_age_s: Annotated[float, Field(gt=0, le=7 * 86_400)] = 600.0
    """A canary that is undecided by then ends on the incumbent; the candidate stays known as proven."""
    watch_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """What the previous version keeps after a promotion until it is confirmed; 0: no watch."""
    watch_s: Annotated[float, Field(ge=0, le=7 * 86_400)] = 300.0
    """A watch that found nothing wrong by then confirms."""

    @field_validator("canary")
    @classmethod
    def _grows(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(value)):
            raise ValueError(f"shares must grow from stage to stage, such as [0.05, 0.25], not {list(value)}")
        return value


class ModelConfig(Strict):
    """One model.yaml. Every key has a default, so that a model without the file is served too."""

    description: Annotated[str, Field(max_length=10_000)] = ""
    """What the model does, for people."""
    owner: Annotated[str, Field(max_length=1000)] = ""
    """Whom to ask."""
    task: Literal["classification", "regression", "embedding", "generic"] = "generic"
    """What the outputs mean; decides how fidelity is measured."""
    platform: Literal["auto", "onnx", "torch"] = "auto"
    """`onnx`: model.onnx is served. `torch`: the .safetensors of `source` is. `auto`: what lies in the version's folder, ONNX first."""
    source: Source | None = None
    preprocess: Preprocess = Preprocess.model_validate({})
    postprocess: Postprocess = Postprocess.model_validate({})
    objective: Objective = Objective()
    tune_for: Literal["latency", "throughput"] = "latency"
    """What the run-time settings are chosen for: the quickest answer at low load, or the most answers per second."""
    mode: Annotated[Mode, Field(strict=False)] = Mode.AUTO
    """How far the loop goes by itself. `auto`: lossless changes, and lossy ones that keep `quality.floor` where `samples.reference` or \
`samples.validation` is named (captured inputs alone are nobody's word); `approve`: asks before any version takes over; `observe`: only looks."""
    quality: Quality = Quality()
    least_gain: Annotated[float, Field(ge=0, le=10)] = 0.05
    """Least gain (0.05: five percent) that is worth a swap."""
    samples: SampleSources = SampleSources()
    allow: Annotated[tuple[str, ...], Field(strict=False, max_length=100)] | None = None
    """Names of the optimizers that may be tried. Default: all."""
    batching: Batching = Batching()
    runtime: Runtime = Runtime()
    capture: Capture = Capture()
    limits: Limits = Limits()
    budget: Budget = Budget()
    rollout: Rollout = Rollout()
    ladder: Annotated[bool, Field()] = True
    """Whether the data plane may step down to a faster proven version by itself while load would break the objective."""
    rollback_window_s: Annotated[float, Field(ge=0, le=7 * 86_400)] = 600.0
    """How long the previous version stays warm after a swap, in seconds."""

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """A section whose keys are all commented out is its defaults."""
        if not isinstance(value, dict):
            return value
        return {key: given for key, given in value.items() if given is not None or key not in cls.model_fields}

    @property
    def run_by(self) -> tuple[object, ...]:
        """What decides how versions are run: where it changes, those that are loaded have to follow."""
        return self.batching, self.runtime, self.limits.memory_mb, self.source

    @property
    def side_files(self) -> tuple[str, ...]:
        """Names of the files that must lie beside model.yaml: labels and tokenizer."""
        labels = self.postprocess.labels if isinstance(self.postprocess.labels, str) else None
        tokenizer = self.preprocess.text.tokenizer if self.preprocess.text else None
        return tuple(name for name in (labels, tokenizer) if name is not None)

    @field_validator("mode", mode="before")
    @classmethod
    def _not_a_switch(cls, value: Any) -> Any:
        if value is True or value is False:
            raise ValueError("expected auto, approve or observe (YAML reads on and off as true and false)")
        return value

    @model_validator(mode="after")
    def _torch_has_a_source(self) -> ModelConfig:
        if self.platform == "torch" and self.source is None:
            raise ValueError("platform torch needs `source:` with its factory, such as {factory: resnet.py:build}")
        return self


def load_model_config(path: Path) -> ModelConfig:
    """Read model.yaml at `path`; without a file, all defaults.

    Raises ModelRejected with file, line, key, rule and remedy.
    """
    if not path.exists():
        return ModelConfig()
    return parse_model_config(read_config(path), path)


def read_config(path: Path) -> bytes:
    """The bytes of a model.yaml, no more than one byte over the bound. Raises ModelRejected."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ModelRejected(f"{path}: cannot be read: {error.strerror}; it must be a readable file, or absent") from None


def parse_model_config(raw: bytes, path: Path) -> ModelConfig:
    """The same for bytes at hand (an upload); `path` is for messages only."""
    if len(raw) > MAX_BYTES:
        raise ModelRejected(f"{path}: larger than {MAX_BYTES} bytes, which is the most a model.yaml may have")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelRejected(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    document = yaml_file.parse(text, path)
    try:
        config = ModelConfig.model_validate(document.data)
    except ValidationError as error:
        raise ModelRejected(config_errors.explain(error, document, ModelConfig)) from None
    for index, name in enumerate(config.allow or ()):
        if name not in config_types():
            raise ModelRejected(config_errors.unknown_value(document, ("allow", index), name, config_types()))
    return config
