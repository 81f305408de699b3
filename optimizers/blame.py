"""What a version's cost comes from: its file in fresh processes, in turns with another file, and on recent inputs in turns with frozen ones.

The task `blame`: a paired replay in CPU time of one quiet thread (and its instructions, where they are counted), on one core, in at most 30 s.
A host that is busy moves both sides alike. It says whether the file or its inputs cost more than they should; the live process and the proof are
its caller's to hold against it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from optimizers.answers import feeds_of
from optimizers.base import Budget, Rejected
from optimizers.blame_report import PLACEMENTS, BlameReport, Fresh, Outcome, Proven, Weighed, enough_placements
from optimizers.measure import LEAST_ROUNDS, LOOKS, SLOW_S, Arm, ArmFailed, Comparison, Series, compare
from optimizers.samples import Samples
from optimizers.session import Feeds, Settings
from optimizers.stats import Interval, trimmed_mean
from optimizers.torch_module import TorchSource
from optimizers.verdict import SampleSet

INPUTS: Final = 8
"""So many different inputs take turns on each side, where all of a side have one form."""
VARIED_INPUTS: Final = 24
"""As many where they do not. Each then counts once: what a sample of inputs of many sizes costs is known no better than by their number."""
SPARE_S: Final = 2.0
"""Kept back for ending what was started."""
INPUT_LEAST_S: Final = 1.0
"""Where the file seems slower, inputs are weighed after it, if so much time is left: on a busy host it may do for one of the two."""
_METHOD: Final = "blame"


@dataclass(frozen=True)
class BlameRequest:
    """`live` and `other` ('': none) are ONNX files, or .safetensors files with a source; run with `settings` on one thread that does not spin.

    `recent` inputs are held against `usual` ones, or against the reference where none are given. Both may be of any shapes, one set for each form.
    """

    live: str
    reference: SampleSet
    other: str = ""
    recent: tuple[SampleSet, ...] = ()
    usual: tuple[SampleSet, ...] = ()
    live_source: TorchSource | None = None
    other_source: TorchSource | None = None
    settings: Settings = Settings()
    proof: Proven = Proven()
    batch: int = 1
    seconds: float = 25.0
    tolerance: float = 0.05

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises Rejected, naming the key."""
        known = {name: value for name, value in data.items() if value is not None}
        if unknown := sorted(set(known) - set(cls.__dataclass_fields__)):
            raise Rejected(f"blame: unknown key {unknown[0]!r}; there are {', '.join(cls.__dataclass_fields__)}")
        if missing := [name for name in ("live", "reference") if not known.get(name)]:
            raise Rejected(f"blame: {missing[0]!r} is missing; name the live version's file and frozen samples to run it on")
        try:
            known["reference"] = SampleSet(**known["reference"])
            known |= {name: tuple(SampleSet(**each) for each in known[name]) for name in ("recent", "usual") if name in known}
            known |= {name: TorchSource.from_json(known.get(name)) for name in ("live_source", "other_source")}
            known["settings"] = Settings.from_json(known.get("settings")).one_quiet_thread()
            known["proof"] = Proven.from_json(known.get("proof"))
            return cls(**known)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise Rejected(f"blame: {error}") from None


