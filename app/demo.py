"""`hone demo`: a repository with one model, a server and a worker as child processes, and one line for each event, until Ctrl-C.

It knows how to start, watch and stop processes, and what to tell a newcomer; it serves nothing itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Final

from app import tables
from app.client import Address, Client, ClientError
from app.errors import HoneError
from app.settings import OUTSIDE, Settings

SHIPPED: Final = Path(__file__).parent / "demo_models"
MODEL: Final = "digits"
START_S: Final = 120.0
POLL_S: Final = 0.3
LOG_LINES: Final = 15
PR_SET_PDEATHSIG: Final = 1
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(HoneError):
    """A child process ended by itself; the text says which, how, and what it said last."""


def run_demo(settings: Settings) -> int:
    """Runs until a signal (status 0) or until a child dies (HoneError)."""
    refuse_taken_port(settings.host, settings.port)
    repository = copy_repository(settings.state)
    picture = settings.state / "digit.png"
    shutil.copyfile(SHIPPED / "digit.png", picture)
    with stop_on_signal() as stop, Children(settings, child_environment(settings, repository)) as children:
        children.start("serve")
        children.start("worker")
        return watch(settings, children, stop, picture)


def run_broken(settings: Settings, cause: str) -> int:
    """Break the demo that runs here, or one that is started for it, and show how it mends itself. Status 0 where it was found out."""
    from app.injection import check_cause, run_break

    check_cause(cause)
    with interrupted_by_signal():
        with Client(own_address(settings, os.environ), timeout_s=20.0) as client:
            if _answers(client):
                refuse_other_server(client, settings.state)
                return _told(run_break(cause, client, settings.state, _print))
        refuse_taken_port(settings.host, settings.port)
        repository = copy_repository(settings.state)
        with Children(settings, child_environment(settings, repository)) as children:
            children.start("serve")
            children.start("worker")
            wait_for_model(settings, children, Stop())
            with _client(settings, children) as client:
                return _told(run_break(cause, client, settings.state, _print))


def _answers(client: Client) -> bool:
    try:
        return client.model_ready(MODEL)
    except ClientError:
        return False


def _told(found: dict[str, object]) -> int:
    blamed, plans = found["blamed"] or ["nothing"], found["plans"] or ["nothing"]
    assert isinstance(blamed, list) and isinstance(plans, list)
    recovered = f"well again {found['recovered_s']} s after it was broken" if found["recovered_s"] else "nothing was repaired"
    _print(
        f"\n{found['injected']} was injected; blamed on {', '.join(dict.fromkeys(blamed))}; plan: {', '.join(dict.fromkeys(plans))}; {recovered}; "
        f"{found['failed']} of {found['sent']} requests failed"
    )
    return 0 if found["blamed"] else 3


def _print(text: str) -> None:
    print(text, flush=True)


def watch(settings: Settings, children: Children, stop: Stop, picture: Path) -> int:
    """Greet when the model answers, then show events. Returns at a signal."""
    if wait_for_model(settings, children, stop):
        with _client(settings, children) as client:
            print(greeting(settings, client.address.url, picture), flush=True)
            show_events(client, children, stop)
    print("\nstopping ...", flush=True)
    return 0


def own_address(settings: Settings, environment: Mapping[str, str]) -> Address:
    """Of the demo's own server: HONE_URL and HONE_TOKEN may be another one's, in production.

    With the token as it lies in the state folder now: the server makes it at its first start.
    """
    own = {name: text for name, text in environment.items() if name not in OUTSIDE}
    return Address.from_env(own | {"HONE_PORT": str(settings.port), "HONE_HOST": settings.host}, state=str(settings.state))


def refuse_other_server(client: Client, state: Path) -> None:
    """Raises HoneError unless the demo of this state folder answers, on this machine: faults are put in by its files and process ids."""
    try:
        host = client.status()["host"]
        machine = host["server"].rpartition(":")[0]
        same = machine == socket.gethostname() and Path(host["repository"]).resolve() == (state / "demo").resolve()
        what = f"serves {host['repository']} on {machine}"
    except ClientError as error:
        same, what = False, f"does not take its token ({error})"
    if not same:
        raise HoneError(
            f"what answers at {client.address.url} {what}; --break puts faults into the demo of {state} alone: name the demo's own folder "
            "with --state, or another port with --port, and one is started there"
        )


def _client(settings: Settings, children: Children) -> Client:
    return Client(own_address(settings, children.environment), timeout_s=10.0)


def wait_for_model(settings: Settings, children: Children, stop: Stop) -> bool:
    """True when the model answers, False at a signal. Raises Ended."""
    deadline = time.monotonic() + START_S
    with _client(settings, children) as client:
        while not stop.asked:
            children.check()
            try:
                if client.model_ready(MODEL):
                    return True
            except ClientError:
                pass  # it does not listen yet
            if time.monotonic() > deadline:
                raise Ended(f"the model did not answer within {START_S:.0f} s; see {_shown(children.logs)}, and `hone status {MODEL}`")
            stop.wait(POLL_S)
    return False


def show_events(client: Client, children: Children, stop: Stop) -> None:
    """One line for each event since the server's start, until a signal. Raises Ended."""
    last: int | None = None
    problem = ""
    while not stop.asked:
        children.check()
        try:
            last = start_of_this_life(client) if last is None else last
            for event in client.timeline(after=last, limit=1000)["events"]:
                print(tables.event_line(event), flush=True)
                last = event["seq"]
            problem = ""
        except ClientError as error:
            if str(error) != problem:
                print(f"(no events for the moment: {error})", flush=True)
            problem = str(error)
        stop.wait(POLL_S)


