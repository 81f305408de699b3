"""What to do about a diagnosis: the cheapest remedy that fits the cause, was not tried in vain, and is within the budget. Often none. Pure.

What may be built is declared by the methods themselves (app.control.choices), and bounded by what model.yaml allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from app.catalog.model_config import ModelConfig
from app.control.choices import builds, exports, recalibrations, settings
from app.control.diagnosis import Cause, Diagnosis
from app.control.findings import PRESSED, THROTTLED
from app.control.suspicion import Kind
from app.domain import JSON, Mode
from optimizers.base import Gain

FIRST_WAIT_S: Final = 60.0
LONGEST_WAIT_S: Final = 6 * 3600.0


class Action(StrEnum):
    RESTART = "restart"
    ROLL_BACK = "roll back"
    SWITCH = "switch"
    UNDO_SETTINGS = "undo settings"
    TUNE = "tune"
    RECALIBRATE = "recalibrate"
    OPTIMIZE = "optimize"
    STEP_DOWN = "step down"
    NOTHING = "nothing"


Remedy = tuple[Action, tuple[tuple[str, ...], ...], str]
"""What is done, for a build from which recipes, and with or towards which version."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. `waits` says why a person must agree first; `advice` what a person could do."""

    action: Action
    text: str
    version: str = ""
    tries: tuple[tuple[str, ...], ...] = ()
    waits: str = ""
    advice: tuple[str, ...] = ()

    @property
    def remedy(self) -> Remedy:
        return self.action, self.tries, self.version


@dataclass(frozen=True, slots=True)
class Situation:
    """What the planner must know of a model beside the diagnosis."""

    active: str
    golden: str
    previous: str = ""
    proven: Sequence[str] = ()
    """Versions with a passed proof on this class of host, the newest first; without the active one."""
    settings_before: bool = False
    """Whether the active version ran with other settings before."""
    rungs: Sequence[str] = ()
    tried: frozenset[tuple[str, ...]] = frozenset()
    """Recipes that were tried on this golden since anything changed, and came to nothing."""
    tried_actions: frozenset[Remedy] = frozenset()
    """Remedies tried for this very cause since the model was last well."""
    mode: Mode = Mode.AUTO
    frozen: bool = False
    jobs_open: int = 0
    jobs_waiting: int = 0
    """Jobs that wait for a worker where none is alive."""
    builds_left: int = 1
    swaps_left: int = 1
    cpu_s_left: float = 1.0
    trainable: bool = False
    wait_s: float = 0.0
    """How long to leave it alone still, after remedies for the same cause came to nothing."""
    faults: bool = False
    """Errors, deaths or wrong answers: going back needs no budget and no agreement."""
    mends: bool = False
    """Whether the active version was built by the loop since the one before it was not good enough."""
    onnx: bool = True
    """Whether the active version is an ONNX file, whose settings alone are measured."""
    torch: bool = False
    """Whether golden is a PyTorch model, so that what is built begins with its export."""


def plan(diagnosis: Diagnosis, now: Situation, config: ModelConfig) -> Plan:
    """The cheapest remedy that may help. What costs nothing in quality is automatic; the rest waits where model.yaml says so."""
    if now.wait_s > 0 and not now.faults:
        return Plan(
            Action.NOTHING, f"the same cause came back without a gain; looking again in {now.wait_s:.0f} s", advice=_advice(diagnosis)
        )
    remedies = _remedies(diagnosis, now, config)
    for candidate in remedies:
        if candidate.remedy in now.tried_actions and candidate.action is not Action.NOTHING:
            continue
        if candidate.action is Action.TUNE and not now.onnx:
            continue
        return _permitted(candidate, now)
    if not now.onnx and any(one.action is Action.TUNE for one in remedies):
        advice = (f"have version {now.golden} built for ONNX Runtime, whose settings are: hone optimize MODEL", *_advice(diagnosis))
        return Plan(Action.NOTHING, "settings of a PyTorch version are not measured, and nothing else is left", advice=advice)
    return Plan(Action.NOTHING, "nothing is left that is allowed and was not tried", advice=_advice(diagnosis))


def wait_after(failures: int) -> float:
    """Seconds to leave a cause alone after so many remedies in a row without a gain."""
    return 0.0 if failures < 2 else min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (failures - 2))


