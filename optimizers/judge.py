"""Verify: is a candidate as good as golden on what we know, and faster here than what serves now? The task `verify`.

Golden judges unoptimized; the incumbent runs beside the candidate, in turns. Every number that led to the verdict is in the report.
The verdict is of this class of host only. It starts arms (fresh processes), and knows nothing of versions, jobs or traffic.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from optimizers.answers import Answers, Fault, Rows, feeds_of, side_by_side
from optimizers.artifact import WEIGHTS_SUFFIX
from optimizers.base import Budget, Rejected
from optimizers.fidelity import Fidelity, Floor, Met, judge
from optimizers.gain import speed
from optimizers.host import host_class
from optimizers.measure import Arm, ArmFailed
from optimizers.objections import class_notes, objections, too_few
from optimizers.rows import QUANTIZED_TOLERANCE, ROWS, TOLERANCE, prove
from optimizers.running import RunRefused
from optimizers.sameness import interface_objections, same_model
from optimizers.samples import Samples
from optimizers.session import Feeds, Settings
from optimizers.shapes import shape_variants, try_variant
from optimizers.torch_module import TorchSource
from optimizers.verdict import Purpose, Verdict, VerifyReport, VerifyRequest

BIT_CLOSE_SAMPLES: Final = 16
"""Samples, of one set or of all together, that suffice for a lossless candidate whose every output is bit-close: the outputs themselves are the
evidence, not a share."""
FIDELITY_SHARE: Final = 0.6
"""Of the time for a verdict, how much the comparison of answers may take at most."""
_METHOD: Final = "verify"


def run(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The task: a VerifyRequest as JSON in, a VerifyReport as JSON out."""
    return verify(VerifyRequest.from_json(request), budget).to_json()


def verify(request: VerifyRequest, budget: Budget) -> VerifyReport:
    """Judge the candidate. Failures of the candidate are a verdict; failures of golden or of the samples raise Rejected."""
    started = time.monotonic()
    report = VerifyReport(notes=list(request.notes), host_class=host_class().key, serve=request.candidate_settings)
    for path in (request.golden, request.candidate, request.incumbent or request.golden):
        if not Path(path).is_file():
            raise Rejected(f"verify: {path} is no file")
        if Path(path).suffix == WEIGHTS_SUFFIX and path not in request.sources:
            raise Rejected(f"verify: {path} holds PyTorch weights; name what runs them in sources")
    try:
        _judge(request, report, budget, started + min(request.seconds, max(1.0, budget.left_s - 5)))
    except Fault as fault:
        if fault.side != "candidate":
            raise Rejected(f"nothing can be judged by {fault.side}: {fault}") from None
        report.verdict = Verdict.FAILED
        report.reasons.append(str(fault))
    report.seconds = time.monotonic() - started
    budget.tick(_METHOD, report.verdict.value, 1.0)
    return report


def _judge(request: VerifyRequest, report: VerifyReport, budget: Budget, until: float) -> None:
    if request.purpose is Purpose.SWAP and _nothing_changed(request):
        report.verdict, report.nothing_changed = Verdict.FAILED, True
        report.reasons.append("nothing changed: the candidate is its parent in all but name")
        return
    sets = {name: s.load(request.exclude) for name, s in request.sets.items()}
    sets = {name: (samples, known) for name, (samples, known) in sets.items() if len(samples)}
    if not sets:
        report.verdict = Verdict.NO_DATA
        report.reasons.append(
            "no samples to judge by (or all of them calibrated): name some in model.yaml, or let live traffic be captured"
        )
        return
    sets = _with_answers(sets)
    report.evidence = _evidence(request, sets)
    with ExitStack() as stack:
        candidate = _open_candidate(request, report, stack)
        golden = stack.enter_context(
            _opened(
                request.golden,
                replace(request.golden_settings.unoptimized(), intra_op_threads=max(1, budget.threads)),
                request.sources.get(request.golden),
            )
        )
        if objections := interface_objections(golden.opened, candidate.opened):
            raise Fault("candidate", "; ".join(objections))
        first = next(iter(sets.values()))[0]
        budget.tick(_METHOD, "rows and batches", 0.05)
        batchable = request.batchable and first.stacked
        if batchable:
            _check_rows(candidate, first, report)
        failures = _compare_sets(request, report, golden, candidate, sets, batchable, budget, until)
        failures += _compare_shapes(request, report, golden, candidate, first, budget)
    if failures:
        report.verdict = Verdict.FAILED
        report.reasons += failures
        return
    report.verdict = Verdict.INCONCLUSIVE if report.reasons else Verdict.PASSED
    if request.timed:
        _time(request, report, first, batchable, budget, until)


def _nothing_changed(request: VerifyRequest) -> bool:
    onnx = {request.parent, request.golden, request.incumbent} - {
        "",
        *request.sources,
    }  # a PyTorch file is another form, whatever it computes
    return any(same_model(Path(request.candidate), Path(path)) for path in sorted(onnx))


