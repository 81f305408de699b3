"""One Settings, built once from the environment and the command line, handed down. Every field is a HONE_ variable of that name.

It knows nothing of models: what concerns one model stands in its model.yaml (docs/model-yaml.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from app.errors import InvalidRequest

PREFIX = "HONE_"
OUTSIDE = {"HONE_TOKEN", "HONE_URL"}
"""Variables of the command line, which talks to a server and has no Settings."""


def setting(default: Any, text: str) -> Any:
    """A field with its explanation; the README's table is made of these."""
    if isinstance(default, list | tuple):
        return field(default=tuple(default), metadata={"text": text})
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of `hone serve` and `hone worker`, with defaults that work on a laptop."""

    repository: Path = setting(Path("models"), "folder of models in Triton's layout: NAME/1/model.onnx")
    state: Path = setting(Path(".hone"), "folder of what Hone itself writes: journal, built versions, proofs, tokens")
    store: str = setting("", "journal: empty for SQLite in the state folder, or redis://… for several hosts")
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port of inference, admin and metrics")
    admin_host: str = setting("", "address of the admin port; empty: same as HONE_HOST")
    admin_port: int = setting(0, "a port of its own for /admin and repository changes; 0: on HONE_PORT")
    admin_token: str = setting("", "bearer token that may change state; empty: made at first start in STATE/admin-token")
    viewer_token: str = setting("", "bearer token that may only read the admin side; empty: none")
    feedback_token: str = setting("", "bearer token of POST /models/MODEL/feedback, which takes true labels; empty: no feedback")
    metrics: str = setting("open", "/metrics and statistics: open, admin (token needed) or off")
    show_internals: bool = setting(True, "send Server-Timing and version headers with every answer")
    max_body_bytes: int = setting(128 << 20, "largest request body, compressed or unpacked")
    max_upload_bytes: int = setting(8 << 30, "largest model that POST /admin/models takes")
    body_budget_bytes: int = setting(4 << 30, "all request bodies in memory together; more wait")
    max_header_bytes: int = setting(32 << 10, "largest header block of a request")
    header_timeout_s: float = setting(30.0, "a request whose headers take longer is closed")
    body_timeout_s: float = setting(
        300.0, "a request whose body takes longer is closed; one over 64 KiB too where less than 16 KiB of it come in 10 s"
    )
    request_timeout_s: float = setting(60.0, "deadline of a request that names none; 0: none")
    lame_duck_s: float = setting(0.0, "after SIGTERM: not ready, but accepting for this long, while balancers notice")
    grace_s: float = setting(25.0, "after the lame duck: time to answer what is in flight")
    cores: int = setting(0, "cores for models; 0: affinity and cgroup quota decide")
    memory_bytes: int = setting(0, "memory for models; 0: cgroup limit and free memory decide")
    poll_s: float = setting(2.0, "how often the repository folder is looked at for new versions; 0: only on request")
    factories: tuple[Path, ...] = setting([], "folders whose Python files may define PyTorch models (colon-separated)")
    allowed_roots: tuple[Path, ...] = setting([], "folders outside the repository that its links may point into (colon-separated)")
    allow_uploads: bool = setting(True, "POST /admin/models may deploy a model")
    allow_file_parameters: bool = setting(False, "the load call of the repository extension may carry files")
    job_threads: int = setting(1, "threads of an optimization job")
    job_device: str = setting("auto", "where jobs train: cpu, cuda, or auto (cuda where PyTorch finds one)")
    job_memory_bytes: int = setting(4 << 30, "memory of an optimization job")
    job_seconds: float = setting(3600.0, "time limit of an optimization job")
    block_s: float = setting(5.0, "seconds of one block of the sensor: what the loop compares with what is normal")
    worker_port: int = setting(0, "port of the worker's own /metrics; 0: none")
    log_level: str = setting("info", "debug, info, warning or error")

    @classmethod
    def from_env(cls, env: Mapping[str, str], **overrides: Any) -> Settings:
        """Read HONE_* variables; `overrides` (None: not given) win. Raises InvalidRequest naming the variable, the rule and the remedy."""
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in env.items():
            if not name.startswith(PREFIX) or name in OUTSIDE:
                continue
            key = name[len(PREFIX) :].lower()
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
                raise InvalidRequest(f"{name} is not a setting of Hone{hint} (README lists them all)")
            values[key] = _parse(name, text, known[key].default)
        values |= {key: value for key, value in overrides.items() if value is not None}
        return cls(**values).checked()

    def checked(self) -> Settings:
        if self.metrics not in {"open", "admin", "off"}:
            raise InvalidRequest(f"HONE_METRICS={self.metrics!r}: must be open, admin or off")
        if self.job_device not in {"auto", "cpu", "cuda"}:
            raise InvalidRequest(f"HONE_JOB_DEVICE={self.job_device!r}: must be auto, cpu or cuda")
        for name in ("port", "admin_port", "worker_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InvalidRequest(f"HONE_{name.upper()}={getattr(self, name)}: a port lies between 0 and 65535")
        return replace(self, repository=self.repository.absolute(), state=self.state.absolute())

    @property
    def journal(self) -> str:
        return self.store or str(self.state / "journal.db")


def _parse(name: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
        if isinstance(default, tuple):
            return tuple(Path(part) for part in text.split(":") if part)
        return Path(text) if isinstance(default, Path) else text
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise InvalidRequest(f"{name}={text!r} must be {kind}") from None