def _remedies(diagnosis: Diagnosis, now: Situation, config: ModelConfig) -> list[Plan]:
    match diagnosis.cause:
        case Cause.HOST:
            return [Plan(Action.NOTHING, "nothing is wrong with the model", advice=_advice(diagnosis))]
        case Cause.LOAD:
            return [*_step_down(now), Plan(Action.NOTHING, "more work than these cores can do", advice=_advice(diagnosis))]
        case Cause.PROCESS:
            return [Plan(Action.RESTART, "restart the runner", now.active)]
        case Cause.SETTINGS:
            return [*_undo_settings(diagnosis, now), *_tune(replace(now, tried=frozenset()), config)]
        case Cause.INPUT:
            kinds = diagnosis.evidence.get("suspicions", ())
            if "fidelity" in kinds:
                return [*_go_golden(now, config), *_recalibrate(now, config)]
            return _recalibrate(now, config) if "confidence" in kinds else _tune(now, config)
        case Cause.VERSION:
            if now.active.isdigit() and now.active != now.golden and not now.faults:
                return [
                    Plan(
                        Action.NOTHING, f"somebody went back to version {now.active}: it may be slower on purpose", advice=diagnosis.beside
                    )
                ]
            wanted = Gain.LESS_MEMORY if "memory" in diagnosis.evidence.get("suspicions", ()) else Gain.FASTER
            tuned = _tune(now, config) if wanted is Gain.FASTER else []
            return [*_leave(now, _better_than_before(diagnosis, now)), *([] if now.faults else [*_build(now, config, wanted), *tuned])]
    return [Plan(Action.NOTHING, "no cause, no remedy", advice=_advice(diagnosis))]


def _step_down(now: Situation) -> list[Plan]:
    if not now.rungs:
        return []
    return [Plan(Action.STEP_DOWN, f"version {now.rungs[0]} answers while the load lasts", now.rungs[0])]


def _undo_settings(diagnosis: Diagnosis, now: Situation) -> list[Plan]:
    """Where it began with other settings, those before fit the traffic; to measure takes an idle moment."""
    if diagnosis.evidence.get("event") != "settings" or not now.settings_before:
        return []
    return [Plan(Action.UNDO_SETTINGS, "back to the settings before", now.active)]


def _better_than_before(diagnosis: Diagnosis, now: Situation) -> bool:
    """Whether a version that Hone built is what its proof says, and only not enough for the objective: the one before it is no way out, since it
    costs more; what takes more memory was left for this very one."""
    if now.faults or now.active.isdigit():
        return False
    as_proven = "as_proven" in (diagnosis.evidence.get("replay") or {}).get("findings", ())
    return as_proven or (now.mends and "memory" in diagnosis.evidence.get("suspicions", ()))


def _leave(now: Situation, better: bool) -> list[Plan]:
    """Away from a version that Hone built; from one that the user deployed only for faults: it may be slower on purpose. One that is `better`
    than what was before makes way only for what is known to cost less still."""
    built = now.active != now.golden and not now.active.isdigit()
    found = []
    if now.previous and (built or now.faults) and not better:
        found.append(Plan(Action.ROLL_BACK, f"back to version {now.previous}", now.previous))
    others = [version for version in now.proven if version not in (now.active, now.previous) and (not better or version in now.rungs)]
    others.sort(key=lambda version: version not in now.rungs)  # what is known to cost less, before what was built for its bytes
    if others:
        found.append(Plan(Action.SWITCH, f"version {others[0]}, proven here", others[0]))
    elif built and not better and now.golden != now.active and now.golden != now.previous:
        found.append(Plan(Action.SWITCH, f"golden {now.golden}", now.golden))
    return found


def _go_golden(now: Situation, config: ModelConfig) -> list[Plan]:
    """Where quality fell, golden is right by definition, and answers at once; what fits the new inputs is built meanwhile, where there is budget."""
    if now.active == now.golden:
        return []
    may_build = now.builds_left > 0 and now.cpu_s_left > 0 and not now.jobs_open
    tries = tuple(recipe for plan in _recalibrate(now, config) for recipe in plan.tries) if may_build else ()
    meanwhile = "; int8 is calibrated anew with recent inputs meanwhile" if tries else ""
    return [Plan(Action.SWITCH, f"golden {now.golden} answers until a version fits the new inputs{meanwhile}", now.golden, tries)]


def _tune(now: Situation, config: ModelConfig) -> list[Plan]:
    return [
        Plan(Action.TUNE, "measure the settings anew", now.active, (recipe,))
        for recipe in settings()
        if recipe not in now.tried and _allowed(recipe, config)
    ]


