"""A recipe run step by step in scratch: prune, then distill, then quantize; at the end one checked file with its facts and its hash.

Runs in a task child (kind 'optimize') or as a library call. It publishes nothing and judges nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from optimizers import catalogue
from optimizers.artifact import Artifact, Source, sha256_of
from optimizers.base import Budget, Config, Need, NotApplicable, Progress, Rejected, optimize
from optimizers.inspect import Request as Inspection
from optimizers.inspect import inspect
from optimizers.onnx_file import read
from optimizers.onnx_graph import load, save
from optimizers.samples import Samples
from optimizers.task_child import plain

MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.safetensors"
BUILDING: Final = ("calibration", "train", "unlabelled")
SETS: Final[dict[Need, tuple[str, ...]]] = {
    Need.LABELLED: ("train", "calibration"),
    Need.TRAINING: ("train", "unlabelled", "calibration"),
    Need.CALIBRATION: ("calibration", "train", "unlabelled"),
    Need.UNLABELLED: ("unlabelled", "train", "calibration"),
}
"""Which set of samples a step gets, by what it needs first and what is there."""
NO_SAMPLES: Final = Samples({})


@dataclass(frozen=True)
class Built:
    """The result of a recipe. `settings` are run-time settings that the file was measured with and must be served with, if any.

    `inspection` is the full check of the built file (its signature and the proof of its rows).
    """

    path: str
    files: tuple[str, ...]
    sha256: str
    bytes: int
    recipe: tuple[dict[str, Any], ...]
    facts: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    source: dict[str, str] | None
    inspection: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Order:
    """What to build from what, as it comes as JSON. `recipe`: the steps (method names, or objects with 'method').

    `samples`: calibration | train | unlabelled to an .npz, `origins` where each came from; other sets judge, and are not looked at.
    `scratch`: the folder that gets the result, under `built/`. `source`: {"factory", "weights"}, and where `path` itself is a .safetensors also
    "inputs" and "outputs", each [name, datatype, shape]. `settings`: how the parent is served.
    `keep`: as in Budget, for checkpoints. `done` and `facts`: the steps that led to `path`, and what they reported. `golden` empty: `path` is golden.
    """

    path: str
    recipe: tuple[Any, ...]
    scratch: str
    task: str = "generic"
    golden: str = ""
    samples: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    stacked: bool = True
    source: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    done: tuple[Mapping[str, Any], ...] = ()
    facts: tuple[Mapping[str, Any], ...] = ()
    target: str = ""
    keep: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """A step may carry the `target` of the whole recipe. Raises Rejected for what is no order."""
        steps = [dict(step) if isinstance(step, Mapping) else step for step in data.get("recipe", ())]
        targets = [step.pop("target") for step in steps if isinstance(step, dict) and step.get("target")]
        known = {**data, "recipe": tuple(steps), "done": tuple(data.get("done", ())), "facts": tuple(data.get("facts", ()))}
        if targets:
            known["target"] = targets[-1]
        try:
            return cls(**known)
        except TypeError as error:
            raise Rejected(f"optimize: {error}") from None


def run(request: dict[str, Any], budget: Budget) -> Built:
    """The task 'optimize': an Order as JSON in, a Built as JSON out. Raises NotApplicable, naming the step, and Rejected."""
    return build(Order.from_json(request), budget)


def build(order: Order, budget: Budget) -> Built:
    started = time.monotonic()
    try:
        configs = catalogue.parse_recipe(order.recipe)
    except catalogue.InvalidStep as error:
        raise Rejected(str(error)) from None
    sets = {
        name: Samples.load(Path(order.samples[name]), order.origins.get(name, "owner"), order.stacked)
        for name in BUILDING
        if name in order.samples
    }
    work = budget.folder("recipe")
    artifact = run_steps(
        _start(order),
        configs,
        sets,
        replace(budget, scratch=str(work), keep=order.keep or budget.keep, target=order.target or budget.target),
    )
    path = _delivered(artifact, Path(order.scratch) / "built")
    shutil.rmtree(work, ignore_errors=True)
    report = inspect(Inspection(str(path), samples=order.samples.get("calibration", ""), stacked=order.stacked), budget)
    files = read(path).files
    own = _own_weights(artifact)
    source = {"factory": own.factory, "weights": str(path.parent / WEIGHTS)} if own else None
    return Built(
        str(path), tuple(file.name for file in files), sha256_of(*files), report.bytes, artifact.recipe, artifact.facts,
        dict(artifact.extra.get("settings", {})), source, {**plain(report), "batchable": report.batchable}, time.monotonic() - started,
    )  # fmt: skip


def run_steps(artifact: Artifact, configs: Sequence[Config], sets: Mapping[str, Samples], budget: Budget) -> Artifact:
    """Apply `configs` in order; between steps only the artifact is kept. The result lies in `budget.scratch`."""
    scratch = Path(budget.scratch)
    for index, config in enumerate(configs):
        if reason := catalogue.unavailable(config):
            raise NotApplicable(reason)
        work = scratch / f"work{index}"
        share = replace(
            budget, scratch=str(work), seconds=budget.left_s, started=time.monotonic(), on_progress=_scaled(budget, index, len(configs))
        )
        try:
            made = optimize(artifact, config, samples_for(config, sets), share)
        except NotApplicable as error:
            where = f"step {index + 1} ({config.method}): " if len(configs) > 1 else ""
            raise NotApplicable(f"{where}{error}") from None
        made.facts[-1].setdefault("lossless", config.lossless)
        artifact = _moved(made, scratch / f"made{index}")
        shutil.rmtree(work, ignore_errors=True)
        before = scratch / f"made{index - 1}"
        if artifact.golden is None or artifact.golden.parent != before:  # an export is golden for all that follow
            shutil.rmtree(before, ignore_errors=True)
    return artifact


def samples_for(config: Config, sets: Mapping[str, Samples]) -> Samples:
    """The set that a step gets. Raises NotApplicable where it needs one and there is none."""
    for need, names in SETS.items():
        if need not in config.needs:
            continue
        found = next((sets[name] for name in names if name in sets and (need is not Need.LABELLED or sets[name].labels is not None)), None)
        if found is None:
            raise NotApplicable(f"{config.method} needs {need.value}, and there are none: name them in model.yaml under samples")
        return found
    return next((sets[name] for name in BUILDING if name in sets), NO_SAMPLES)


def _start(order: Order) -> Artifact:
    source = None
    if order.source:
        declared = (tuple((n, kind, tuple(shape)) for n, kind, shape in order.source.get(key, ())) for key in ("inputs", "outputs"))
        source = Source(order.source["factory"], Path(order.source["weights"]), *declared)
    extra = {**order.extra, **({"settings": dict(order.settings)} if order.settings else {})}
    golden = Path(order.golden) if order.golden else None
    return Artifact(Path(order.path), order.task, tuple(map(dict, order.done)), tuple(map(dict, order.facts)), source, golden, extra)


def _scaled(budget: Budget, index: int, count: int) -> Any:
    def report(progress: Progress) -> None:
        detail = {**progress.detail, "step_number": index + 1, "steps": count}
        budget.on_progress(Progress(progress.method, progress.step, (index + progress.share) / count, detail))

    return report


def _moved(artifact: Artifact, folder: Path) -> Artifact:
    """The artifact alone in a folder of its own, under its usual names."""
    folder.mkdir(parents=True)
    path = folder / MODEL
    if artifact.path.name == MODEL:
        for file in read(artifact.path).files:
            shutil.copyfile(file, folder / file.name)
    else:
        save(load(artifact.path), path)
    source = artifact.source
    if source is not None:
        shutil.copyfile(source.weights, folder / WEIGHTS)
        source = Source(source.factory, folder / WEIGHTS)
    golden = path if artifact.golden == artifact.path else artifact.golden
    return replace(artifact, path=path, source=source, golden=golden)


def _own_weights(artifact: Artifact) -> Source | None:
    """The PyTorch form, where a step made it: what was only exported is golden's, which lies where it was deployed."""
    return None if artifact.golden == artifact.path else artifact.source


def _delivered(artifact: Artifact, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    source = _own_weights(artifact)
    for file in (*read(artifact.path).files, *([source.weights] if source else [])):
        shutil.copyfile(file, out / file.name)
    return out / MODEL
