"""Golden as the yardstick: its unoptimized outputs on frozen samples (task `golden`), and whether a version still computes rightly on this
class of host (task `quick_check`), trying the session options that may mend it. Lossy or not is none of its business.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from optimizers.answers import Fault, Rows, answers_of, side_by_side
from optimizers.base import Budget, Rejected
from optimizers.fidelity import Fidelity, judge
from optimizers.host import host_class
from optimizers.measure import Arm, ArmFailed
from optimizers.objections import objections
from optimizers.samples import Samples, read_npz, write_npz
from optimizers.session import PRECISE_INT8, Settings
from optimizers.torch_module import TorchSource
from optimizers.verdict import Quality

SERVED_SQNR_DB: Final = 26.0
"""Golden as served must be this close to golden unoptimized (5 %): int8 kernels round once where the unoptimized graph rounds twice."""
CHECK_SAMPLES: Final = 256


@dataclass(frozen=True)
class Try:
    """One way to run a version here, and what came of it."""

    settings: Settings
    right: bool
    reason: str
    found: Fidelity | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_json(),
            "right": self.right,
            "reason": self.reason,
            "fidelity": self.found.to_json() if self.found else None,
        }


def golden_outputs(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The task `golden`. Request: path, samples (.npz), outputs (.npz to write, or ''), settings, stacked, task, quality, batch, and the
    `source` of a .safetensors file.

    Answers with the host class, the number of samples, and under which settings golden as it is served agrees with its unoptimized self.
    """
    path, samples, settings = _common(request)
    source, wanted = _source(request), _quality(request)
    size = max(1, int(request.get("batch", settings.batch_limit if samples.stacked else 1)))
    budget.tick("golden", "unoptimized", 0.05)
    try:
        with Arm(path, replace(settings.unoptimized(), intra_op_threads=max(1, budget.threads)), source=source) as arm:
            outputs = _all_answers(arm, samples, size, budget)
    except (ArmFailed, Fault) as failed:
        raise Rejected(f"golden does not answer its samples: {failed}") from None
    if target := request.get("outputs"):
        write_npz(Path(target), outputs)
    tries = _first_right(
        path, samples, outputs, _served_ways(settings) if source is None else [settings], wanted, budget,
        seconds=request.get("seconds", 60.0), least_sqnr_db=SERVED_SQNR_DB, source=source,
    )  # fmt: skip
    return {**_answer(tries), "samples": len(samples), "outputs": request.get("outputs", ""), "output_names": list(outputs)}


