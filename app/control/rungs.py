"""Which proven versions may answer in place of the desired one while load would break the objective: the envelope of the ladder. Reads proofs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from app.catalog.cards import Cards
from app.catalog.model_config import ModelConfig
from app.domain import Job, JobState, ModelState, Verdict
from app.errors import HoneError

CHEAPER: Final = 0.85
"""A rung must cost at most this share of the rung above: less is not worth a change of answers."""
MOST: Final = 2


def cheaper_versions(
    cards: Cards, want: ModelState, config: ModelConfig, host_class: str, jobs: Collection[Job] = ()
) -> tuple[str, ...]:  # fmt: skip
    """Versions that passed here and may be taken without asking, from dear to cheap, each clearly cheaper than the one before.

    What is on trial, built by a job of `jobs` that is not over, or was left for faults stays out: under load it would get all requests.
    """
    barred = {want.desired, *want.left} | ({want.split.version} if want.split is not None else set())
    barred |= {version for job in jobs if job.model == want.name and job.state is not JobState.FINISHED for version in job.candidates}
    costs = {
        built.version: cost for built in want.built if (cost := _cost(cards, want, built.version, host_class, "candidate")) is not None
    }
    golden = [cost for built in want.built if (cost := _cost(cards, want, built.version, host_class, "incumbent")) is not None]
    top = costs.get(want.desired) if want.desired != want.golden else (golden[0] if golden else None)
    free = config.samples.reference is not None or config.samples.validation is not None
    if top is None or not free:
        return ()
    rungs: list[str] = []
    for version, cost in sorted(costs.items(), key=lambda pair: -pair[1]):
        if version not in barred and _passed(want, version, host_class) and cost < CHEAPER * top:
            rungs.append(version)
            top = cost
    return tuple(rungs[-MOST:])


def _passed(want: ModelState, version: str, host_class: str) -> bool:
    built = next(one for one in want.built if one.version == version)
    return not built.removed and built.golden_sha256 == want.golden_sha256 and dict(built.verdicts).get(host_class) is Verdict.PASSED


def _cost(cards: Cards, want: ModelState, version: str, host_class: str, side: str) -> float | None:
    """CPU seconds per row in the largest batch of the proof; the incumbent's only where golden was it (the version was built from it)."""
    try:
        card = cards.card(want.name, version)
        proof = cards.proof(card, want.golden_sha256, host_class)
    except HoneError:
        return None
    built = next(one for one in want.built if one.version == version)
    if proof is None or (side == "incumbent" and built.parent != want.golden):
        return None
    batches: list[dict[str, Any]] = list((proof.latency.get("latency") or {}).get("batches") or ())
    if not batches:
        return None
    largest = max(batches, key=lambda batch: int(batch["batch"]))
    return float(largest[side]["cpu_s"]) / int(largest["batch"])
