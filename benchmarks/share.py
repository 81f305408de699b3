"""`python -m benchmarks.share [--seconds N] [--docs]`: what a candidate that is the incumbent's very file seems to cost beside it.

Two processes with one file. Calls come by a clock; a twentieth of them go to the second process, each by itself or in runs (app.serving.slot.Share),
and the sensor and the canary's judge say what that costs. Anything but the same is a bias of the trial, not of the file.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from app.catalog.model_config import ModelConfig
from app.control.rollout import compared
from app.domain import ModelView, Observation, RuntimeSettings
from app.serving.slot import Share
from app.telemetry.window import Window
from benchmarks import models, report
from benchmarks.kept import Kept, head

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "loop.md"
SHARE: Final = 0.05
RATES: Final = (200.0, 40.0)
LARGE_MB: Final = 48
CONFIG: Final = ModelConfig.model_validate({"task": "classification"})
INCUMBENT, CANDIDATE = "1", "1.1"
VIEW: Final = ModelView("m", INCUMBENT, 1, RuntimeSettings(), True, 0, 0, (INCUMBENT, CANDIDATE), 0.0)
Pick = Callable[[float], bool]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.share", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of each kind of traffic (30)")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/loop.md")
    arguments = parser.parse_args(argv)
    kept = Kept(None)
    with tempfile.TemporaryDirectory(prefix="hone-share-") as name:
        for model in (models.demo(Path(name)), models.heavy(Path(name), "large", LARGE_MB)):
            for rate in RATES:
                alone = _driven(model, rate, arguments.seconds, _each_by_itself())
                runs = _driven(model, rate, arguments.seconds, _in_runs())
                print(kept.add("share", {"row": [model.name, f"{rate:g}", *alone, *runs]}), flush=True)
    columns = [
        "model", "calls a second", "each twentieth, by the medians of all calls", "and as it is judged", "in runs, by the medians of all calls", "and as it is judged",
    ]  # fmt: skip
    found = kept.of("share")
    text = f"{head(found, f'python -m benchmarks.share --seconds {arguments.seconds:g}')}\n\n{report.table(columns, [one['row'] for one in found])}"
    print(text)
    if arguments.docs:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), "share", lambda: text))
    return 0


def _each_by_itself() -> Pick:
    turns = itertools.count()
    return lambda now: next(turns) % round(1 / SHARE) == 0


def _in_runs() -> Pick:
    whose: Any = None  # nobody is asked here
    share = Share(whose, SHARE, "canary")
    return lambda now: share.takes(None, now)


def _driven(model: models.BenchModel, rate: float, seconds: float, pick: Pick) -> tuple[str, str]:
    """(the candidate's median CPU time over the incumbent's, what the judge says of it)."""
    window = Window()
    arms = {version: _Arm(model) for version in (INCUMBENT, CANDIDATE)}
    took: dict[str, list[float]] = {version: [] for version in arms}
    due = time.monotonic()
    for _ in range(round(rate * seconds)):
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))
        version = CANDIDATE if pick(time.monotonic()) else INCUMBENT
        cpu_s, wall_s = arms[version].call()
        took[version].append(cpu_s)
        window.called("m", version, 1, 4 * int(model.rows(1).size), wall_s, cpu_s, 0.0)
        window.observe(Observation("m", version, 200, wall_s, 0.0, 0.0, wall_s, 0.0, 1, 1, cpu_s, 0.0))
    for arm in arms.values():
        arm.end()
    ratio = statistics.median(took[CANDIDATE]) / statistics.median(took[INCUMBENT])
    judged = compared(window, "m", INCUMBENT, CANDIDATE, (0.0, 0.0), VIEW, CONFIG, 0)
    cpu = judged.numbers["cpu_ratio"]
    return f"× {ratio:.2f}", f"{judged.verdict.value}, × {cpu['estimate']:.2f} [{cpu['low']:.2f}, {cpu['high']:.2f}]"


class _Arm:
    """A process that runs one row each time it is asked, on one thread that does not spin."""

    def __init__(self, model: models.BenchModel) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, model), daemon=True)
        self._process.start()
        for _ in range(20):
            self.call()

    def call(self) -> tuple[float, float]:
        """(CPU seconds, wall seconds)."""
        self._ours.send(True)
        found: tuple[float, float] = self._ours.recv()
        return found

    def end(self) -> None:
        self._ours.send(False)
        self._process.join()


def _answer(asked: Connection, model: models.BenchModel) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
    row = {model.input: model.rows(1)}
    while asked.recv():
        wall, cpu = time.monotonic(), time.process_time()
        session.run([model.output], row)
        asked.send((time.process_time() - cpu, time.monotonic() - wall))


if __name__ == "__main__":
    sys.exit(main())
