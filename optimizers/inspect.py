"""The full check of an ONNX file before anybody serves it: what it is, what it takes and gives, whether its rows are independent,
and at which graph level its answers are those of the file unoptimized. Runs the model, so it belongs into a task child.

It decides nothing about deploying: it reports, or raises Rejected with the file, node or tensor and the remedy.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from onnx import GraphProto

from optimizers.artifact import sha256_of
from optimizers.base import Budget, Rejected
from optimizers.census import Census, census, quantization_of
from optimizers.difference import difference, root_mean_square, scales_of
from optimizers.inputs import INTEGERS_TRIED, InputMaker, find_maker
from optimizers.onnx_file import OnnxFile, checker_complaint, read
from optimizers.rows import FEW_ROWS, QUANTIZED_TOLERANCE, ROWS, TOLERANCE, RowsProof, per_batch_objection, prove, shape_objection
from optimizers.running import ORT_ERRORS, RunRefused, brief, raise_if_memory, runner
from optimizers.samples import Samples
from optimizers.session import DATATYPES, PRECISE_INT8, Feeds, Settings, TensorInfo, open_session, tensors

SLOW_ROW_S: Final = 1.0
LARGE_ROW_BYTES: Final = 64 << 20
LEVEL_TOLERANCE: Final = {"float": 1e-3, "quantized": 5e-2}
"""How far a served graph may be from the unoptimized one (root mean square, relative): int8 kernels round where QDQ rounds twice."""


@dataclass(frozen=True)
class Tensor:
    """One input or output in the terms of the Open Inference Protocol; -1 is a variable dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Serving:
    """The graph level (and session options) whose answers agree with the unoptimized file here, and how that is known."""

    graph_level: str
    session_options: tuple[tuple[str, str], ...]
    reason: str
    error: float = 0.0
    reference_level: str = "none"
    """'none', unless the file loads only with optimizations; then that level is the reference."""


@dataclass(frozen=True)
class Report:
    """What was found. `files` are names, itself first; `row_shapes` the shapes of the row that was tried and that multiply-adds are for; `integers` [low, high) of the whole numbers that it takes; `quantized` says how, or ''; `notes` are for people. Sizes in bytes."""

    sha256: str
    files: tuple[str, ...]
    bytes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    rows: RowsProof
    serving: Serving
    opsets: dict[str, int]
    custom_domains: tuple[str, ...]
    producer: str
    census: Census
    row_shapes: dict[str, tuple[int, ...]]
    integers: tuple[int, int]
    quantized: str
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    schema: int = 1

    @property
    def batchable(self) -> bool:
        return self.rows.independent


@dataclass(frozen=True)
class Request:
    """`rows`: auto | independent | dependent, as model.yaml states. `samples`: an .npz of real inputs, or ''.

    `initializer_inputs`: weights (a weight that is also listed as an input is a weight, and callers cannot set it) | optional.
    `graph_level`: hold only this level to the unoptimized graph, or '' for what the file itself asks for, else the highest that agrees.
    """

    path: str
    rows: str = "auto"
    samples: str = ""
    stacked: bool = True
    link_roots: tuple[str, ...] = ()
    initializer_inputs: str = "weights"
    graph_level: str = ""