def start_of_this_life(client: Client) -> int:
    """The event before the server's latest start: older ones belong to earlier runs on the same state folder."""
    events = client.timeline(limit=200)["events"]
    starts = [event["seq"] for event in events if event["kind"] == "server.started"]
    return starts[-1] - 1 if starts else 0


def greeting(settings: Settings, url: str, picture: Path) -> str:
    hone = elsewhere(settings) + command_name()
    token = "as HONE_ADMIN_TOKEN says; set it where you call hone too" if settings.admin_token else _shown(settings.state / "admin-token")
    return f"""
Hone serves the model {MODEL!r} at {url}   (API: {url}/docs   metrics: {url}/metrics)

  which digit is it?  curl -s --data-binary {shlex.quote("@" + _shown(picture))} {url}/models/{MODEL}/predict
  make it faster      {hone} optimize {MODEL} --with int8-static --wait
  what serves         {hone} status
  admin token         {token}
  models, logs        {_shown(settings.state / "demo")}, {_shown(settings.state / "logs")}

Ctrl-C stops it. What happens:
"""


def elsewhere(settings: Settings) -> str:
    """The variables that a command needs in a second terminal, which knows nothing of this one's."""
    differing = {
        "STATE": (_shown(settings.state), settings.state.absolute() == Settings().state.absolute()),
        "HOST": (settings.host, settings.host in {Settings().host, "0.0.0.0"}),
        "PORT": (str(settings.port), settings.port == Settings().port),
    }
    ours = "".join(f"HONE_{name}={shlex.quote(value)} " for name, (value, usual) in differing.items() if not usual)
    return "".join(f"{name}= " for name in sorted(OUTSIDE) if os.environ.get(name)) + ours  # they would lead a command to another server


def command_name() -> str:
    """How this very command was called, so that the next one can be pasted."""
    called = Path(sys.argv[0])
    return "hone" if called.name != "hone" or shutil.which("hone") == str(called) else _shown(called)


def refuse_taken_port(host: str, port: int) -> None:
    """Raises HoneError where something listens there already, before anything is started."""
    if port == 0:
        raise HoneError("HONE_PORT=0: the demo tells its address, so it needs a port of its own, such as HONE_PORT=8001")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise HoneError(
                    f"port {port} on {host} is in use: stop what listens there, or choose another with HONE_PORT={port + 1}"
                ) from None
            raise HoneError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with HONE_HOST or HONE_PORT") from None


def copy_repository(state: Path) -> Path:
    """The demo's models in the state folder; files that are there stay, so that what was tried out in them stays too."""
    target = state / "demo"
    source = SHIPPED / "repository"
    for path in sorted(path for path in source.rglob("*") if path.is_file() and path.name[0] != "."):
        copy = target / path.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    return target


def child_environment(settings: Settings, repository: Path) -> dict[str, str]:
    factories = [str(SHIPPED / "factories"), *map(str, settings.factories)]
    return os.environ | {
        "HONE_STATE": str(settings.state),
        "HONE_REPOSITORY": str(repository),
        "HONE_FACTORIES": ":".join(factories),
        "HONE_HOST": settings.host,
        "HONE_PORT": str(settings.port),
        "PYTHONUNBUFFERED": "1",
    }


@dataclass
class Stop:
    """Set by SIGINT or SIGTERM; `wait` ends early then."""

    asked: bool = False

    def ask(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    stop = Stop()
    with _handled_by(stop.ask):
        yield stop


@contextmanager
def interrupted_by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end it as Ctrl-C does, with everything put back; a second one does not disturb that."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGHUP stays ignored where it was when we were started (nohup)."""
    before = {n: was for n in ENDING if (was := signal.getsignal(n)) is not signal.SIG_IGN or n != signal.SIGHUP}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


@dataclass
class Children:
    """The demo's processes, each in a session of its own, so that the terminal's Ctrl-C reaches only us. Leaving stops them all."""

    settings: Settings
    environment: Mapping[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    files: list[IO[bytes]] = field(default_factory=list)

    @property
    def logs(self) -> Path:
        return self.settings.state / "logs"

    def __enter__(self) -> Children:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        """The worker first: the server then has no job to wait for. SIGTERM, then SIGKILL after the server's grace time."""
        for name in ("worker", "serve"):
            process = self.running.get(name)
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.settings.lame_duck_s + self.settings.grace_s + 5.0
        for process in self.running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for file in self.files:
            file.close()

    def start(self, name: str) -> None:
        log = (self.logs / f"{name}.log").open("wb")
        self.files.append(log)
        self.running[name] = subprocess.Popen(
            [sys.executable, "-m", "app.cli", name],
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def check(self) -> None:
        """Raises Ended for the first child that is gone."""
        for name, process in self.running.items():
            status = process.poll()
            if status is not None:
                raise Ended(
                    f"`hone {name}` {how_it_ended(status)}; its last words ({_shown(self.logs / name)}.log):\n{self.last_words(name)}"
                )

    def last_words(self, name: str) -> str:
        text = (self.logs / f"{name}.log").read_bytes()[-16384:].decode("utf-8", "replace")
        return "\n".join(f"  {line}" for line in text.splitlines()[-LOG_LINES:]) or "  (none)"


def how_it_ended(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"


def die_with_parent() -> None:
    """In the child, before exec: a SIGTERM when the demo is killed, however it is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _shown(path: Path) -> str:
    """Relative to where the person is, where that is shorter."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
