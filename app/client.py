"""A synchronous client of a Hone server's REST API, for the command line and for scripts. Knows routes, nothing of the server's insides.

Answers are the server's JSON as it came. Every failure is a ClientError whose text is fit to be shown.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import quote, urlsplit

import httpx

from app.plain import clean_lines
from app.settings import PREFIX, discovered, in_url, is_token

JSON: TypeAlias = Any

CONNECT_TIMEOUT_S: Final = 5.0
FOLLOW_TIMEOUT_S: Final = 30.0
"""A followed timeline shows a sign of life every ten seconds."""
TOKEN_FILE: Final = "admin-token"
ANYWHERE: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""What is listened to, and not called, by what is called instead."""
NO_TOKEN: Final = (
    "give the token with --token or HONE_TOKEN, or name the server's state folder with --state or HONE_STATE (it holds admin-token)"
)


class ClientError(Exception):
    """What went wrong, and what to do. `status` is the HTTP status; 0 where no answer came."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Address:
    """Where a server is, and with what token. `admin` differs from `url` where the admin side has a port of its own."""

    url: str
    admin: str
    token: str = ""
    token_problem: str = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str], url: str | None = None, token: str | None = None, state: str | None = None) -> Address:
        """Arguments win over HONE_URL, HONE_TOKEN, HONE_ADMIN_TOKEN, HONE_STATE, HONE_HOST, HONE_PORT and HONE_ADMIN_PORT.

        HONE_ADMIN_PORT is a port of the host that HONE_URL names, unless HONE_ADMIN_HOST names another; `url` has both sides.
        """
        env = {name: text.strip() for name, text in env.items() if name.startswith(PREFIX) and not discovered(name, text.strip())}
        base = (url or env.get("HONE_URL") or f"http://{_host(env.get('HONE_HOST'))}:{env.get('HONE_PORT') or 8000}").rstrip("/")
        if "://" not in base:
            base = f"http://{base}"
        admin = base if url else _admin_url(base, env)
        given = (token or "").strip() or env.get("HONE_TOKEN") or env.get("HONE_ADMIN_TOKEN") or ""
        if not is_token(given):
            raise ClientError("the token has characters that no token has (blanks, or other than ASCII); was it copied whole?")
        if given:
            return cls(base, admin, given)
        return cls(base, admin, *_token_of(Path(state or env.get("HONE_STATE") or ".hone")))


def _admin_url(base: str, env: Mapping[str, str]) -> str:
    """Where the admin side is, of a server whose inference is at `base`. Raises ClientError."""
    port = env.get("HONE_ADMIN_PORT") or "0"
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ClientError(f"HONE_ADMIN_PORT is {port!r}; it is a port's number, from 1 to 65535 (0 or empty: the same as HONE_PORT)")
    if int(port) == 0:
        return base
    try:
        parts = urlsplit(base)
        named = parts.hostname
    except ValueError:
        return base  # asking there says that it is no address
    listens = env.get("HONE_ADMIN_HOST") or ""
    return f"{parts.scheme}://{_host(named if listens in ANYWHERE else listens)}:{int(port)}"


def _host(host: str | None) -> str:
    """A name that can be called: 0.0.0.0 and :: listen everywhere, so this machine's own address does."""
    return in_url(ANYWHERE.get(host or "", host or ""))


def _token_of(state: Path) -> tuple[str, str]:
    """The token in a state folder, and why there is none."""
    path = state / TOKEN_FILE
    try:
        return path.read_text().strip(), ""
    except FileNotFoundError:
        return "", f"{path} does not exist: {NO_TOKEN}"
    except OSError as error:
        return "", f"{path} cannot be read ({error.strerror}): {NO_TOKEN}"


