"""Turns a workpiece into questions for the judge (optimizers.judge, optimizers.tune) and their answers into proofs. It promotes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from app.catalog.cards import BuiltCard, Card, Proof
from app.catalog.model_config import ModelConfig
from app.catalog.rows import rows_by_word
from app.control.bench import Bench, Workpiece, settings_json
from app.domain import JSON, Mode, ModelState, RuntimeSettings, State, Verdict
from app.store.codec import settings_from_json
from optimizers.artifact import WEIGHTS_SUFFIX

TUNE_S: Final = 30.0
SERVER_SIDE: Final = frozenset({"tune", "verify"})
"""Steps that run where the model is served, never in a worker."""


@dataclass(frozen=True)
class Judged:
    """One candidate's verdict here."""

    version: str
    verdict: Verdict
    summary: str
    gain: float
    lossless: bool
    evidence: str
    nothing_changed: bool
    report: JSON
    owner_named: bool = False
    """The owner named samples that judge (`samples.reference` or `samples.validation`)."""


def question(
    bench: Bench, piece: Workpiece, want: ModelState, version: str, host_class: str, fallback: RuntimeSettings, folder: Path,
    seconds: float, proof_only: bool, lossless: bool, no_slower: bool = False,
) -> JSON:  # fmt: skip
    """The request of the task `verify` for one version, judged by golden and against what serves now, within so many `seconds`.
    Writes samples into `folder`.

    `no_slower`: it is there for the quality that was lost, or for its bytes, so that being no slower is gain enough.
    """
    paths = piece.samples.save(folder)
    sets: dict[str, JSON] = {}
    for name in ("reference", "live", "labelled"):
        samples = getattr(piece.samples, name)
        if name in paths and samples is not None:
            sets[name] = {"path": paths[name], "origin": samples.origin, "stacked": samples.stacked}
    known = piece.frozen
    if (
        known is not None
        and "reference" in sets
        and known.meta.host_class == host_class
        and len(known.samples) == len(piece.samples.reference or ())
    ):
        sets["reference"]["answers"] = str(bench.state.reference(want.name) / "golden_outputs.npz")
    incumbent = want.desired
    roles = {"golden": piece.golden.version, "candidate": version, "incumbent": incumbent, "parent": _parent(bench, piece, version)}
    paths_of = {role: bench.model_path(piece, which) for role, which in roles.items()}
    return {
        **{role: str(path) for role, path in paths_of.items()},
        "sources": {
            str(path): bench.torch_source(piece, roles[role], roles[role] != piece.golden.version)
            for role, path in paths_of.items()
            if path.suffix == WEIGHTS_SUFFIX
        },
        "sets": sets,
        "notes": piece.samples.left_out,
        "task": piece.config.task,
        "quality": piece.quality,
        "goal": {"objective": piece.config.tune_for, "least_gain": None if no_slower else piece.config.least_gain},
        "candidate_settings": settings_json(bench.settings(piece, want, version, host_class, fallback)),
        "incumbent_settings": settings_json(bench.settings(piece, want, incumbent, host_class, fallback)),
        "golden_settings": settings_json(replace(fallback, graph_level="none")),
        "batchable": rows_by_word(piece.golden.rows, piece.golden.signature, piece.config).independent,
        "lossless": lossless,
        "purpose": "proof" if proof_only or version == incumbent else "swap",
        "exclude": sorted(set(piece.samples.calibration.hashes())),
        "seconds": seconds,
    }


def proof_of(card: Card, golden_sha256: str, host_class: str, report: Mapping[str, Any], before: RuntimeSettings) -> Proof:
    """The judge's report as the proof that lies beside the card."""
    serve = dict(report.get("serve") or {})
    settings = settings_from_json({**settings_json(before), **{k: v for k, v in serve.items() if k in settings_json(before)}})
    quiet = report.get("quiet") or {}
    waiting = quiet.get("waiting_ratio")
    return Proof(
        host_class, card.sha256, golden_sha256, Verdict(report["verdict"]), str(report["summary"]), dict(report.get("fidelity") or {}),
        {"latency": report.get("latency") or {}, "capacity": report.get("capacity") or {}}, settings, None,
        1 - float(waiting) if isinstance(waiting, int | float) else None,
        {key: report.get(key) for key in ("reasons", "notes", "evidence", "bit_close", "rows", "shapes", "seconds")},
    )  # fmt: skip


def judged(version: str, report: Mapping[str, Any], lossless: bool, owner_named: bool) -> Judged:
    return Judged(
        version, Verdict(report["verdict"]), str(report["summary"]), gain_of(report), lossless or bool(report.get("bit_close")),
        str(report.get("evidence") or ""), bool(report.get("nothing_changed")), dict(report),
        owner_named,
    )  # fmt: skip


def gain_of(report: Mapping[str, Any]) -> float:
    """How much faster a row is: 0.5 is twice as fast; 0 where it was not measured."""
    ratio = ((report.get("latency") or {}).get("rows_ratio") or {}).get("estimate")
    return 1.0 - float(ratio) if isinstance(ratio, int | float) and math.isfinite(ratio) else 0.0


def best(candidates: list[Judged], alone: bool = False) -> Judged | None:
    """Of those that passed, the one with the largest gain; `alone`: of those that need no person, where there are any."""
    passed = [candidate for candidate in candidates if candidate.verdict is Verdict.PASSED]
    if alone:
        passed = [candidate for candidate in passed if not may_promote_alone(candidate)] or passed
    return max(passed, key=lambda candidate: candidate.gain, default=None)


def may_promote_alone(winner: Judged) -> str:
    """Why a passed candidate must wait for a person; '' where it need not: lossy changes need real evidence that the owner named."""
    if winner.lossless:
        return ""
    if winner.evidence == "synthetic":
        return "it changes answers, and was judged on made-up inputs only: name samples in model.yaml, or promote it by hand"
    if not winner.owner_named:
        return (
            "it changes answers, and its owner named nothing that judges: name samples.reference or samples.validation in model.yaml, "
            "or promote it by hand"
        )
    return ""


def _parent(bench: Bench, piece: Workpiece, version: str) -> str:
    card = bench.card(piece, version)
    return card.draft.parent if isinstance(card, BuiltCard) else piece.golden.version


def held_back(state: State, model: str, config: ModelConfig) -> str:
    """Why nothing may get traffic or change by itself now, whatever was proven; '' where it may."""
    if state.frozen:
        return "all change is frozen: lift it with hone unfreeze, then promote it by hand"
    want = state.models.get(model)
    mode = (want.mode if want is not None else None) or config.mode
    return "" if mode is Mode.AUTO else f"the model's mode is {mode.value}: promote it by hand, or set the mode to auto"
