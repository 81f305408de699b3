"""The fork server's own process: it imports what runners need, opens nothing, and forks a runner per order.

It holds no session and no thread of its own making, so its children start clean and share its pages. It ends when the server's end of
its socket closes; runners that live then are not touched.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
from typing import NoReturn

import orjson


def main(fd: int, *preload: str) -> NoReturn:
    """Import `preload`, then answer {"fork": n} with {"forked": n, "pid": p} and a pidfd, and say {"exited": p, "status": s} later."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open("/proc/self/comm", "w") as comm:
        comm.write("hone-forkserver")
    for name in preload:
        with contextlib.suppress(ImportError):
            __import__(name)
    gc.collect()
    gc.freeze()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _Nursery(socket.socket(fileno=fd)).run()
    os._exit(0)


class _Nursery:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._children: dict[int, int] = {}

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._sock:
                    message, fds, _, _ = socket.recv_fds(self._sock, 4096, 8)
                    if not message:
                        return
                    self._fork(orjson.loads(message)["fork"], fds)
                else:
                    self._reap(key.fd)

    def _fork(self, order: int, fds: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_runner(fds)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._selector.register(pidfd, selectors.EVENT_READ)
        for fd in fds:
            os.close(fd)
        socket.send_fds(self._sock, [orjson.dumps({"forked": order, "pid": pid})], [pidfd])

    def _become_runner(self, fds: list[int]) -> NoReturn:
        try:
            self._selector.close()
            self._sock.close()
            for pidfd in self._children:
                os.close(pidfd)
            from app.serving.runner import main as run

            run(*fds)
        except BaseException:  # noqa: BLE001 - the boundary of a process
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        os._exit(70)

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        report = orjson.dumps({"exited": pid, "status": os.waitstatus_to_exitcode(status)})
        with contextlib.suppress(BlockingIOError):
            self._sock.send(report, socket.MSG_DONTWAIT)
