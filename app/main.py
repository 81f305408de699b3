"""The only place where all parts meet: makes them from Settings, starts them in order, and ends them in reverse.

`run_server` is `hone serve`. The fork server is started before the event loop, and this process never imports a numerics runtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import uvicorn
from fastapi import FastAPI

from app.api.admin import Admin
from app.api.application import Surfaces, build_app
from app.api.auth import Guard
from app.api.http_protocol import HttpLimits, LameDuck, protocol_class
from app.api.offload import Offload
from app.api.oip import Protocol2
from app.catalog import durable
from app.catalog.cards import Cards
from app.catalog.repository import Repository
from app.catalog.reservoir import Reservoir
from app.catalog.state_folder import StateFolder
from app.control.bench import Bench
from app.control.commands import Commands
from app.control.keeper import JobKeeper
from app.control.loop import Loop
from app.control.rollout import Rollout
from app.deployment import Deployment
from app.domain import JSON, Event
from app.errors import NotAllowed
from app.operations import ServerOperations
from app.plain import log_to_stderr
from app.serving.admission import Admission
from app.serving.at_work import AtWork
from app.serving.feedback import Feedback
from app.serving.fleet import Fleet
from app.serving.forkserver import ForkServer
from app.serving.ladder import Ladder
from app.serving.ledger import CoreLedger
from app.serving.loader import Loader
from app.serving.past_deaths import PastDeaths, own_doing
from app.serving.recorder import Recorder
from app.serving.service import InferenceService
from app.serving.vitals import Vitals
from app.serving.wording import Wording
from app.settings import Settings, in_url
from app.store import last_state
from app.store.open import kind_of, open_journal
from app.telemetry.metrics import Metrics
from app.telemetry.poll import Poller
from app.telemetry.prometheus import Exporter
from app.telemetry.window import Window
from app.views import ServerViews
from optimizers.allocator import few_arenas
from optimizers.host import cpu_budget, host_class, memory_budget
from optimizers.task import TaskLimits, run_task

log = logging.getLogger("hone")
PAST_S: Final = 2.0
"""So long a start waits to hear from the store what died before; if it is away, serving begins all the same."""

DEATHS: Final = (("hung", "hung"), ("stopped", "hung"), ("memory", "memory"), ("outside", "killed"), ("sig", "crashed"))
"""Words in the reason of a runner's death, and what it is counted as; "ended" where none is there, "with_server" where nobody was left to tell."""
OF_VERSIONS: Final = (
    *(("hone_runner_deaths", (label,)) for label in dict.fromkeys([*(label for _, label in DEATHS), "ended", "with_server"])),
    ("hone_nonfinite_outputs", ()), ("hone_nonfinite_inputs", ()),
)  # fmt: skip
"""What may be counted of a version, shown before it is."""

ADMIN_END_S: Final = 1.0
"""So long the admin port may go on with what it has begun, once nothing is served any more."""
INTERRUPTED: Final = 130


@dataclass
class Parts:
    """Everything that a running server is made of."""

    settings: Settings
    service: InferenceService
    fleet: Fleet
    recorder: Recorder
    keeper: JobKeeper
    loop: Loop
    ladder: Ladder
    poller: Poller
    offload: Offload
    metrics: Metrics
    guard: Guard
    protocol: Protocol2
    admin: Admin
    exporter: Exporter
    lame_duck: LameDuck
    at_work: AtWork
    remember: Callable[[], Coroutine[Any, Any, None]]


