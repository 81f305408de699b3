"""What a person or the loop may ask for: each command checks the state, then appends the event that makes it so.

Nothing here loads, builds or verifies: data plane and workers converge to what the journal says. All methods block.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from app.control.expected import ASKED
from app.domain import JSON, BuiltVersion, Event, Job, JobState, Mode, ModelState, RuntimeSettings, Verdict
from app.errors import Conflict, InvalidRequest, NotAllowed, NotFound
from app.store.base import Journal

CHANGES: Final = frozenset({"desired.changed", "settings.changed", "model.deployed"})
"""What makes a new generation of a model."""
READ_BACK: Final = 200


class Commands:
    """Commands of one server, whose host class is `host_class`."""

    def __init__(self, journal: Journal, host_class: str) -> None:
        self._journal = journal
        self._host_class = host_class

    def model(self, name: str) -> ModelState:
        state = self._journal.state().models.get(name)
        if state is None:
            raise NotFound(f"no model {name!r} is deployed")
        return state

    def built(self, model: ModelState, version: str) -> BuiltVersion:
        """A built version that could serve. Raises NotFound or Conflict with the reason."""
        found = next((b for b in model.built if b.version == version), None)
        if found is None:
            known = ", ".join([model.golden, *(b.version for b in model.built if not b.removed)])
            raise NotFound(f"model {model.name!r} has no version {version!r}; it has {known}")
        if found.removed:
            raise Conflict(f"version {version} of {model.name!r} was removed; its weights are gone")
        if found.golden_sha256 != model.golden_sha256:
            raise Conflict(
                f"version {version} of {model.name!r} was built from an earlier golden; build it again with: hone optimize {model.name}"
            )
        return found

    def optimize(self, name: str, tries: Sequence[Sequence[JSON]], reason: str, promote: str, actor: str, rank: float = ASKED) -> Job:
        """Request a job. `tries` are alternatives, each a list of steps {"method": …}; of several jobs that wait the one with the highest `rank` is
        begun first (app.control.expected). Raises Conflict where the same job is open."""
        if promote not in {"auto", "manual"}:
            raise InvalidRequest(f"promote={promote!r}: must be auto or manual")
        model = self.model(name)
        state = self._journal.state()
        if state.frozen:
            raise NotAllowed("all change is frozen; lift it with: hone unfreeze")
        wanted = tuple(tuple(dict(step) for step in steps) for steps in tries)
        for job in state.jobs.values():
            if job.model == name and job.state is not JobState.FINISHED and job.tries == wanted:
                raise Conflict(f"job {job.id} already does exactly that; see: hone jobs {job.id}")
        identity = f"{name}-{secrets.token_hex(4)}"
        data = {
            "tries": [list(steps) for steps in wanted],
            "reason": reason,
            "promote": promote,
            "golden": model.golden,
            "golden_sha256": model.golden_sha256,
            "rank": round(rank, 4),
        }
        self._journal.append(Event("job.requested", name, model.golden, identity, actor, data))
        return self._journal.state().jobs[identity]

    def cancel(self, identity: str, actor: str) -> Job:
        job = self.job(identity)
        if job.state is JobState.FINISHED:
            raise Conflict(f"job {identity} is finished already: {job.outcome}")
        self._journal.append(Event("job.cancel_asked", job.model, "", identity, actor))
        return self.job(identity)

    def job(self, identity: str) -> Job:
        job = self._journal.state().jobs.get(identity)
        if job is None:
            raise NotFound(f"no job {identity!r}; GET /admin/jobs lists them")
        return job

    def promote(
        self, name: str, version: str, actor: str, reason: str, force: bool = False, settings: RuntimeSettings | None = None,
        watch_share: float = 0.0, fault: bool = False,
    ) -> Event:  # fmt: skip
        """Make `version` the desired one; the one before keeps `watch_share` of the requests until the loop confirms. Built versions need a proof on this class of host, or `force`; those that the user deployed do not."""
        model = self.model(name)
        if self._journal.state().frozen and not force:
            raise NotAllowed("all change is frozen; lift it with: hone unfreeze (rollback is always allowed)")
        if not version.isdigit():
            verdict = dict(self.built(model, version).verdicts).get(self._host_class)
            if verdict is not Verdict.PASSED and not force:
                found = f"its verdict here is {verdict}" if verdict else "it has no proof on this class of host"
                raise Conflict(
                    f"version {version} of {name!r} is not proven for {self._host_class}: {found}; "
                    f"prove it with: hone verify {name}:{version}, or promote it all the same with force"
                )
        if version == model.desired and settings is None:
            raise Conflict(f"version {version} of {name!r} is the desired one already")
        return self._desire(model, version, actor, reason, settings, watch_share, fault)

    def rollback(self, name: str, actor: str, reason: str) -> Event:
        """Undo the last change, at once: the settings before where those changed last, else the version before.

        Raises Conflict where that was another's going back: of two who see the same trouble the second would bring it back.
        """
        model = self.model(name)
        self._not_undone_already(model, actor)
        before = dict(model.previous_settings).get(model.desired)
        by_settings = model.changed == "settings" or (not model.changed and before is not None and model.previous in ("", model.desired))
        if by_settings and before != model.settings_of(model.desired):
            return self.change_settings(name, before, actor, reason, back=True)
        return self.leave(name, actor, reason)

    def _not_undone_already(self, model: ModelState, actor: str) -> None:
        newest_first = self._journal.read(0, READ_BACK, model.name, True)
        last = next((event for event in newest_first if event.kind in CHANGES), None)
        if last is None or last.actor == actor or not (last.data.get("back") or last.data.get("fault")):
            return
        if last.kind == "settings.changed":
            raise Conflict(
                f"{last.actor} has put the settings of {model.name!r} back already, and a rollback would undo that; "
                f"for those of before: hone settings {model.name} NAME=VALUE"
            )
        raise Conflict(
            f"{last.actor} has taken {model.name!r} from version {model.previous} to {model.desired} already, and a rollback would undo that; "
            f"for {model.previous} all the same: hone promote {model.name}:{model.previous}"
        )

    def leave(self, name: str, actor: str, reason: str, fault: bool = False) -> Event:
        """Back to the previous version, whatever changed last. With `fault` the one that is left is not gone back to by the loop."""
        model = self.model(name)
        if not model.previous or model.previous == model.desired:
            raise Conflict(f"model {name!r} has nothing to go back to: before version {model.desired} there was none, or it was removed")
        return self._desire(model, model.previous, actor, reason, None, fault=fault, back=True)

    def change_settings(
        self, name: str, settings: RuntimeSettings | None, actor: str, reason: str, stood: RuntimeSettings | None = None, back: bool = False
    ) -> Event:  # fmt: skip
        """New run-time settings for the desired version: a new generation, not a new version. None: those of its proof. `stood` are those it ran with, to go back to; with `back` the new ones are of before, which a freeze allows."""
        model = self.model(name)
        if self._journal.state().frozen and not back:
            raise NotAllowed("all change is frozen; lift it with: hone unfreeze (rollback is always allowed)")
        data: dict[str, Any] = {"version": model.desired, "settings": asdict(settings) if settings is not None else None, "reason": reason}
        if stood is not None:
            data["from"] = asdict(stood)
        if back:
            data["back"] = True
        return self._journal.append(Event("settings.changed", name, model.desired, "", actor, data), expect=model.generation)

    def set_loaded(self, name: str, loaded: bool, actor: str) -> Event:
        self.model(name)
        return self._journal.append(Event("model.loaded" if loaded else "model.unloaded", name, actor=actor))

    def set_mode(self, name: str, mode: Mode, actor: str) -> Event:
        self.model(name)
        return self._journal.append(Event("mode.changed", name, actor=actor, data={"mode": mode.value}))

    def freeze(self, frozen: bool, actor: str) -> Event:
        return self._journal.append(Event("loop.frozen" if frozen else "loop.unfrozen", actor=actor))

    def set_ladder(self, name: str, rungs: Sequence[str], actor: str) -> Event:
        """Which versions the data plane may step down to under load, the best first. Raises what `built` raises for one that cannot serve."""
        model = self.model(name)
        for version in rungs:
            if not version.isdigit():
                self.built(model, version)
            if version in model.left:
                raise Conflict(
                    f"version {version} of {name!r} was left for faults or failed its canary; who trusts it all the same promotes it first: "
                    f"hone promote {name}:{version}"
                )
        summary = f"under load, {' then '.join(rungs)} may answer" if rungs else "no version may answer in another's place"
        return self._journal.append(Event("ladder.set", name, actor=actor, data={"rungs": list(rungs), "summary": summary}))

    def forget_version(self, name: str, version: str, actor: str) -> Event:
        """Say that a built version's weights may go. Never golden, never the desired one."""
        model = self.model(name)
        if version == model.golden:
            raise NotAllowed(f"version {version} is the golden one of {name!r}: it stays; remove the model instead: hone remove {name}")
        if version == model.desired:
            raise NotAllowed(f"version {version} of {name!r} is the active one; promote or roll back to another first")
        self.built(model, version)
        return self.let_go(name, version, actor, "asked for")

    def let_go(self, name: str, version: str, actor: str, reason: str) -> Event:
        """Have a built version's weights go. Raises Conflict where the journal has other news of it, so that they must stay: it was promoted a moment before."""
        event = self._journal.append(Event("version.removed", name, version, actor=actor, data={"version": version, "reason": reason}))
        model = self._journal.state().models.get(name)
        if model is None or version == model.desired or any(b.version == version and not b.removed for b in model.built):
            raise Conflict(f"version {version} of {name!r} was promoted, or the model removed, at the same moment; it stays as it is")
        return event

    def forget_model(self, name: str, actor: str) -> Event:
        self.model(name)
        return self._journal.append(Event("model.removed", name, actor=actor))

    def _desire(
        self, model: ModelState, version: str, actor: str, reason: str, settings: RuntimeSettings | None, watch_share: float = 0.0,
        fault: bool = False, back: bool = False,
    ) -> Event:  # fmt: skip
        data: dict[str, Any] = {"version": version, "from": model.desired, "reason": reason}
        if settings is not None:
            data["settings"] = asdict(settings)
        if watch_share:
            data["watch_share"] = watch_share
        if fault:
            data["fault"] = True
        if back:
            data["back"] = True
        return self._journal.append(Event("desired.changed", model.name, version, "", actor, data), expect=model.generation)
