"""What a comparison of answers means, in words that a person reads: what is proven wrong, what is not shown, what stays unverified."""

from __future__ import annotations

from collections.abc import Iterator

from optimizers.fidelity import COLLAPSE, Fidelity, Floor, Met
from optimizers.stats import NEVER


def objections(found: Fidelity, advisory: bool = False, small: bool = False) -> list[str]:
    """What is wrong with a candidate's answers. `advisory`: labels decide elsewhere, so agreement fails only where it collapsed.

    `small`: another set shows what this one has too few samples for, so that only what its bounds prove counts.
    """
    wrong = [
        f"output {o.name!r} has {o.non_finite_candidate} non-finite values, golden's has {o.non_finite_golden}"
        for o in found.outputs
        if o.non_finite_candidate > o.non_finite_golden
    ]
    floor = 1 - COLLAPSE * (1 - found.floor) if advisory else found.floor
    if (found.high if advisory or small else found.value) < floor:
        worst = f"; worst: {found.worst}" if found.worst else ""
        wrong.append(
            f"{found.metric} is {_shown(found.metric, found.value)} of {found.samples} samples, the floor is {_shown(found.metric, floor)}{worst}"
        )
    wrong += [
        f"class {each.label} has collapsed: {each.agreed} of {each.samples} samples that golden puts there stay there"
        for each in found.classes
        if each.met is Met.BELOW
    ]
    wrong += [
        f"output {name!r} beside the judged one differs from golden's"
        for name in (found.secondary_proven if small else found.secondary_below)
    ]
    return wrong


def too_few(found: Fidelity, floor: Floor) -> str:
    """Why the floor is neither met nor missed."""
    bound = f"the lower bound of {found.metric} is {_shown(found.metric, found.low)}, its floor {_shown(found.metric, floor.floor)}"
    if found.samples < floor.min_samples:
        return f"{bound}; {found.samples} samples are fewer than the {floor.min_samples} asked for"
    return (
        f"{bound}; {found.samples} samples do not show it ({floor.needed} without a miss would)"
        if floor.needed < NEVER
        else f"{bound}; no number of samples shows that"
    )


def _shown(metric: str, value: float) -> str:
    return f"{value:.1f} dB" if metric == "sqnr_db" else f"{value:.5f}" if metric == "cosine" else f"{value:.2%}"


def class_notes(name: str, found: Fidelity) -> Iterator[str]:
    unverified = [each.label for each in found.classes if each.met is Met.TOO_FEW]
    if unverified:
        listed = ", ".join(map(str, unverified[:20])) + (", …" if len(unverified) > 20 else "")
        yield f"{name} samples: unverified for {len(unverified)} of {len(found.classes)} predicted classes ({listed}): too few samples each"
