"""What verify is asked and what it answers: the request and the report, with their JSON forms. It judges nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from optimizers.answers import Rows
from optimizers.base import Rejected
from optimizers.fidelity import Floor
from optimizers.gain import Goal, SpeedReport
from optimizers.samples import Samples
from optimizers.session import Settings
from optimizers.torch_module import TorchSource

DEFAULT_FLOORS: Final = {"agreement": 0.99, "accuracy": 0.99, "cosine": 0.999, "sqnr_db": 20.0}


class Verdict(StrEnum):
    """The same words as the server's. Only PASSED promotes."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    NO_DATA = "no_data"
    ERROR = "error"


class Purpose(StrEnum):
    """Why it is asked: to take over from the incumbent (then it must be new, and gain), or to prove a version on this host as it is."""

    SWAP = "swap"
    PROOF = "proof"


@dataclass(frozen=True)
class SampleSet:
    """Samples on disk. `origin`: owner | captured | synthetic; `answers`: an .npz of golden's unoptimized outputs made on this host class."""

    path: str
    origin: str = "owner"
    stacked: bool = True
    answers: str = ""

    def load(self, exclude: frozenset[str]) -> tuple[Samples, Rows | None]:
        try:
            samples = Samples.load(Path(self.path), self.origin, self.stacked)
            known = None if not self.answers else dict(Samples.load(Path(self.answers)).inputs)
        except (OSError, ValueError) as error:
            raise Rejected(f"samples: {error}") from None
        if not exclude:
            return samples, known
        kept = [i for i, digest in enumerate(samples.hashes()) if digest not in exclude]
        return samples.rows(kept), known and {name: values[kept] for name, values in known.items()}


@dataclass(frozen=True)
class Quality:
    """As in model.yaml. `metric`: auto | agreement | accuracy | cosine | sqnr_db."""

    metric: str = "auto"
    floor: float | None = None
    per_class_floor: float | None = None
    min_samples: int = 300
    judged_output: str = ""
    class_axis: int | None = None

    def floor_for(self, task: str, labelled: bool) -> Floor:
        """Labels, where there are any, decide for classifiers (by accuracy relative to golden's), unless another metric was named."""
        metric = self.metric
        if metric == "auto":
            metric = ("accuracy" if labelled else "agreement") if task == "classification" else "cosine"
        elif metric == "accuracy" and not labelled:
            metric = "agreement"
        floor = DEFAULT_FLOORS[metric] if self.floor is None else self.floor
        return Floor(metric, floor, self.per_class_floor, self.min_samples)


@dataclass(frozen=True)
class VerifyRequest:
    """What to judge. Paths are ONNX files, or .safetensors that `sources` says how to run, by path; settings have the fields of RuntimeSettings.

    `sets` by name: reference, live, labelled; each that exists must be passed. `exclude`: hashes of samples that calibrated.
    `batchable`: golden is served in batches. `lossless`: the method promises the same answers; then bit-close outputs are evidence enough.
    `timed`: False compares answers only, and says nothing of speed. `notes`: what stands in the report beside its own.
    """

    golden: str
    candidate: str
    incumbent: str = ""
    parent: str = ""
    sources: Mapping[str, TorchSource] = field(default_factory=dict)
    sets: Mapping[str, SampleSet] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    task: str = "generic"
    quality: Quality = Quality()
    goal: Goal = Goal()
    candidate_settings: Settings = Settings()
    incumbent_settings: Settings = Settings()
    golden_settings: Settings = Settings()
    batchable: bool = True
    lossless: bool = False
    timed: bool = True
    purpose: Purpose = Purpose.SWAP
    exclude: frozenset[str] = frozenset()
    seconds: float = 300.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises Rejected, naming the key."""
        known = {name: value for name, value in data.items() if value is not None}
        if unknown := sorted(set(known) - set(cls.__dataclass_fields__)):
            raise Rejected(f"verify: unknown key {unknown[0]!r}; there are {', '.join(cls.__dataclass_fields__)}")
        try:
            known["sets"] = {name: SampleSet(**value) for name, value in known.get("sets", {}).items() if value}
            known["sources"] = {path: TorchSource.from_json(source) for path, source in known.get("sources", {}).items()}
            known["quality"] = Quality(**known.get("quality", {}))
            known["goal"] = Goal(**known.get("goal", {}))
            for name in ("candidate_settings", "incumbent_settings", "golden_settings"):
                known[name] = Settings.from_json(known.get(name))
            known["notes"] = tuple(known.get("notes", ()))
            known["exclude"] = frozenset(known.get("exclude", ()))
            known["purpose"] = Purpose(known.get("purpose", "swap"))
            return cls(**known)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise Rejected(f"verify: {error}") from None


@dataclass
class VerifyReport:
    """The verdict and everything it rests on; JSON-able by `to_json`."""

    verdict: Verdict = Verdict.ERROR
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nothing_changed: bool = False
    evidence: str = ""
    bit_close: bool = False
    host_class: str = ""
    fidelity: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    speed: SpeedReport | None = None
    serve: Settings = Settings()
    seconds: float = 0.0

    @property
    def summary(self) -> str:
        gained = f"; {self.speed.headline}" if self.speed and self.speed.headline else ""
        return f"{self.verdict.value}: {'; '.join(self.reasons) or 'no objection'}{gained}"

    def to_json(self) -> dict[str, Any]:
        timing = self.speed.to_json() if self.speed else {"latency": {}, "capacity": {}, "quiet": {}}
        return {
            "verdict": self.verdict.value, "summary": self.summary, "reasons": self.reasons, "notes": self.notes,
            "nothing_changed": self.nothing_changed, "evidence": self.evidence, "bit_close": self.bit_close, "host_class": self.host_class,
            "fidelity": self.fidelity, "rows": self.rows, "shapes": self.shapes, "serve": self.serve.to_json(), "seconds": self.seconds, **timing,
        }  # fmt: skip
