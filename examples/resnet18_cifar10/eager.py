"""PyTorch eager as an arm of a paired comparison: the module in a process of its own, one thread, as `optimizers.arm` has ONNX files.

The process: python -m examples.resnet18_cifar10.eager FD FILE.py:FUNCTION WEIGHTS
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from optimizers.arm import Opened, Worker
from optimizers.artifact import Source
from optimizers.measure import Arm
from optimizers.session import Feeds, Settings


class EagerArm(Arm):
    """The parent's side. The module takes its inputs in the order of the feeds and gives one tensor."""

    def __init__(self, factory: str, weights: Path) -> None:
        self.path, self.settings, self.idle_s, self.longest_s = weights, Settings(), 60.0, 600.0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self._keys = {}
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), factory, str(weights)],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors,
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        self.opened = self.ask("opened")


class EagerWorker(Worker):
    """The child's side: keeps inputs and times itself as any arm, but runs PyTorch."""

    def __init__(self, factory: str, weights: Path) -> None:
        import torch

        from optimizers.torch_source import load_module

        torch.set_num_threads(1)
        super().__init__()
        self._torch, self._module = torch, load_module(Source(factory, weights))

    def opened(self) -> Opened:
        return Opened((), (), 0.0)

    def _run(self, feeds: Feeds) -> list[Any]:
        with self._torch.inference_mode():
            return [self._module(*map(self._torch.from_numpy, feeds.values()))]


def serve(connection: Connection, worker: EagerWorker) -> None:
    """Answer requests (name, arguments) until the other side closes."""
    actions: dict[str, Callable[..., Any]] = {name: getattr(worker, name) for name in ("opened", "pin", "keep", "time")}
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        connection.send((True, actions[name](*arguments)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), EagerWorker(sys.argv[2], Path(sys.argv[3])))
    os._exit(0)
