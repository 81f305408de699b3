"""Which versions of a model there are to load, which stay loaded beside the one that answers, and which go. Pure.

Golden, the version on trial and the rungs of the ladder are needed; of the others one previous version and those that were loaded on request
stay warm, as many as model.yaml allows, so that a rollback takes no load.
"""

from __future__ import annotations

from app.catalog.repository import FoundModel
from app.domain import ModelState
from app.serving.slot import Loaded, Slot


def needed(want: ModelState) -> set[str]:
    """Versions that stay loaded beside the active one: the one that is about to be (a rollback goes to one that is still there), golden, the one that
    shares the traffic, and the rungs of the ladder."""
    return {want.desired, want.golden, *want.rungs, *((want.split.version,) if want.split is not None else ())}


def known(want: ModelState, found: FoundModel) -> tuple[str, ...]:
    """Versions that may be loaded: the user's, golden, and what was built from this very golden and is still there."""
    built = [b.version for b in want.built if not b.removed and b.golden_sha256 == want.golden_sha256]
    return tuple(dict.fromkeys([*(v.number for v in found.versions), want.golden, *built]))


def way_back_gone(want: ModelState | None, found: FoundModel) -> str:
    """The user's version that a rollback would go to, where its folder is gone; else ''."""
    if want is None or not want.previous.isdigit() or want.previous in (want.desired, want.golden):
        return ""
    return "" if any(version.number == want.previous for version in found.versions) else want.previous


def expired(slot: Slot, want: ModelState, now: float) -> list[Loaded]:
    """Versions that are not known any more, and those whose time as the one to go back to is over."""
    idle = [loaded for loaded in slot.versions.values() if loaded is not slot.active and loaded.version not in needed(want)]
    return [one for one in idle if one.version not in slot.known or (one.warm_until and now > one.warm_until and not one.pinned)]


def surplus(slot: Slot, want: ModelState) -> list[Loaded]:
    """Versions that are not known any more, and those beyond one previous version and model.yaml's runtime.warm_versions."""
    keep = {*needed(want), *(v.version for v in (slot.active,) if v is not None)}
    others = [v for v in slot.versions.values() if v.version not in keep]
    gone = [v for v in others if v.version not in slot.known]
    others = [v for v in others if v not in gone]
    previous = sorted((v for v in others if not v.pinned), key=lambda v: v.warm_until, reverse=True)
    pinned = [v for v in others if v.pinned]
    room = max(0, slot.config.runtime.warm_versions - len(keep & set(slot.versions)))
    stay = [*previous[:1], *pinned][:room]
    return [*gone, *(v for v in others if v not in stay)]