def _recalibrate(now: Situation, config: ModelConfig) -> list[Plan]:
    return [
        Plan(Action.RECALIBRATE, "calibrate int8 with recent inputs", "", (exports() + recipe if now.torch else recipe,))
        for recipe in recalibrations()
        if _allowed(recipe, config) and now.active != now.golden
    ]


def _build(now: Situation, config: ModelConfig, wanted: Gain) -> list[Plan]:
    """What was not tried: what gains most for its cost first, since callers wait; with training only where nothing else is left."""
    groups = (
        tuple(recipe for recipe in group if _allowed(recipe, config) and recipe not in now.tried)
        for group in builds(wanted, now.trainable, now.torch)
    )
    return [Plan(Action.OPTIMIZE, f"build {_either(recipes)}", "", recipes) for recipes in groups if recipes]


def _permitted(wanted: Plan, now: Situation) -> Plan:
    """The same, or why it must wait or is only told."""
    free = wanted.action in (Action.NOTHING, Action.STEP_DOWN, Action.ROLL_BACK) or now.faults
    if now.frozen and wanted.action not in (Action.NOTHING, Action.STEP_DOWN):  # the ladder's envelope stands, and sheds load
        return _told(wanted, "all change is frozen")
    if now.mode is Mode.OBSERVE and wanted.action is not Action.NOTHING:
        return _told(wanted, "the model's mode is observe")
    if free:
        return wanted
    builds = wanted.action in (Action.OPTIMIZE, Action.RECALIBRATE)
    if wanted.tries and now.jobs_open:
        return Plan(Action.NOTHING, "a job for this model is under way already")
    if builds and now.jobs_waiting:
        return Plan(
            Action.NOTHING,
            "a job for this model waits for a worker, and none is running",
            advice=("start one: hone worker", *wanted.advice),
        )
    if (builds and now.builds_left <= 0) or (wanted.tries and now.cpu_s_left <= 0):
        return Plan(Action.NOTHING, f"would {wanted.action} ({wanted.text}), but today's budget for jobs is spent (budget in model.yaml)")
    if (builds or wanted.action is Action.SWITCH) and now.swaps_left <= 0:
        return Plan(Action.NOTHING, f"would {wanted.action} ({wanted.text}), but today's budget of swaps is spent (budget in model.yaml)")
    if now.mode is Mode.APPROVE and wanted.action is Action.SWITCH:
        return Plan(wanted.action, wanted.text, wanted.version, wanted.tries, "the model's mode is approve", wanted.advice)
    return wanted


def _told(wanted: Plan, why: str) -> Plan:
    return Plan(Action.NOTHING, f"would {wanted.action}: {wanted.text}; {why}", wanted.version, (), why, wanted.advice)


def in_brackets(decided: Plan, diagnosis: Diagnosis) -> str:
    """What a person could do, and apart from it what only was seen beside the cause."""
    could, seen = ([one for one in decided.advice if (one in diagnosis.beside) is beside] for beside in (False, True))
    parts = [f"{title}: {'; '.join(texts)}" for title, texts in (("you could", could), ("beside it", seen)) if texts]
    return f" ({', '.join(parts)})" if parts else ""


def _advice(diagnosis: Diagnosis) -> tuple[str, ...]:
    match diagnosis.cause:
        case Cause.HOST:
            return (_for_host(diagnosis.evidence), *diagnosis.beside)
        case Cause.LOAD:
            return ("add replicas, or have a faster version proven: hone optimize MODEL", *diagnosis.beside)
    return diagnosis.beside


def _for_host(evidence: JSON) -> str:
    """By what the host was blamed for: no core helps whom the kernel kills for its memory."""
    host = evidence.get("host") or {}
    if Kind.DEATHS.value in (evidence.get("suspicions") or ()):
        return "see who ends its runner: the kernel's log tells where memory ran out, else a limit of the container, or a person"
    if (host.get("memory_pressure") or 0.0) > PRESSED:
        return "give this host more memory, or its programs less to do"
    if (host.get("throttled_ratio") or 0.0) > THROTTLED:
        return "raise the CPU quota of this server, or have it serve less"
    return "move the neighbour, or give this server cores of its own"


def _allowed(recipe: Sequence[str], config: ModelConfig) -> bool:
    """An export that only comes first is no choice."""
    chosen = recipe[1:] if recipe[:1] == exports() and len(recipe) > 1 else recipe
    return config.allow is None or all(method in config.allow for method in chosen)


def _either(tries: Sequence[Sequence[str]]) -> str:
    return " or ".join("+".join(recipe) for recipe in tries)