def quick_check(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The task `quick_check`. Request: path, samples, golden_outputs (.npz), settings, stacked, task, quality, seconds (5), source (as for `golden`).

    Answers with the first settings under which the version computes what golden did, or says of all of them why not. A few seconds prove
    no floor: right means that the metric itself, not its lower bound, reaches the floor, and that no class collapsed. The full proof follows.
    """
    path, samples, settings = _common(request)
    source = _source(request)
    try:
        outputs = read_npz(Path(request["golden_outputs"]))
    except (OSError, ValueError, KeyError) as error:
        raise Rejected(f"quick_check: golden_outputs: {error}") from None
    if any(len(values) != len(samples) for values in outputs.values()):
        raise Rejected(
            f"quick_check: {len(samples)} samples, but golden's outputs are of {[len(v) for v in outputs.values()]}; they do not belong together"
        )
    tries = _first_right(
        path, samples, outputs, _check_ways(settings) if source is None else [settings], _quality(request), budget,
        seconds=request.get("seconds", 5.0), least_sqnr_db=None, source=source,
    )  # fmt: skip
    return {**_answer(tries), "samples": len(samples)}


def _common(request: Mapping[str, Any]) -> tuple[Path, Samples, Settings]:
    path = Path(request["path"])
    if not path.is_file():
        raise Rejected(f"{path} is no file")
    try:
        samples = Samples.load(Path(request["samples"]), stacked=bool(request.get("stacked", True)))
    except (OSError, ValueError) as error:
        raise Rejected(f"samples: {error}") from None
    if not len(samples):
        raise Rejected(f"samples: {request['samples']} is empty")
    return path, samples, Settings.from_json(request.get("settings"))


def _source(request: Mapping[str, Any]) -> TorchSource | None:
    try:
        return TorchSource.from_json(request.get("source"))
    except (TypeError, ValueError, KeyError) as error:
        raise Rejected(f"source: {error}; it has factory, inputs and outputs") from None


def _quality(request: Mapping[str, Any]) -> tuple[str, Quality]:
    return str(request.get("task", "generic")), Quality(**(request.get("quality") or {}))


def _all_answers(arm: Arm, samples: Samples, size: int, budget: Budget) -> Rows:
    parts = []
    for start in range(0, len(samples), 64):
        index = np.arange(start, min(start + 64, len(samples)))
        parts.append(answers_of(arm, samples, index, [size], "golden"))
        budget.tick("golden", "unoptimized", 0.05 + 0.6 * (start + len(index)) / len(samples))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _served_ways(settings: Settings) -> list[Settings]:
    """How golden may be served, the fastest first; unoptimized agrees with itself."""
    return list(
        dict.fromkeys((settings, *_precise(settings), *(replace(settings, graph_level=level) for level in ("extended", "basic", "none"))))
    )


def _check_ways(settings: Settings) -> list[Settings]:
    """What may make a version right on a foreign host, the cheapest first."""
    return list(
        dict.fromkeys((settings, *_precise(settings), replace(settings, graph_level="basic"), replace(settings, graph_level="none")))
    )


def _precise(settings: Settings) -> list[Settings]:
    """With u8 × u8 kernels, where the usual ones saturate."""
    if not host_class().int8_saturates or PRECISE_INT8 in settings.session_options:
        return []
    return [replace(settings, session_options=(*settings.session_options, PRECISE_INT8))]


def _first_right(
    path: Path, samples: Samples, outputs: Rows, ways: list[Settings], wanted: tuple[str, Quality], budget: Budget,
    *, seconds: float, least_sqnr_db: float | None, source: TorchSource | None,
) -> list[Try]:  # fmt: skip
    """Try `ways` in order up to the first right one, within `seconds` over all; the last try is the right one, if any is."""
    tries: list[Try] = []
    ends = time.monotonic() + min(seconds, budget.left_s)
    for at, settings in enumerate(ways):
        if tries and time.monotonic() > ends:
            break
        budget.tick(
            "quick_check",
            f"graph level {settings.graph_level}" + "".join(f", {k}={v}" for k, v in settings.session_options),
            0.7 + 0.3 * at / len(ways),
        )
        left = ends - time.monotonic()
        tries.append(_try(path, samples, outputs, settings, wanted, left / (len(ways) - at), least_sqnr_db, source))
        if tries[-1].right:
            break
    return tries


def _try(
    path: Path,
    samples: Samples,
    outputs: Rows,
    settings: Settings,
    wanted: tuple[str, Quality],
    seconds: float,
    least_sqnr_db: float | None,
    source: TorchSource | None,
) -> Try:
    task, quality = wanted
    some = np.random.default_rng(0).permutation(len(samples))[:CHECK_SAMPLES]
    part, known = samples.rows(some), {name: values[some] for name, values in outputs.items()}
    size = settings.batch_limit if samples.stacked else 1
    try:
        with Arm(path, settings.one_quiet_thread(), source=source) as arm:
            if missing := {info.name for info in arm.opened.outputs} ^ set(known):
                return Try(settings, False, f"outputs differ by name from golden's: {', '.join(sorted(missing))}")
            answers = side_by_side(known, arm, part, ([1], [size]), until=time.monotonic() + seconds)
    except (ArmFailed, Fault) as failed:
        return Try(settings, False, str(failed))
    shapes = [name for name, values in answers.golden.items() if values.shape != answers.candidate[name].shape]
    if shapes:
        return Try(settings, False, f"output {shapes[0]!r} has another shape than golden's")
    found = judge(answers.golden, answers.candidate, quality.floor_for(task, False), None, quality.judged_output, quality.class_axis)
    wrong = objections(found)
    if least_sqnr_db is not None:
        wrong += [
            f"output {o.name!r} is only {o.sqnr_db:.0f} dB from the unoptimized one" for o in found.outputs if o.sqnr_db < least_sqnr_db
        ]
    return Try(settings, not wrong, "; ".join(wrong) or f"{found.metric} {found.value:.4g} of {found.samples} samples", found)


def _answer(tries: list[Try]) -> dict[str, Any]:
    right = tries[-1] if tries and tries[-1].right else None
    return {
        "host_class": host_class().key, "right": right is not None, "settings": right.settings.to_json() if right else None,
        "as_asked": right is not None and len(tries) == 1, "reason": tries[-1].reason if tries else "nothing was tried in the time given",
        "tries": [each.to_json() for each in tries],
    }  # fmt: skip