def run(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The task: a Request as JSON in, a Report (with `batchable`) as JSON out."""
    report = inspect(Request(**request), budget)
    return {**asdict(report), "batchable": report.batchable}


def inspect(request: Request, budget: Budget) -> Report:
    """Check the file that `request` names. Raises Rejected, or MemoryError beyond the bound of this process."""
    path, started = Path(request.path), time.monotonic()
    budget.tick("inspect", "reading", 0.0)
    file = read(path, [Path(root) for root in request.link_roots])
    check = _Check(file, request, budget)
    budget.tick("inspect", "opening", 0.1)
    check.open()
    serving = check.choose_serving()
    budget.tick("inspect", "rows", 0.4)
    rows = check.prove_rows(serving)
    budget.tick("inspect", "counting", 0.9)
    counted = census(file.model, path.parent, check.row_shapes)
    return Report(
        sha256=sha256_of(*file.files), files=tuple(f.name for f in file.files), bytes=file.bytes,
        inputs=check.signature_inputs, outputs=tuple(map(_tensor, check.outputs)), rows=rows, serving=serving, opsets=file.opsets,
        custom_domains=file.custom_domains, producer=" ".join(filter(None, (file.model.producer_name, file.model.producer_version))),
        census=counted, row_shapes=check.row_shapes, integers=check.maker.integers if check.maker else INTEGERS_TRIED[0], quantized=quantization_of(file.model), notes=tuple(check.notes), seconds=time.monotonic() - started,
    )  # fmt: skip


class _Check:
    """One file under examination: its sessions, its signature, inputs to try it with."""

    def __init__(self, file: OnnxFile, request: Request, budget: Budget) -> None:
        self.file, self.request, self.budget = file, request, budget
        self.settings = Settings(intra_op_threads=budget.threads)
        self.notes: list[str] = []
        self.quantized = bool(quantization_of(file.model))
        self.maker: InputMaker | None = None
        self.unmade = ""
        self.row_shapes: dict[str, tuple[int, ...]] = {}
        self.heavy = False

    def open(self) -> None:
        """Open the file as it stands; where that fails, with as little optimization as loads."""
        first: Exception | None = None
        for level in ("none", "basic", "extended", "all"):
            try:
                self.reference = open_session(self.file.path, replace(self.settings, graph_level=level))
            except ORT_ERRORS as error:
                raise_if_memory(error)
                first = first or error
            else:
                self.reference_level = level
                break
        else:
            raise Rejected(self._refusal(first))
        if first is not None:
            self.notes.append(f"loads only with graph optimizations (level {self.reference_level}): {brief(first)}")
        self.inputs, self.outputs = tensors(self.reference.get_inputs()), tensors(self.reference.get_outputs())
        overridable = tensors(self.reference.get_overridable_initializers())
        for what, infos in (("input", (*self.inputs, *overridable)), ("output", self.outputs)):
            for info in infos:
                _refuse_type(what, info)
        if not self.outputs:
            raise Rejected(f"{self.file.path.name} has no outputs")
        _refuse_without_rank(self.file.model.graph, self.inputs)
        keep = self.request.initializer_inputs == "optional"
        self.signature_inputs = (*map(_tensor, self.inputs), *(_tensor(info, optional=True) for info in overridable if keep))
        if overridable and not keep:
            names = ", ".join(info.name for info in overridable[:5]) + (", …" if len(overridable) > 5 else "")
            self.notes.append(
                f"{len(overridable)} initializers are listed as inputs too ({names}); they are served as weights, and callers cannot set them"
            )
        self._make_inputs()

    def choose_serving(self) -> Serving:
        """The highest level that loads and agrees with the reference; int8 may need the precise kernels on this host."""
        if self.maker is None:
            return Serving("all", (), f"not compared with the unoptimized graph: {self.unmade}", 0.0, self.reference_level)
        feeds = self.maker.rows(1 if self.heavy or shape_objection(self.inputs, self.outputs) else ROWS)
        try:
            expected = runner(self.reference)(feeds)
        except RunRefused:
            feeds = self.maker.rows(1)
            expected = runner(self.reference)(feeds)
        tolerance = LEVEL_TOLERANCE["quantized" if self.quantized else "float"]
        tries: list[tuple[str, tuple[tuple[str, str], ...]]] = [("all", ()), ("extended", ()), ("basic", ())]
        if self.quantized:
            tries.insert(1, ("all", (PRECISE_INT8,)))
        if wanted := self.request.graph_level or self.file.serve_at:
            tries = [(level, options) for level, options in tries if level == wanted]
        why: list[str] = []
        for level, options in tries:
            if level == self.reference_level:
                break
            error, problem = self._compare(level, options, feeds, expected)
            if problem:
                self.notes.append(f"graph level {level}: {problem}")
                why.append(problem)
            elif error <= tolerance:
                extra = f" after {'; '.join(why)}" if why else ""
                return Serving(
                    level,
                    options,
                    f"agrees with the unoptimized graph within {error:.1g} (tolerance {tolerance:g}){extra}",
                    error,
                    self.reference_level,
                )
            else:
                how = f"level {level}" + "".join(f" with {key}={value}" for key, value in options)
                why.append(f"{how} differs from the unoptimized graph by {error:.2g} (tolerance {tolerance:g})")
        return Serving(self.reference_level, (), "; ".join(why) or "served as it stands", 0.0, self.reference_level)

    def _compare(self, level: str, options: tuple[tuple[str, str], ...], feeds: Feeds, expected: list[Any]) -> tuple[float, str]:
        try:
            session = open_session(self.file.path, replace(self.settings, graph_level=level, session_options=options))
            seen = runner(session)(feeds)
        except (*ORT_ERRORS, RunRefused) as error:
            raise_if_memory(error)
            return 0.0, f"does not work though the file unoptimized does ({brief(error)})"
        return (root_mean_square if self.quantized else _worst)(expected, seen), ""

    def prove_rows(self, serving: Serving) -> RowsProof:
        stated = self.request.rows != "auto"
        objection = shape_objection(self.inputs, self.outputs)
        if objection:
            return RowsProof(False, objection, stated and self.request.rows == "dependent")
        if self.request.rows == "dependent":
            return RowsProof(False, "stated by the owner in model.yaml (rows: dependent)", True)
        proof = self._measured_rows(serving)
        if not stated:
            return proof
        if not proof.independent:
            self.notes.append(f"model.yaml states that rows are independent; seen here: {proof.reason}")
        return replace(proof, independent=True, reason="stated by the owner in model.yaml (rows: independent)", stated=True)

    def _measured_rows(self, serving: Serving) -> RowsProof:
        if objection := per_batch_objection(self.file.op_types):
            return RowsProof(False, objection)
        if self.maker is None:
            return RowsProof(False, f"not proven: {self.unmade}; name samples or state rows in model.yaml")
        settings = replace(self.settings, graph_level=serving.graph_level, session_options=serving.session_options)
        session = open_session(self.file.path, settings)
        kinds = {DATATYPES[info.type] for info in (*self.inputs, *self.outputs)}
        tolerance = max(TOLERANCE.get(kind, 0.0) for kind in kinds) or TOLERANCE["FP32"]
        tolerance = max(tolerance, QUANTIZED_TOLERANCE) if self.quantized else tolerance
        rows = self.maker.rows(FEW_ROWS if self.heavy else ROWS)
        return prove(runner(session), rows, tolerance, lambda share: self.budget.tick("inspect", "rows", 0.4 + 0.5 * share))

    def _make_inputs(self) -> None:
        samples = Samples.load(Path(self.request.samples), stacked=self.request.stacked) if self.request.samples else None
        run = runner(self.reference)

        def accepts(feeds: Feeds) -> None:
            self.budget.tick("inspect", "finding inputs", 0.2)
            run(feeds)

        try:
            self.maker = find_maker(self.inputs, self.file.model.graph, accepts, self.budget.seed, samples)
            row = self.maker.rows(1)
            self.row_shapes = {name: values.shape for name, values in row.items()}
            began = time.monotonic()
            answers = run(row)
            self.heavy = time.monotonic() - began > SLOW_ROW_S or sum(v.nbytes for v in (*row.values(), *answers)) > LARGE_ROW_BYTES
        except RunRefused as refused:
            self.unmade = f"no input could be made up that the model accepts ({refused})"
            self.notes.append(self.unmade)

    def _refusal(self, error: Exception | None) -> str:
        name = self.file.path.name
        if self.file.custom_domains:
            return f"{name} needs operators of {', '.join(self.file.custom_domains)}, which ONNX Runtime does not have; custom operator libraries are not loaded"
        complaint = checker_complaint(self.file.path)
        also = f"; onnx.checker: {complaint}" if complaint else ""
        return f"{name} does not load: {brief(error)}{also}".replace(f"{self.file.path.parent}/", "")


def _worst(expected: list[Any], seen: list[Any]) -> float:
    return difference(expected, seen, scales_of(expected))


def _tensor(info: TensorInfo, optional: bool = False) -> Tensor:
    return Tensor(info.name, DATATYPES[info.type], tuple(size if isinstance(size, int) else -1 for size in info.shape), optional)


def _refuse_without_rank(graph: GraphProto, inputs: tuple[TensorInfo, ...]) -> None:
    """An input that the file gives no shape at all looks like a scalar to ONNX Runtime; whoever sent anything else would be refused."""
    known = {value.name: value.type.tensor_type.HasField("shape") for value in graph.input}
    for info in inputs:
        if not known.get(info.name, True):
            raise Rejected(
                f"input {info.name!r} has no shape, so nobody knows how many axes it has; export the model with named dynamic axes, "
                "or give graph.input a shape (free axes may have names, such as [batch, features])"
            )


def _refuse_type(what: str, info: TensorInfo) -> None:
    if info.type in DATATYPES:
        return
    if info.type.startswith(("seq", "map", "optional")):
        raise Rejected(
            f"{what} {info.name!r} is a {info.type}: the protocol has tensors only. For a scikit-learn model export with zipmap=False; else convert it inside the model"
        )
    raise Rejected(
        f"{what} {info.name!r} is a {info.type}, which the protocol cannot carry; it has {', '.join(sorted(set(DATATYPES.values())))}"
    )
