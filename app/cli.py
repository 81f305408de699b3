"""The command `hone`: reads the arguments, runs one sub-command, and turns every failure into one line and an exit status.

It imports nothing heavy at the top: the fork server's children import the main module again.
Exit status: 0 done, 1 refused or failed, 2 wrong arguments, 3 a job ended without a version that serves or may serve, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

Command: TypeAlias = Callable[[argparse.Namespace], int]
Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXAMPLES: Final = """\
start:
  hone demo                                    a server with a model that reads digits, and a worker
  hone serve --repository models --port 8000   serve a folder: models/NAME/1/model.onnx
  hone worker                                  what builds better versions (same --state as the server)

use:
  hone deploy resnet.onnx --name resnet        hand a model to a running server
  hone infer digits digit.png                  one answer
  hone optimize digits --with int8-static,tune --wait
  hone status                                  what serves, and how
  hone rollback digits                         back to the version before

Each sub-command has its own --help. Settings of server and worker: HONE_… variables, listed in the README.
"""
SERVER_FLAGS: Final = (
    ("repository", "FOLDER", "models in Triton's layout: NAME/1/model.onnx (HONE_REPOSITORY, models)"),
    ("state", "FOLDER", "what Hone itself writes (HONE_STATE, .hone)"),
    ("store", "URL", "redis://… for several hosts; SQLite in the state folder otherwise (HONE_STORE)"),
    ("host", "HOST", "address to listen on (HONE_HOST, 127.0.0.1)"),
    ("port", "PORT", "port of inference, admin and metrics (HONE_PORT, 8000)"),
    ("admin-port", "PORT", "a port of its own for the admin side (HONE_ADMIN_PORT)"),
    ("cores", "N", "cores for models; default: affinity and cgroup quota (HONE_CORES)"),
    ("log-level", "LEVEL", "debug, info, warning or error (HONE_LOG_LEVEL, info)"),
)
MOST_TIMEOUT_S: Final = 86_400
MOST_EVENTS: Final = 1000
WORKER_FLAGS: Final = frozenset({"repository", "state", "store", "log-level"})


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of another encoding shows what it cannot write as \uXXXX
    top = parser()
    arguments = top.parse_args(_command_first(top, sys.argv[1:] if argv is None else argv))
    os.environ.setdefault(
        "ORT_DISABLE_TELEMETRY", "1"
    )  # ONNX Runtime reports to its vendor and writes to HOME otherwise; children inherit it
    command: Command = arguments.run
    try:
        return command(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has left
        return 1
    except Exception as error:
        if not _is_told(error):
            raise
        from app.plain import clean_lines

        print(clean_lines(f"hone: {_told(error)}"), file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hone",
        description="A model server that keeps its models sharp: serves, rebuilds, proves and swaps them under load.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_processes(commands)
    _add_reading(commands)
    _add_models(commands)
    _add_versions(commands)
    _add_jobs(commands)
    _add_local(commands)
    return top


def _command_first(top: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """`hone --url URL status` as `hone status --url URL`: argparse would take the URL for the command."""
    commands = next(action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction)).values()
    takes_value = {option: action.nargs != 0 for command in commands for action in command._actions for option in action.option_strings}
    at = 0
    while at < len(argv) and (option := argv[at].partition("=")[0]) in takes_value.keys() - top._option_string_actions.keys():
        at += 2 if takes_value[option] and "=" not in argv[at] else 1
    return [*argv[at : at + 1], *argv[:at], *argv[at + 1 :]] if at < len(argv) else []


def _add_processes(commands: Parsers) -> None:
    serve = _here(commands, "serve", "serve a folder of models", "hone serve --repository models --host 0.0.0.0 --port 8000")
    worker = _here(commands, "worker", "claim jobs and build versions", "hone worker --state .hone")
    for name, placeholder, text in SERVER_FLAGS:
        kind = int if name in ("port", "admin-port", "cores") else str
        serve.add_argument(f"--{name}", metavar=placeholder, type=kind, help=text)
        if name in WORKER_FLAGS:
            worker.add_argument(f"--{name}", metavar=placeholder, help=text)
    worker.add_argument("--port", metavar="PORT", type=int, dest="worker_port", help="port of the worker's own /metrics (HONE_WORKER_PORT)")
    demo = _here(
        commands, "demo", "a server, a worker and a model that reads digits", "hone demo", "HONE_PORT=9000 hone demo", "hone demo --break version"
    )  # fmt: skip
    for name, placeholder, text in SERVER_FLAGS:
        if name in ("state", "host", "port"):
            demo.add_argument(f"--{name}", metavar=placeholder, type=int if name == "port" else str, help=text)
    demo.add_argument(
        "--break",
        dest="cause",
        default="",
        metavar="CAUSE",
        help="inject a real fault into the running demo (or one started for it) and follow the loop: "
        "load, host, quota, process, settings, version, wrong, input, larger, leak, crash",
    )


def _add_local(commands: Parsers) -> None:
    methods = _here(
        commands, "methods", "what can be done to a model, or one method with its options", "hone methods", "hone methods int8-static"
    )
    methods.add_argument("method", nargs="?", metavar="METHOD", help="one in full; default: all that this installation knows")
    methods.add_argument("--json", action="store_true", help="JSON for programs instead of text for people")
    backup = _here(
        commands, "backup", "write journal, cards, built versions and models to one file", "hone backup hone.tar", "hone backup hone.tar --state /var/lib/hone --repository /srv/models"
    )  # fmt: skip
    restore = _here(
        commands, "restore", "bring a backup back: its state counts from now on, with the loop frozen until hone unfreeze", "hone restore hone.tar", "hone restore hone.tar --store redis://10.0.0.5:6379/0",
    )  # fmt: skip
    restore.add_argument(
        "--overwrite", action="store_true", help="also replace files that differ; else they are named and nothing is changed"
    )
    for command in (backup, restore):
        command.add_argument("file", metavar="FILE", help="a tar file; captured inputs and tokens are never in it")
        for name, placeholder, text in SERVER_FLAGS:
            if name in ("repository", "state", "store"):
                command.add_argument(f"--{name}", metavar=placeholder, help=text)
        command.add_argument("--json", action="store_true", help="JSON for programs instead of text for people")
    pack = _here(
        commands, "pack", "write the packed form of an ONNX file: entropy-coded weights, the very file back", "hone pack .hone/models/digits/1.2/model.onnx models/digits/1/model.onnx.packed",
    )  # fmt: skip
    pack.add_argument("source", metavar="MODEL.onnx", help="one file, without external data")
    pack.add_argument("target", metavar="FILE", help="as NAME/1/model.onnx.packed in a repository it is unpacked once and served")


def _add_reading(commands: Parsers) -> None:
    status = _asking(
        commands, "status", "what serves, and how", "status", "hone status", "hone status digits", "hone status --health && echo ready"
    )
    status.add_argument("model", nargs="?", metavar="MODEL", help="one model in full")
    status.add_argument(
        "--health",
        nargs="?",
        const="ready",
        choices=("ready", "live"),
        help="for health checks: exit 0 when the server is ready (default) or live; needs no token",
    )
    versions = _asking(commands, "versions", "the lineage of a model, with fidelity and speed", "versions", "hone versions digits")
    versions.add_argument("model", metavar="MODEL")
    explain = _asking(commands, "explain", "why this version is live: lineage, evidence, verdicts", "explain", "hone explain digits")
    explain.add_argument("model", metavar="MODEL")
    timeline = _asking(
        commands, "timeline", "what happened, and why", "timeline", "hone timeline", "hone timeline digits -n 20", "hone timeline -f"
    )
    timeline.add_argument("model", nargs="?", default="", metavar="MODEL")
    timeline.add_argument("-f", "--follow", action="store_true", help="go on with events as they happen, until Ctrl-C")
    timeline.add_argument("-n", "--limit", type=_events, default=50, metavar="N", help="the newest N events (50)")
    infer = _asking(
        commands,
        "infer",
        "one answer of a model",
        "infer",
        "hone infer digits digit.png",
        "hone infer digits:1.1 digit.png",
        "hone infer digits request.json",
        """echo '{"image": [[[...]]]}' | hone infer digits -""",
    )
    infer.add_argument("model", metavar="MODEL[:VERSION]", help="a version: one that is loaded; default: the active one")
    infer.add_argument(
        "file", metavar="FILE", help="a PNG or JPEG, a .txt, a .json (friendly, or a protocol request with `inputs`), or - for stdin"
    )


def _add_models(commands: Parsers) -> None:
    deploy = _asking(
        commands,
        "deploy",
        "hand a model to a running server",
        "deploy",
        "hone deploy resnet.onnx --name resnet",
        "hone deploy models/resnet            # a folder with model.yaml and 1/model.onnx",
    )
    deploy.add_argument(
        "path", metavar="PATH", help="an .onnx file (its external data beside it), a packed one (hone pack), or a model's folder"
    )
    deploy.add_argument("--name", metavar="NAME", help="name to serve it under; default: the file's or folder's")
    deploy.add_argument("--config", metavar="FILE", help="its model.yaml; default: the folder's")
    remove = _asking(
        commands, "remove", "remove a model, or the weights of a built version", "remove", "hone remove digits:1.2", "hone remove digits"
    )
    remove.add_argument("model", metavar="MODEL[:VERSION]", help="never the golden or the active version")
    settings = _asking(
        commands,
        "settings",
        "show run-time settings, or change them on the live server: a new generation, undone by rollback",
        "settings",
        "hone settings digits",
        "hone settings digits batch_limit=16 instances=2",
    )
    settings.add_argument("model", metavar="MODEL")
    settings.add_argument(
        "changes",
        nargs="*",
        metavar="NAME=VALUE",
        help="batch_limit, instances, queue_limit, intra_op_threads, spin_duration_us, lone_threads (whole numbers)",
    )
    mode = _asking(commands, "mode", "how far the loop may go by itself", "mode", "hone mode digits approve")
    mode.add_argument("model", metavar="MODEL")
    mode.add_argument("mode", choices=("auto", "approve", "observe"))
    ladder = _asking(
        commands, "ladder", "show or set which versions may answer in a model's place under load", "ladder", "hone ladder digits",
        "hone ladder digits 1.2", "hone ladder digits none",
    )  # fmt: skip
    ladder.add_argument("model", metavar="MODEL")
    ladder.add_argument("rungs", nargs="*", metavar="VERSION", help="the best first; none: nobody; without any, the present ones are shown")
    capture = _asking(commands, "capture", "delete a model's captured inputs", "capture", "hone capture digits --clear")
    capture.add_argument("model", metavar="MODEL")
    capture.add_argument("--clear", action="store_true", required=True, help="delete them")
    _asking(commands, "freeze", "stop all change (rollback stays possible)", "freeze", "hone freeze")
    _asking(commands, "unfreeze", "allow change again", "unfreeze", "hone unfreeze")


def _add_versions(commands: Parsers) -> None:
    promote = _asking(
        commands, "promote", "let a proven version take over", "promote", "hone promote digits 1.2", "hone promote digits:1.2"
    )
    promote.add_argument("model", metavar="MODEL[:VERSION]")
    promote.add_argument("version", nargs="?", metavar="VERSION")
    promote.add_argument("--force", action="store_true", help="even without a proof on this class of host")
    rollback = _asking(commands, "rollback", "undo the last change of version or settings, at once", "rollback", "hone rollback digits")
    rollback.add_argument("model", metavar="MODEL")
    verify = _asking(
        commands,
        "verify",
        "prove a version on this class of host, against golden",
        "verify",
        "hone verify digits",
        "hone verify digits:1.2",
        "/opt/new/bin/hone verify digits:1.2 --here    (before the server is moved to the new installation)",
    )
    verify.add_argument("model", metavar="MODEL[:VERSION]")
    verify.add_argument(
        "--here",
        action="store_true",
        help="in this process and with this installation, not on the server: a proof ahead of a runtime upgrade (same --state and --repository); "
        "exit 0 if it passed, else 1",
    )
    verify.add_argument("--repository", metavar="FOLDER", help="with --here: the server's models (HONE_REPOSITORY, models)")
    load = _asking(commands, "load", "keep a version loaded, so that it answers by its number", "load", "hone load digits:1.1")
    load.add_argument("model", metavar="MODEL:VERSION")
    for command in (promote, rollback, verify):
        command.add_argument("--reason", default="asked for", metavar="TEXT", help="stands in the timeline")


def _add_jobs(commands: Parsers) -> None:
    optimize = _asking(
        commands,
        "optimize",
        "ask for a better version",
        "optimize",
        "hone optimize digits --wait                         # the server's own choice",
        "hone optimize digits --with graph,int8-static",
        "hone optimize digits --try int8-static --try graph,tune --promote manual",
        "hone optimize digits --with 'int8-static(calibration=entropy)' --wait",
        "hone optimize digits --with int8-static --for avx2",
    )
    optimize.add_argument("model", metavar="MODEL")
    optimize.add_argument(
        "--with", dest="recipe", metavar="A,B", help="methods in order (hone methods lists them); options in brackets: name(option=value,…)"
    )
    optimize.add_argument(
        "--try", dest="tries", action="append", metavar="A,B", help="an alternative to --with; may be given several times"
    )
    optimize.add_argument(
        "--promote", choices=("auto", "manual"), default="auto", help="auto (default): a proven gain takes over by itself"
    )
    optimize.add_argument(
        "--for",
        dest="target",
        default="",
        metavar="CLASS",
        help="build for another class of hosts (avx2, avx512, vnni, …); unproven there until hone verify runs on one",
    )
    optimize.add_argument("--reason", default="asked for", metavar="TEXT", help="stands in the timeline")
    optimize.add_argument(
        "--wait", action="store_true", help="show progress until the job ends; exit 0 if its version serves or may, else 3"
    )
    jobs = _asking(commands, "jobs", "jobs, or one in full", "jobs", "hone jobs", "hone jobs digits-1f3a9c2e")
    jobs.add_argument("job", nargs="?", metavar="JOB")
    jobs.add_argument("--open", action="store_true", help="only those that are not finished")
    cancel = _asking(commands, "cancel", "cancel a job", "cancel", "hone cancel digits-1f3a9c2e")
    cancel.add_argument("job", metavar="JOB")


def _command(commands: Parsers, name: str, text: str, run: Command, *examples: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _here(commands: Parsers, name: str, text: str, *examples: str) -> argparse.ArgumentParser:
    """A sub-command that does its work itself."""

    def run(arguments: argparse.Namespace) -> int:
        from app import local_actions

        perform: Command = getattr(local_actions, name)
        return perform(arguments)

    return _command(commands, name, text, run, *examples)


def _asking(commands: Parsers, name: str, text: str, action: str, *examples: str) -> argparse.ArgumentParser:
    """A sub-command that asks a running server."""

    def run(arguments: argparse.Namespace) -> int:
        from app import actions

        perform: Command = getattr(actions, action)
        return perform(arguments)

    command = _command(commands, name, text, run, *examples)
    server = command.add_argument_group("the server")
    server.add_argument("--url", metavar="URL", help="where it is (HONE_URL, else http://HONE_HOST:HONE_PORT, 127.0.0.1:8000)")
    server.add_argument("--token", metavar="TOKEN", help="admin token (HONE_TOKEN, HONE_ADMIN_TOKEN, else STATE/admin-token)")
    server.add_argument("--state", metavar="FOLDER", help="the server's state folder, for its token (HONE_STATE, .hone)")
    server.add_argument("--timeout", metavar="SECONDS", type=_seconds, help="how long to wait for an answer (180; health checks 5)")
    command.add_argument("--json", action="store_true", help="JSON for programs instead of text for people")
    return command


def _seconds(text: str) -> float:
    """How long to wait, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 < seconds <= MOST_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"{text} must lie above 0, and be at most {MOST_TIMEOUT_S}")
    return seconds


def _events(text: str) -> int:
    """How many events to show, for argparse."""
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MOST_EVENTS):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MOST_EVENTS}")
    return int(text)


def _is_told(error: Exception) -> bool:
    """Errors whose text is meant for the person at the terminal; anything else is a mistake of ours and keeps its traceback."""
    from app.errors import HoneError

    if isinstance(error, HoneError | OSError):
        return True
    client = sys.modules.get("app.client")
    return client is not None and isinstance(error, client.ClientError)


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        print(f"hone {importlib.metadata.version('hone-server')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