def assemble(settings: Settings, forkserver: ForkServer, lame_duck: LameDuck) -> Parts:
    """Make all parts and connect them; nothing runs yet. Raises the errors of app.errors with the remedy."""
    cores = settings.cores or cpu_budget().cores
    memory = settings.memory_bytes or memory_budget().available_bytes
    host = host_class()
    state = StateFolder(settings.state).prepare()
    moved_from = state.moved_from(host.key)
    known = last_state.load(settings.state / "last-state.json")
    journal = open_journal(settings.journal, known)
    metrics = Metrics()
    metrics.from_zero = OF_VERSIONS
    window = Window(settings.block_s)
    metrics.replace_gauge("hone_host_info", [((host.key,), 1.0)])
    metrics.gauge("hone_cores", value=cores)
    metrics.gauge("hone_server_ready", value=0)
    service = InferenceService(settings.request_timeout_s, metrics, window)
    service.watch(metrics.observe)
    service.watch(window.observe)
    service.feedback = Feedback(window, metrics) if settings.feedback_token else None
    repository = Repository(settings.repository, settings.allowed_roots, settings.factories, state.unpacked)
    cards = Cards(state)
    recorder = Recorder(journal, metrics)
    commands = Commands(journal, host.key)

    async def look(kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
        with durable.temporary_folder(state.scratch, 0o700) as scratch:
            limits = TaskLimits(
                seconds=300,
                threads=1 if fleet.ready else cores,  # at start nobody is served yet, and everybody waits
                memory_bytes=min(memory, settings.job_memory_bytes),
                nice=5,
                scheduler="other",
                scratch=str(scratch),
            )
            return await run_task(kind, request, limits)

    def died(model: str, version: str, reason: str, pid: int, hashes: tuple[str, ...]) -> None:
        metrics.count("hone_runner_deaths", model, version, _short(reason))
        if own_doing(reason):
            window.died(model, version)
        recorder(Event("runner.died", model, version, data={"reason": reason, "pid": pid, "requests": len(hashes)}))

    admission = Admission(repository, state, cards, host.key, cores, look)
    place = f"{socket.gethostname()}:{settings.port}"
    at_work = AtWork(settings.state, place)
    past = PastDeaths(at_work.unfinished)
    for one in at_work.unfinished:
        metrics.count("hone_runner_deaths", one.model, one.version, "with_server")
        log.warning("%s:%s: %s", one.model, one.version, one.reason)
    loader = Loader(forkserver, CoreLedger(cores), metrics, window, host.key, memory, died, at_work)
    told = Wording.of(settings.repository, settings.state, (*settings.factories, *settings.allowed_roots))
    fleet = Fleet(
        service, repository, admission, loader, journal, recorder, metrics,
        lambda name, config: Reservoir(state.captured(name), config.capture), settings.poll_s,
        lambda folded: last_state.save(settings.state / "last-state.json", folded), past, known, told,
    )  # fmt: skip
    vitals = Vitals(service, loader, window, cores, past)
    rollout = Rollout(journal, window, vitals)
    keeper = JobKeeper(
        journal, commands, repository, state, cards, host.key, cores, settings, metrics, window, rollout, vitals, loader.replica
    )
    keeper.may_lead = lambda: fleet.ready
    fleet.refused = lambda: keeper.refused or recorder.refused
    loop = Loop(
        vitals, window, journal, commands, Bench(repository, state, cards), metrics, settings, host.key, cores, lambda: keeper.leads, moved_from
    )  # fmt: skip
    facts: JSON = {
        "host_class": host.key, "cores": cores, "memory_bytes": memory, "replica": loader.replica, "server": place,
        "repository": str(settings.repository), "state": str(settings.state), "store": kind_of(journal),
    }  # fmt: skip
    ladder = Ladder(service, window, metrics, lambda name: fleet.state.models.get(name), recorder)
    views = ServerViews(service, fleet, journal, cards, loop, facts)
    operations = ServerOperations(service, fleet, commands, journal, repository, cards, views, cores)
    deployment = Deployment(settings, service, fleet, admission, commands, journal, repository, state)
    guard = Guard.from_settings(settings)
    offload = Offload(settings.max_body_bytes, settings.body_budget_bytes)

    def ready() -> tuple[bool, str]:
        if lame_duck.closing:
            return False, "the server is shutting down"
        if not fleet.ready:
            return False, told(fleet.repository_error) or "the server is starting: its models are being loaded"
        return True, fleet.store_error and f"the journal does not answer or takes nothing, change pauses: {told(fleet.store_error)}"

    protocol = Protocol2(
        service, metrics, deployment, guard, ready, settings.metrics, settings.allow_file_parameters, settings.max_body_bytes
    )
    exporter = Exporter(metrics, service.loaded_keys)
    started: JSON = {"host_class": host.key, "cores": cores, "replica": loader.replica, "server": place}
    if moved_from:
        started["summary"] = f"on another class of hosts, or with another runtime: {host.key}, {moved_from} before"
    recorder(Event("server.started", data=started))
    poller = Poller(service, metrics)
    return Parts(
        settings, service, fleet, recorder, keeper, loop, ladder, poller, offload, metrics, guard, protocol, Admin(views, operations, deployment, guard, told.in_json),
        exporter, lame_duck, at_work, lambda: past.remember(journal, known),
    )  # fmt: skip


def create_app(parts: Parts, surfaces: Surfaces, owns_lifespan: bool = True) -> Any:
    """The ASGI application of one port; the one that owns the lifespan starts and ends the server's tasks."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        past = asyncio.create_task(parts.remember(), name="past-deaths")
        await asyncio.wait({past}, timeout=PAST_S)  # what took everything down before must not be loaded before that is known
        tasks = [
            asyncio.create_task(parts.recorder.run(), name="recorder"),
            asyncio.create_task(parts.fleet.run(), name="fleet"),
            asyncio.create_task(parts.keeper.run(), name="job-keeper"),
            asyncio.create_task(parts.poller.run(), name="poller"),
            asyncio.create_task(parts.loop.run(), name="loop"),
            asyncio.create_task(parts.ladder.run(), name="ladder"),
            past,
        ]
        for task in tasks:
            task.add_done_callback(_report_death)
        _spare_collections()
        try:
            yield
        finally:
            for task in tasks[1:]:
                task.cancel()
            await asyncio.gather(*tasks[1:], return_exceptions=True)
            await parts.fleet.close()
            await parts.recorder.flush(2.0)
            tasks[0].cancel()
            await parts.offload.close()
            parts.at_work.close()

    return build_app(
        surfaces, parts.service, parts.offload, parts.protocol, parts.admin, parts.guard, parts.exporter, parts.settings.metrics,
        parts.settings.show_internals, lifespan if owns_lifespan else None,
    )  # fmt: skip


def _spare_collections() -> None:
    """What was made until now stays as long as the server, so no collection need walk it (50 ms and more, in which nobody is answered);
    and requests make hardly any cycles, so looking for them less often costs nothing: 10 % of the CPU time with 1,000 connections."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def _report_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("task %s ended: the server goes on serving, but not changing", task.get_name(), exc_info=task.exception())


class Server(uvicorn.Server):
    """uvicorn, with a lame duck: on the first signal not ready at once, still accepting for a while; on the second it ends now."""

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts
        self.status = 0
        """The process's exit status: an order to end (SIGTERM) that was obeyed is a success."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        duck = self._parts.lame_duck
        if duck.closing or self.should_exit:
            self.force_exit = sig == signal.SIGINT
            self._stop()
            return
        duck.closing = True
        self._parts.at_work.close()
        self._parts.metrics.gauge("hone_server_ready", value=0)
        self.status = INTERRUPTED if sig == signal.SIGINT else 0
        asyncio.get_running_loop().call_later(self._parts.settings.lame_duck_s, self._stop)

    def _stop(self) -> None:
        self._parts.fleet.end_news()
        self.should_exit = True


def run_server(settings: Settings) -> NoReturn:
    """Serve until a signal, then end the process. Raises HoneError with the remedy when it cannot start."""
    _log_to_stderr(settings.log_level)
    few_arenas()
    _take_all_descriptors()
    sockets = [_listen(settings.host, settings.port)]
    if settings.admin_port:
        sockets.append(_listen(settings.admin_host or settings.host, settings.admin_port))
    forkserver = ForkServer()
    forkserver.start()
    try:
        lame_duck = LameDuck()
        parts = assemble(settings, forkserver, lame_duck)
        _announce(settings, sockets)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            status = runner.run(_serve(parts, sockets))
            forkserver.close()
            logging.shutdown()
            os._exit(status)  # a thread may still wait for a journal or a disk that is away: it must not hold up the end
    finally:
        forkserver.close()


async def _serve(parts: Parts, sockets: list[socket.socket]) -> int:
    """Returns the exit status."""
    settings = parts.settings
    limits = HttpLimits(settings.max_header_bytes, header_timeout_s=settings.header_timeout_s, body_timeout_s=settings.body_timeout_s)

    def config(app: Any) -> uvicorn.Config:
        return uvicorn.Config(
            app, http=protocol_class(limits, parts.lame_duck), ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=max(1, int(settings.grace_s)), backlog=2048,
        )  # fmt: skip

    apart = len(sockets) > 1
    main = Server(config(create_app(parts, Surfaces(admin=not apart))), parts)
    if not apart:
        await main.serve(sockets=sockets)
        return main.status
    admin = uvicorn.Server(config(create_app(parts, Surfaces(inference=False), owns_lifespan=False)))
    admin.config.lifespan = "off"
    side = asyncio.create_task(admin._serve(sockets[1:]), name="admin-port")
    await main.serve(sockets=sockets[:1])
    admin.should_exit = True
    await asyncio.wait({side}, timeout=ADMIN_END_S)
    return main.status


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, or NotAllowed with the remedy: a port in use must not be found out after models were loaded.

    No child inherits it: who connects while the server ends is refused, not left waiting for nobody.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise NotAllowed(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port or HONE_PORT") from None
    listener.listen(2048)
    return listener


def _announce(settings: Settings, sockets: list[socket.socket]) -> None:
    main, *admin = [f"http://{in_url(host)}:{port}" for host, port, *_ in (one.getsockname() for one in sockets)]
    log.info("serving %s on %s (docs at /docs)", settings.repository, main)
    for url in admin:
        log.info("admin side on %s", url)


def _take_all_descriptors() -> None:
    """Each connection holds one; the soft limit, often 1,024, is there for programs that call select(2), which none of ours does."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _log_to_stderr(level: str) -> None:
    log_to_stderr(level)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # who sent the form is told


def _loop_factory() -> Any:
    import uvloop

    return uvloop.new_event_loop


def _short(reason: str) -> str:
    """A reason as a label: few values."""
    return next((label for word, label in DEATHS if word in reason.lower()), "ended")