def _with_answers(sets: Mapping[str, tuple[Samples, Rows | None]]) -> dict[str, tuple[Samples, Rows | None]]:
    """What golden is known to answer to one set it answers to the same inputs in another: the file that is the reference often has the labels, too."""
    known = [(samples, answers) for samples, answers in sets.values() if answers is not None]
    if len(known) in (0, len(sets)):
        return dict(sets)
    rows = {row: (answers, i) for samples, answers in known for i, row in enumerate(_rows_of(samples))}

    def found(samples: Samples) -> Rows | None:
        places = [place for row in _rows_of(samples) if (place := rows.get(row)) is not None]
        if len(places) < len(samples):
            return None
        return {name: np.stack([answers[name][i] for answers, i in places]) for name in known[0][1]}

    return {name: (samples, answers if answers is not None else found(samples)) for name, (samples, answers) in sets.items()}


def _rows_of(samples: Samples) -> list[tuple[str, str]]:
    """Each row by its form and its content."""
    return [(f"{samples.stacked} {sorted(samples.row_shapes().items())}", digest) for digest in samples.hashes()]


def _evidence(request: VerifyRequest, sets: Mapping[str, tuple[Samples, Rows | None]]) -> str:
    """The best that the verdict rests on. Made-up samples alone show that two versions compute the same, not how good either is."""
    if any(samples.labels is not None for samples, _ in sets.values()):
        return "labelled"
    origins = {samples.origin for samples, _ in sets.values()}
    return next((origin for origin in ("captured", "owner") if origin in origins), "synthetic")


def _opened(path: str, settings: Settings, source: TorchSource | None) -> Arm:
    try:
        return Arm(path, settings, source=source)
    except ArmFailed as failed:
        raise Fault("golden", f"golden cannot be opened: {failed}") from None


def _open_candidate(request: VerifyRequest, report: VerifyReport, stack: ExitStack) -> Arm:
    """As it would be served, on one quiet thread; where it loads only with less optimization, so, and that is how it must be served."""
    wanted, source = request.candidate_settings, request.sources.get(request.candidate)
    problem = ""
    for level in dict.fromkeys((wanted.graph_level, "basic", "none") if source is None else (wanted.graph_level,)):
        try:
            arm = stack.enter_context(
                Arm(
                    request.candidate,
                    replace(wanted, graph_level=level).one_quiet_thread(),
                    longest_s=max(60.0, request.seconds / 2),
                    source=source,
                )
            )
        except ArmFailed as failed:
            problem = problem or str(failed)
            continue
        if problem:
            report.notes.append(f"loads only at graph level {level!r} and must be served so ({problem})")
            report.serve = replace(report.serve, graph_level=level)
        return arm
    raise Fault("candidate", f"the candidate cannot be opened: {problem}")


def _check_rows(candidate: Arm, samples: Samples, report: VerifyReport) -> None:
    """A batched candidate must run at any batch size (case 41), and its rows must not mind their company (case 31)."""

    def run(feeds: Feeds) -> list[Any]:
        try:
            return candidate.call(feeds)
        except ArmFailed as failed:
            raise RunRefused(str(failed)) from None

    limit = report.serve.batch_limit
    for size in sorted({1, 2, 7, limit}):
        try:
            run(feeds_of(samples, np.arange(size) % len(samples)))
        except RunRefused as refused:
            raise Fault("candidate", f"the candidate fails at batch {size}, golden takes any: {refused}") from None
    types = {info.type for info in candidate.opened.inputs}
    half = "tensor(float16)" in types or "tensor(bfloat16)" in types
    proof = prove(run, feeds_of(samples, np.arange(ROWS) % len(samples)), TOLERANCE["BF16"] if half else QUANTIZED_TOLERANCE)
    report.rows = asdict(proof)
    if not proof.independent:
        report.notes.append(
            f"golden's rows are independent and the candidate's are not ({proof.reason}): requests must be served one at a time, and it was judged with several rows in each"
        )
        report.serve = replace(report.serve, batch_limit=1)


def _compare_sets(
    request: VerifyRequest,
    report: VerifyReport,
    golden: Arm,
    candidate: Arm,
    sets: Mapping[str, tuple[Samples, Rows | None]],
    batchable: bool,
    budget: Budget,
    until: float,
) -> list[str]:
    """Judge every set; what is proven wrong comes back, what is merely not shown goes into the report's reasons.

    A set too small to show anything (the first few live inputs) is no doubt about what another one shows. Where it misses the floor,
    it takes its bounds to fail the candidate; short of that nothing is decided.
    """
    judged: list[tuple[str, Fidelity, Floor, bool]] = []
    seen = 0
    labels_decide = any(samples.labels is not None for samples, _ in sets.values()) and request.quality.metric in {"auto", "accuracy"}
    labels_decide = labels_decide and request.task == "classification"
    close = True
    now = time.monotonic()
    share = max(0.0, until - now) * FIDELITY_SHARE / len(sets)
    for at, (name, (samples, known)) in enumerate(sets.items()):
        floor = request.quality.floor_for(request.task, samples.labels is not None)
        sizes = (
            ([min(32, max(1, request.golden_settings.batch_limit))], sorted({1, 2, 7, report.serve.batch_limit}))
            if batchable
            else ([1], [1])
        )
        answers = side_by_side(
            known if known is not None else golden, candidate, samples, sizes, until=now + share * (at + 1),
            tick=partial(_tick_set, budget, name, at / len(sets), len(sets)),
        )  # fmt: skip
        found = _judged(request, answers, samples, floor)
        close = close and found.bit_close
        report.fidelity[name] = {**found.to_json(), "origin": samples.origin, "available": len(samples)}
        judged.append((name, found, floor, labels_decide and samples.labels is None))
        seen += found.samples
    report.bit_close = close
    return _weighed(request, report, judged, request.lossless and close and seen >= BIT_CLOSE_SAMPLES)