class Client:
    """Use as a context manager. `timeout_s` bounds the wait for each answer."""

    def __init__(self, address: Address, timeout_s: float = 60.0) -> None:
        self.address = address
        self._http = httpx.Client(timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S), trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    # health and inference: no token

    def live(self) -> bool:
        return self._is_ok("/v2/health/live")

    def ready(self) -> bool:
        return self._is_ok("/v2/health/ready")

    def model_ready(self, model: str) -> bool:
        return self._is_ok(f"/v2/models/{_part(model)}/ready")

    def server(self) -> JSON:
        return self._call("GET", "/v2")

    def predict(self, model: str, body: bytes, content_type: str, version: str = "") -> JSON:
        """The friendly door: an image, a text or JSON in, labels or outputs out."""
        return self._call("POST", f"/models/{_of(model, version)}/predict", content=body, headers={"Content-Type": content_type})

    def infer(self, model: str, body: bytes, version: str = "") -> JSON:
        """The Open Inference Protocol with a JSON body."""
        return self._call("POST", f"/v2/models/{_of(model, version)}/infer", content=body, headers={"Content-Type": "application/json"})

    # the admin side

    def status(self) -> JSON:
        return self._admin("GET", "/status")

    def models(self) -> JSON:
        return self._admin("GET", "/models")

    def model(self, model: str) -> JSON:
        return self._admin("GET", f"/models/{_part(model)}")

    def explain(self, model: str) -> JSON:
        return self._admin("GET", f"/models/{_part(model)}/explain")

    def versions(self, model: str) -> JSON:
        return self._admin("GET", f"/models/{_part(model)}/versions")

    def deploy(self, name: str, files: Mapping[str, Path]) -> JSON:
        """Upload a model: `files` maps the names that the server shall see (model.onnx, its data files, model.yaml) to local files."""
        opened = {shown: path.open("rb") for shown, path in files.items()}
        try:
            parts = [(shown, (shown, file, "application/octet-stream")) for shown, file in opened.items()]
            return self._admin("POST", "/models", data={"name": name}, files=parts)
        finally:
            for file in opened.values():
                file.close()

    def optimize(self, model: str, tries: list[list[JSON]] | None, reason: str, promote: str, target: str = "") -> JSON:
        """Ask for a job. `tries` are alternatives of steps, each a method's name or {"method": …}; None leaves the choice to the server."""
        body: dict[str, JSON] = {"reason": reason, "promote": promote} | ({"target": target} if target else {})
        if tries:
            body["try"] = tries
        return self._admin("POST", f"/models/{_part(model)}/optimize", json=body)

    def promote(self, model: str, version: str, reason: str, force: bool = False) -> JSON:
        body: dict[str, JSON] = {"version": version, "reason": reason} | ({"force": True} if force else {})
        return self._admin("POST", f"/models/{_part(model)}/promote", json=body)

    def rollback(self, model: str, reason: str) -> JSON:
        return self._admin("POST", f"/models/{_part(model)}/rollback", json={"reason": reason})

    def verify(self, model: str, version: str = "", reason: str = "asked for") -> JSON:
        return self._admin("POST", f"/models/{_part(model)}/verify", json={"reason": reason} | ({"version": version} if version else {}))

    def load(self, model: str, version: str) -> JSON:
        return self._admin("POST", f"/models/{_part(model)}/versions/{_part(version)}/load")

    def change_settings(self, model: str, settings: Mapping[str, JSON]) -> JSON:
        return self._admin("PATCH", f"/models/{_part(model)}/settings", json=dict(settings))

    def set_mode(self, model: str, mode: str) -> JSON:
        return self._admin("PUT", f"/models/{_part(model)}/mode", json={"mode": mode})

    def set_ladder(self, model: str, rungs: list[str]) -> JSON:
        return self._admin("PUT", f"/models/{_part(model)}/ladder", json={"rungs": rungs})

    def clear_capture(self, model: str) -> JSON:
        return self._admin("DELETE", f"/models/{_part(model)}/capture")

    def freeze(self, frozen: bool) -> JSON:
        return self._admin("POST", "/freeze" if frozen else "/unfreeze")

    def remove(self, model: str, version: str = "") -> JSON:
        return self._admin("DELETE", f"/models/{_of(model, version)}")

    def jobs(self, model: str = "", open_only: bool = False) -> JSON:
        return self._admin("GET", "/jobs", params=({"model": model} if model else {}) | ({"open": "true"} if open_only else {}))

    def job(self, identity: str) -> JSON:
        return self._admin("GET", f"/jobs/{_part(identity)}")

    def cancel(self, identity: str) -> JSON:
        return self._admin("DELETE", f"/jobs/{_part(identity)}")

    def timeline(self, model: str = "", after: int = 0, limit: int = 0) -> JSON:
        """{"events": […]}, oldest first: the newest `limit`, or with `after` those that follow it."""
        return self._admin("GET", "/timeline", params=_timeline(model, after) | ({"limit": limit} if limit else {}))

    def follow(self, model: str = "", after: int = 0) -> Iterator[JSON]:
        """Events as they happen, until the server ends the stream. Raises ClientError when it breaks."""
        request = self._http.build_request(
            "GET",
            f"{self.address.admin}/admin/timeline",
            params=_timeline(model, after) | {"follow": "true"},
            headers=self._credentials(),
            timeout=httpx.Timeout(FOLLOW_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        )
        with _told_plainly(str(request.url)):
            response = self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        yield json.loads(line.removeprefix("data: "))
            finally:
                response.close()

    # how a call is made

    def _is_ok(self, path: str) -> bool:
        """True for 200. Raises ClientError where nothing answers."""
        return self._send("GET", self.address.url + path).status_code == 200

    def _admin(self, method: str, path: str, **options: Any) -> JSON:
        return self._call(method, f"/admin{path}", base=self.address.admin, headers=self._credentials(), **options)

    def _credentials(self) -> dict[str, str]:
        token = {"Authorization": f"Bearer {self.address.token}"} if self.address.token else {}
        return {"X-Hone-Actor": _user(), **token}

    def _call(self, method: str, path: str, base: str = "", **options: Any) -> JSON:
        response = self._send(method, (base or self.address.url) + path, **options)
        if response.is_success:
            return _json(response) if response.content else {}
        raise self._refusal(response)

    def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        with _told_plainly(url):
            return self._http.request(method, url, **options)

    def _refusal(self, response: httpx.Response) -> ClientError:
        if response.status_code != 401:
            return ClientError(clean_lines(_told(response)), response.status_code)
        why = self.address.token_problem or f"the token is not this server's: {NO_TOKEN}"
        return ClientError(f"{_base(str(response.url))} refuses: {why}", 401)


@contextmanager
def _told_plainly(url: str) -> Iterator[None]:
    """What goes wrong on the way to `url` becomes a ClientError that says what to do."""
    try:
        yield
    except httpx.ConnectError:
        where = "name it with --url, HONE_URL or, where its admin side has a port of its own, HONE_ADMIN_PORT"
        raise ClientError(f"no server answers at {_base(url)}: start one with `hone serve` or `hone demo`, or {where}") from None
    except httpx.TimeoutException:
        raise ClientError(f"{_base(url)} did not answer in time; --timeout waits longer") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise ClientError(f"{_base(url)!r} is no address; --url takes one such as http://127.0.0.1:8000") from None
    except httpx.TransportError as error:
        raise ClientError(f"the connection to {_base(url)} broke: {error or type(error).__name__}") from None


def _timeline(model: str, after: int) -> dict[str, str | int]:
    return ({"model": model} if model else {}) | ({"after": after} if after else {})


def _part(name: str) -> str:
    """One part of a path, whatever it is called: dots alone would climb to another path, and an empty part would be the path above."""
    if not name:
        raise ClientError("a name is empty; give the name of a model, version or job")
    return name.replace(".", "%2E") if name in (".", "..") else quote(name, safe="")


def _of(model: str, version: str) -> str:
    return _part(model) + (f"/versions/{_part(version)}" if version else "")


def _base(url: str) -> str:
    return "/".join(url.split("/")[:3])


def _user() -> str:
    """Who is recorded as the author of a change, and from where: on many machines people have the same name. Headers are ASCII."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}".encode("ascii", "replace").decode()


def _json(response: httpx.Response) -> JSON:
    try:
        return response.json()
    except ValueError:
        kind = response.headers.get("content-type", "no type")
        raise ClientError(f"{_base(str(response.url))} answered {kind}, not JSON: is it a Hone server?", response.status_code) from None


def _told(response: httpx.Response) -> str:
    """The server's own words: every Hone error is {"error": text}."""
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase} from {response.url}: is it a Hone server?"
