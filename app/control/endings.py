"""How jobs end: what is said of them, what is kept of what they built. Pure."""

from __future__ import annotations

from typing import Final

from app.control.verification import SERVER_SIDE, Judged
from app.domain import JSON, Job, JobState, ModelState, Verdict
from optimizers.fidelity import Met
from optimizers.task import Failure

KEPT_PROVEN: Final = 4
"""So many of the newest proven versions keep their weights, of the undecided, and of those that wait for a person, beside those in use."""
WAITING: Final = frozenset({"kept", "inconclusive"})
"""Outcomes of jobs whose candidate a person may still promote."""
CHANGED: Final = frozenset({"promoted", "kept"})
"""Outcomes of a job that found something better."""
UNDECIDED: Final = frozenset({Verdict.INCONCLUSIVE, Verdict.NO_DATA})


def summary_of(report: JSON) -> str:
    """The one line of a job's end for the timeline."""
    said = [str(report[key]) for key in ("reason", "waits", "also") if report.get(key)]
    said += [f"{verdict['version']} {verdict['summary']}" for verdict in report.get("verdicts") or ()]
    canary = str(report.get("canary") or "")
    if canary.startswith("no canary"):  # of a real one the event canary.ended tells
        said.append(canary)
    tuned = report.get("tune")
    if isinstance(tuned, dict):
        said.append(f"tune {tuned.get('verdict')}: {tuned.get('reason')}")
    said += [f"{'+'.join(skipped['try'])} skipped: {skipped['reason']}" for skipped in report.get("skipped") or ()]
    return "; ".join(said)


def unneeded(want: ModelState, jobs: list[Job], host_class: str) -> list[str]:
    """Built versions whose weights may go: refused ones, those of an earlier golden, and proven and undecided ones beyond the newest few.

    Never the desired or previous one, nor one that answers some requests or may under load, nor what an open job built, nor what waits for a person.
    """
    kept = {want.desired, want.previous, want.golden, *want.rungs}
    kept |= {want.split.version} if want.split is not None else set()
    kept |= {version for job in jobs if job.model == want.name and job.state is not JobState.FINISHED for version in job.candidates}
    waiting = [job.candidate for job in sorted(jobs, key=lambda job: job.finished_at) if job.model == want.name and job.outcome in WAITING]
    kept |= set([version for version in waiting if version][-KEPT_PROVEN:])
    present = [built for built in want.built if not built.removed]
    for verdicts in ({Verdict.PASSED}, UNDECIDED):  # what a busy host left open waits for a person, whatever else its job came to
        kept |= set(
            [b.version for b in present if dict(b.verdicts).get(host_class) in verdicts and b.golden_sha256 == want.golden_sha256][
                -KEPT_PROVEN:
            ]
        )
    open_models = {job.id for job in jobs if job.state is not JobState.FINISHED}
    return [built.version for built in present if built.version not in kept and built.job not in open_models]


def is_server_side(job: Job) -> bool:
    """True where nothing has to be built: only tuning or proving, which run where the model is served."""
    return all(step["method"] in SERVER_SIDE for recipe in job.tries for step in recipe)


def told(one: Judged) -> JSON:
    """What a person reads; the whole report is in the proof. `too_few`: for want of samples, which another build would not have either."""
    sets = (one.report.get("fidelity") or {}).values()
    return {
        "version": one.version, "verdict": one.verdict.value, "summary": one.summary, "gain": round(one.gain, 4), "evidence": one.evidence,
        "lossless": one.lossless, "reasons": list(one.report.get("reasons") or ()), "notes": list(one.report.get("notes") or ()),
        "too_few": any(found.get("met") == Met.TOO_FEW.value for found in sets if isinstance(found, dict)),
    }  # fmt: skip


def without_winner(seen: list[Judged], job: Job, tuned: tuple[str, str] | None = None) -> tuple[str, str]:
    """(outcome, version) where nothing passed: other settings, or of what was left undecided the one that would gain most, for a person.

    `tuned`: the same of the settings of what serves, where they were measured too.
    """
    undecided = max((one for one in seen if one.verdict in UNDECIDED and not one.nothing_changed), key=lambda one: one.gain, default=None)
    if tuned is not None and (undecided is None or tuned[0] in CHANGED):
        return tuned
    if undecided is not None:
        return "inconclusive", undecided.version
    if not seen:
        skipped = job.report.get("skipped") or [{}]
        return "not_applicable" if all(one.get("kind") == Failure.NOT_APPLICABLE.value for one in skipped) else "failed", ""
    if all(one.nothing_changed for one in seen):
        return "nothing_changed", ""
    return "refused", ""
