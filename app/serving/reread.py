"""A model.yaml that says otherwise how versions are run than it did when one was loaded: taken by the live runner where that is possible.

What is not (threads, another word about rows, a bound of memory) needs the version loaded anew, which is the reconciler's to do.
"""

from __future__ import annotations

from app.catalog.model_config import ModelConfig
from app.catalog.repository import FoundModel
from app.domain import ModelState
from app.errors import HoneError
from app.serving.admission import Admission
from app.serving.slot import Loaded


def runs_as_told(loaded: Loaded, config: ModelConfig) -> bool:
    return loaded.run_by in (None, config.run_by)


async def takes_live(loaded: Loaded, want: ModelState, found: FoundModel, config: ModelConfig, admission: Admission) -> bool:
    """Whether `loaded` is run by `config` from now on; False where it must be loaded anew."""
    try:
        admitted = await admission.admit(found, want, loaded.version)
    except HoneError:
        return False  # loading it says why
    settings = want.settings_of(loaded.version) or admitted.settings
    before = loaded.admitted
    alike = (before.signature, before.path, before.factory) == (admitted.signature, admitted.path, admitted.factory)
    if not alike or loaded.memory_mb != config.limits.memory_mb or loaded.settings.needs_new_session(settings):
        return False
    loaded.engine.apply(settings)
    loaded.settings, loaded.run_by = settings, config.run_by
    return True