def run(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The task: a BlameRequest as JSON in, a BlameReport as JSON out."""
    return blame(BlameRequest.from_json(request), budget).to_json()


def blame(request: BlameRequest, budget: Budget) -> BlameReport:
    """Replay and weigh. Raises Rejected where a file or samples are missing, or the model refuses them."""
    for path in (request.live, request.other or request.live):
        if not Path(path).is_file():
            raise Rejected(f"blame: {path} is no file; it was removed, or belongs to another host")
    replay = _Replay(request, budget)
    try:
        return replay.report()
    except _TooSlow as slow:
        return replay.unfinished(str(slow))
    except ArmFailed as failed:
        if failed.how != "hung":
            raise Rejected(f"blame: {failed}") from None
        return replay.unfinished(str(failed))


class _TooSlow(Exception):
    """The least number of rounds would not fit into the time that is left."""


class _Replay:
    """One run of the task: what was measured so far, and the time that is left."""

    def __init__(self, request: BlameRequest, budget: Budget) -> None:
        self._request, self._budget = request, budget
        self._started = time.monotonic()
        self._until = self._started + max(1.0, min(request.seconds, budget.left_s) - SPARE_S)
        self._reference = _inputs([request.reference], request.batch, "frozen")
        self._recent = _inputs(request.recent, request.batch, "recent") if request.recent else []
        self._usual = _inputs(request.usual, request.batch, "earlier") if request.usual else self._reference
        self._rows = request.batch if request.reference.stacked else 1
        self._version: list[Weighed] = []
        self._input: Weighed | None = None
        self._fresh: Fresh | None = None
        self._impossible = ""

    def report(self) -> BlameReport:
        with ExitStack() as stack:
            live, other = self._opened(stack)
            if other is not None:
                self._weigh_version(other, live, 0.4)
            if self._recent and not (self._version and self._version[-1].outcome is Outcome.ABOVE):
                self._weigh_input(live, 0.5)
            while other is not None and self._version[-1].outcome is Outcome.ABOVE and not enough_placements(self._version):
                for arm in (other, live) if len(self._version) % 2 else (live, other):
                    arm.reopen()
                self._weigh_version(other, live, 1 / (PLACEMENTS - len(self._version)))
            if self._recent and self._input is None and self._until - time.monotonic() > INPUT_LEAST_S:
                self._weigh_input(live, 0.5)
            if not self._fresh:
                self._fresh = Fresh.of(self._compare(live, live, self._reference, None, 0.3, lambda ratio: True).first, self._rows)
        compared = self._version or self._input or self._impossible
        return self.unfinished("" if compared else "nothing to compare with: name another version's file, or recent inputs")

    def unfinished(self, note: str = "") -> BlameReport:
        seconds = time.monotonic() - self._started
        usual = "earlier" if self._request.usual else "frozen"
        notes = (note,) if note else ()
        return BlameReport(tuple(self._version), self._input, self._fresh, self._request.proof, usual, notes, self._impossible, seconds)

    def _opened(self, stack: ExitStack) -> tuple[Arm, Arm | None]:
        """The live file's arm and the other's. An other that does not open is no reason not to look at the inputs."""
        request = self._request
        live, other = self._arm(stack, request.live, request.live_source), None
        if request.other and request.live_source and request.other_source:
            other = stack.enter_context(live.twin(request.other, request.other_source))
        live.open()
        try:
            if request.other:
                other = (other or self._arm(stack, request.other, request.other_source)).open()
        except ArmFailed as failed:
            if failed.how == "hung":
                raise
            self._impossible = f"its file could not be held to the other: {failed}"
            other = None
        return live, other

    def _weigh_version(self, other: Arm, live: Arm, share: float) -> None:
        expected, tolerance = self._request.proof.rows_ratio, self._request.tolerance
        limit = expected.high * (1 + tolerance)
        found = self._compare(other, live, self._reference, None, share, _told_from(limit))
        self._fresh = self._fresh or Fresh.of(found.other, self._rows)
        limit *= self._host_factor(found.first)
        self._version.append(Weighed(found.cpu, limit, found.rounds, found.quiet, expected.estimate, found.instructions))

    def _host_factor(self, other: Series) -> float:
        """How much more than proven the other file costs now. Two files do not feel a changed host alike, so the limit grows with it."""
        proven = self._request.proof.other_cpu_s
        return max(1.0, trimmed_mean(other.cpu_s) / self._rows / proven) if proven else 1.0

    def _weigh_input(self, live: Arm, share: float) -> None:
        limit = 1 + self._request.tolerance
        varied = _varied(self._usual) or _varied(self._recent)
        most = max(LEAST_ROUNDS, min(len(self._usual), len(self._recent))) if varied else LOOKS[-1]
        found = self._compare(live, live, self._usual, self._recent, share, _told_from(limit), most)
        if self._usual is self._reference:
            self._fresh = self._fresh or Fresh.of(found.first, self._rows)
        self._input = Weighed(found.cpu, limit, found.rounds, found.quiet, instructions=found.instructions, one_file=True)

    def _compare(
        self, first: Arm, other: Arm, feeds: list[Feeds], others: list[Feeds] | None, share: float, decided: Callable[[Interval], bool],
        most: int = LOOKS[-1],
    ) -> Comparison:  # fmt: skip
        """Within `share` of what time is left."""
        left = max(0.5, self._until - time.monotonic())
        first.longest_s = other.longest_s = left
        call_s = [arm.time(arm.keep(each[0]), 1).wall_s[0] for arm, each in ((first, feeds), (other, others or feeds))]
        if sum(2 * (1 if each > SLOW_S else 3) * each for each in call_s) * LEAST_ROUNDS > left:
            raise _TooSlow(f"a call takes {max(call_s):.1f} s now, too long for {LEAST_ROUNDS} rounds in the {left:.0f} s that are left")
        tick = lambda: self._budget.tick(_METHOD, "replay", min(1.0, (time.monotonic() - self._started) / self._request.seconds))
        within = left * share
        return compare(
            first, other, feeds, self._rows, other_feeds=others, seconds=within, longest=left, decided=decided, most=most, tick=tick
        )

    def _arm(self, stack: ExitStack, path: str, source: TorchSource | None) -> Arm:
        """One that opens nothing yet."""
        left = max(1.0, self._until - time.monotonic())
        return stack.enter_context(Arm(path, self._request.settings, longest_s=left, source=source, opens=False))


def _inputs(sets: Sequence[SampleSet], batch: int, name: str) -> list[Feeds]:
    """A few calls of `batch` rows each, from all over the samples, the largest first (by it the turns' length is chosen)."""
    chooser = np.random.default_rng(0)
    calls: list[Feeds] = []
    for each in sets:
        loaded: Samples = each.load(frozenset())[0]
        if not len(loaded):
            raise Rejected(f"blame: no {name} samples in {each.path}: nothing to run the model on")
        order = chooser.permutation(len(loaded))
        rows = batch if loaded.stacked else 1
        count = min(VARIED_INPUTS, math.ceil(len(order) / rows))
        calls += [feeds_of(loaded, order[np.arange(i * rows, (i + 1) * rows) % len(order)]) for i in range(count)]
    chosen = [calls[i] for i in chooser.permutation(len(calls))[: VARIED_INPUTS if _varied(calls) else INPUTS]]
    largest = max(range(len(chosen)), key=lambda i: sum(values.nbytes for values in chosen[i].values()))
    return [chosen[largest], *chosen[:largest], *chosen[largest + 1 :]]


def _varied(calls: Sequence[Feeds]) -> bool:
    """Whether some are longer than others: arrays of several shapes, or text."""
    shapes = {tuple(sorted((name, values.shape) for name, values in call.items())) for call in calls}
    return len(shapes) > 1 or any(values.dtype == object for call in calls for values in call.values())


def _told_from(limit: float) -> Callable[[Interval], bool]:
    """Enough rounds: the ratio lies on one side of the limit."""
    return lambda ratio: ratio.low > limit or ratio.high <= limit
