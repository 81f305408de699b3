"""One Settings, built once from the environment and the command line, handed down. Every field is a HONE_ variable of that name.

It knows nothing of models: what concerns one model stands in its model.yaml (docs/model-yaml.md).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from app.errors import InvalidRequest

PREFIX = "HONE_"
DAY_S = 86_400
OUTSIDE = {"HONE_TOKEN", "HONE_URL"}
"""Variables of the command line, which talks to a server and has no Settings."""

DISCOVERED = re.compile(r"HONE_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
"""Variables that Kubernetes (and Docker's links) put into every container beside a service whose name begins with "hone"."""
_DISCOVERED_URL = re.compile(r"(tcp|udp|sctp)://.*")


def discovered(name: str, text: str) -> bool:
    """Whether a variable is service discovery's, not the operator's: HONE_PORT is then an address such as tcp://10.96.0.7:8000."""
    return bool(DISCOVERED.fullmatch(name) or (name.endswith("_PORT") and _DISCOVERED_URL.fullmatch(text)))


def in_url(host: str) -> str:
    """A host as it stands in a URL: addresses of IPv6 have brackets."""
    return f"[{host}]" if ":" in host else host


def is_token(text: str) -> bool:
    """Whether a bearer token may be so: it travels in a header."""
    return text.isascii() and text.isprintable() and " " not in text


def setting(default: Any, text: str, least: float | None = None, most: float | None = None, among: tuple[str, ...] = ()) -> Any:
    """A field with its explanation; the README's table is made of these. Numbers lie between `least` and `most`, words are one of `among`."""
    metadata = {"text": text, "least": least, "most": most, "among": among}
    return field(default=tuple(default) if isinstance(default, list | tuple) else default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of `hone serve` and `hone worker`, with defaults that work on a laptop."""

    repository: Path = setting(Path("models"), "folder of models in Triton's layout: NAME/1/model.onnx")
    state: Path = setting(Path(".hone"), "folder of what Hone itself writes: journal, built versions, proofs, tokens")
    store: str = setting("", "journal: empty for SQLite in the state folder, or redis://… for several hosts")
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port of inference, admin and metrics", 0, 65535)
    admin_host: str = setting("", "address of the admin port; empty: same as HONE_HOST")
    admin_port: int = setting(0, "a port of its own for /admin and repository changes; 0: on HONE_PORT", 0, 65535)
    admin_token: str = setting("", "bearer token that may change state; empty: made at first start in STATE/admin-token")
    viewer_token: str = setting("", "bearer token that may only read the admin side; empty: none")
    feedback_token: str = setting("", "bearer token of POST /models/MODEL/feedback, which takes true labels; empty: no feedback")
    metrics: str = setting("open", "/metrics and statistics: open, admin (token needed) or off", among=("open", "admin", "off"))
    show_internals: bool = setting(True, "send Server-Timing and version headers with every answer")
    max_body_bytes: int = setting(128 << 20, "largest request body, compressed or unpacked", 1)
    max_upload_bytes: int = setting(8 << 30, "largest model that POST /admin/models takes", 1)
    body_budget_bytes: int = setting(4 << 30, "all request bodies in memory together; more wait", 1)
    max_header_bytes: int = setting(32 << 10, "largest header block of a request", 1024)
    header_timeout_s: float = setting(30.0, "a request whose headers take longer is closed", 1)
    body_timeout_s: float = setting(
        300.0, "a request whose body takes longer is closed; one over 64 KiB too where less than 16 KiB of it come in 10 s", 1
    )
    request_timeout_s: float = setting(60.0, "deadline of a request that names none; 0: none", 0)
    lame_duck_s: float = setting(0.0, "after SIGTERM: not ready, but accepting for this long, while balancers notice", 0, DAY_S)
    grace_s: float = setting(25.0, "after the lame duck: time to answer what is in flight", 0, DAY_S)
    cores: int = setting(0, "cores for models; 0: affinity and cgroup quota decide", 0, 4096)
    memory_bytes: int = setting(0, "memory for models; 0: cgroup limit and free memory decide", 0)
    poll_s: float = setting(2.0, "how often the repository folder is looked at for new versions; 0: only on request", 0, DAY_S)
    factories: tuple[Path, ...] = setting([], "folders whose Python files may define PyTorch models (colon-separated)")
    allowed_roots: tuple[Path, ...] = setting([], "folders outside the repository that its links may point into (colon-separated)")
    allow_uploads: bool = setting(True, "POST /admin/models may deploy a model")
    allow_file_parameters: bool = setting(False, "the load call of the repository extension may carry files")
    job_threads: int = setting(1, "threads of an optimization job", 1, 4096)
    job_device: str = setting("auto", "where jobs train: cpu, cuda, or auto (cuda where PyTorch finds one)", among=("auto", "cpu", "cuda"))
    job_memory_bytes: int = setting(4 << 30, "memory of an optimization job, and of checking a model before it is served", 1)
    job_seconds: float = setting(3600.0, "time limit of an optimization job", 1)
    proof_seconds: float = setting(180.0, "time limit of the offline proof of one version: answers compared, then times", 10)
    block_s: float = setting(5.0, "seconds of one block of the sensor: what the loop compares with what is normal", 0.1, 3600)
    worker_port: int = setting(0, "port of the worker's own /metrics; 0: none", 0, 65535)
    log_level: str = setting("info", "debug, info, warning or error", among=("debug", "info", "warning", "error"))

    @classmethod
    def from_env(cls, env: Mapping[str, str], **overrides: Any) -> Settings:
        """Read HONE_* variables; empty ones count as not given, and `overrides` (None: not given) win. Raises InvalidRequest naming the variable, the rule and the remedy."""
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in env.items():
            text = text.strip()
            if not name.startswith(PREFIX) or name in OUTSIDE or not text or discovered(name, text):
                continue
            key = name[len(PREFIX) :].lower()
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
                raise InvalidRequest(f"{name} is not a setting of Hone{hint} (README lists them all)")
            values[key] = _parse(name, text, known[key].default)
        values |= {key: value for key, value in overrides.items() if value is not None}
        lower = {key: value.lower() for key, value in values.items() if known[key].metadata["among"]}
        return cls(**{**values, **lower}).checked()

    def checked(self) -> Settings:
        """Itself with absolute folders, if every value is one that it may have. Raises InvalidRequest."""
        for one in fields(self):
            _check(one, getattr(self, one.name))
        for name in ("admin_token", "viewer_token", "feedback_token"):
            _check_token(f"{PREFIX}{name.upper()}", getattr(self, name))
        given = [token for token in (self.admin_token, self.viewer_token, self.feedback_token) if token]
        if len(set(given)) < len(given):
            raise InvalidRequest(
                "HONE_ADMIN_TOKEN, HONE_VIEWER_TOKEN and HONE_FEEDBACK_TOKEN must differ: two alike would let one role do what is the other's"
            )
        return replace(self, repository=self.repository.absolute(), state=self.state.absolute())

    @property
    def journal(self) -> str:
        return self.store or str(self.state / "journal.db")


def _check(one: Field[Any], value: Any) -> None:
    """Raises InvalidRequest naming the variable, its value and what it may be."""
    name, least, most, among = f"{PREFIX}{one.name.upper()}", one.metadata["least"], one.metadata["most"], one.metadata["among"]
    if among and value not in among:
        raise InvalidRequest(f"{name}={value!r}: must be {', '.join(among[:-1])} or {among[-1]}")
    if least is None:
        return
    if not math.isfinite(value) or value < least or (most is not None and value > most):
        raise InvalidRequest(f"{name}={value}: must be {f'{least:g} or more' if most is None else f'between {least:g} and {most:g}'}")


def _check_token(name: str, token: str) -> None:
    """What cannot stand in a header would refuse everybody. The token itself is not shown."""
    if not is_token(token):
        raise InvalidRequest(
            f"{name} has characters that a header cannot carry; a token is letters, digits and signs of ASCII, without blanks"
        )


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