def _weighed(request: VerifyRequest, report: VerifyReport, judged: list[tuple[str, Fidelity, Floor, bool]], same: bool) -> list[str]:
    """What is wrong, over all sets; the last of each says that labels decide elsewhere. `same`: all outputs together are evidence enough."""
    failures: list[str] = []
    shown = next((name for name, found, _, _ in judged if found.met is Met.MET), "")
    for name, found, floor, advisory in judged:
        small = bool(shown) and found.samples < floor.min_samples
        failures += [f"{name} samples: {text}" for text in objections(found, advisory, small)]
        report.notes += class_notes(name, found)
        enough = same or advisory or (request.lossless and found.bit_close and found.samples >= BIT_CLOSE_SAMPLES)
        if enough or found.met is Met.MET:
            continue
        told = f"{name} samples: {too_few(found, floor)}"
        if small and found.met is Met.TOO_FEW:
            report.notes.append(f"{told}; {shown} samples show it")
        elif small or found.met is Met.TOO_FEW:
            made_up = report.fidelity[name]["origin"] == "synthetic"
            report.reasons.append(f"{told}, and they are made up: name some in model.yaml (samples: reference)" if made_up else told)
    return failures


def _tick_set(budget: Budget, name: str, before: float, sets: int, share: float) -> None:
    budget.tick(_METHOD, f"answers to {name} samples", 0.1 + 0.5 * (before + share / sets))


def _judged(request: VerifyRequest, answers: Answers, samples: Samples, floor: Floor) -> Fidelity:
    for name, values in answers.golden.items():
        if values.shape != answers.candidate[name].shape:
            raise Fault("candidate", f"output {name!r} has shape {list(answers.candidate[name].shape)}, golden's is {list(values.shape)}")
    labels = None if samples.labels is None else samples.labels[answers.index]
    quality = request.quality
    found = judge(answers.golden, answers.candidate, floor, labels, quality.judged_output, quality.class_axis)
    if found.worst is None:
        return found
    return replace(found, worst=replace(found.worst, sample=int(answers.index[found.worst.sample])))


def _compare_shapes(
    request: VerifyRequest, report: VerifyReport, golden: Arm, candidate: Arm, samples: Samples, budget: Budget
) -> list[str]:
    """Sizes of dynamic axes that the samples do not have; beyond these it is unverified."""
    quality = request.quality
    floor = replace(quality.floor_for(request.task, False), min_samples=1)
    failures = []
    # What is declared of a module names no axes; the candidate's file knows which are one.
    variants = list(shape_variants((candidate if golden.source else golden).opened.inputs, samples))
    for variant in variants:
        budget.tick(_METHOD, f"shapes: {variant.label}", 0.65)
        tried = try_variant(variant, golden, candidate, floor, quality.judged_output, quality.class_axis)
        if tried is not None:
            report.shapes.append(tried.to_json())
            failures += [f"at {variant.label}: {text}" for text in tried.objections]
    if report.shapes:
        report.notes.append(f"dynamic axes: tried {', '.join(entry['label'] for entry in report.shapes)}; unverified beyond")
    elif variants:
        report.notes.append(f"dynamic axes: golden refused all that was tried ({variants[0].label}, …); unverified beyond the samples")
    return failures


def _time(request: VerifyRequest, report: VerifyReport, samples: Samples, batchable: bool, budget: Budget, until: float) -> None:
    """Speed against the incumbent; folded into the verdict where a swap is asked for."""
    incumbent = request.incumbent or request.golden
    mine = request.incumbent_settings if request.incumbent else request.golden_settings
    sizes = {1: feeds_of(samples, [0])}
    if batchable:
        for limit in {mine.batch_limit, report.serve.batch_limit}:
            sizes[limit] = feeds_of(samples, np.arange(limit) % len(samples))
    report.speed = speed(
        incumbent, mine, request.candidate, report.serve, sizes, request.goal,
        seconds=max(5.0, until - time.monotonic()), tick=lambda step, share: budget.tick(_METHOD, step, 0.7 + 0.3 * share),
        sources=request.sources,
    )  # fmt: skip
    report.notes += report.speed.notes
    if request.purpose is Purpose.PROOF:
        return
    report.reasons += report.speed.reasons
    if report.speed.verdict == "failed" or (report.speed.verdict == "inconclusive" and report.verdict is Verdict.PASSED):
        report.verdict = Verdict(report.speed.verdict)
