"""What all tests share: `needs(program)` leaves a test out where a program is missing, says so at the end, and fails with CI=true."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Iterator

import pytest

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
DEBIAN_PACKAGES = {"redis-server": "redis-server", "redis-cli": "redis-tools", "promtool": "prometheus"}
PYTHON_PACKAGES = {"torch"}

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as app.cli does: no test reports to ONNX Runtime's vendor, or writes to HOME


LONGEST = (
    "test_jobs.py", "test_swap_faults.py", "test_optimize_demo.py", "test_traffic.py", "test_ending.py", "test_pruning.py",
    "test_torch_jobs.py", "test_faults.py", "test_benchmarks.py", "test_schema.py", "test_loop.py",
)  # fmt: skip
"""They go first: the last one would run for minutes beside an idle process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def is_missing(program: str) -> bool:
    if program in PYTHON_PACKAGES:
        return importlib.util.find_spec(program) is None
    return shutil.which(program, path=SEARCH_PATH) is None


def remedy(program: str) -> str:
    if program in PYTHON_PACKAGES:
        return "pip install -c constraints.txt '.[optimize]'"
    return f"apt-get install {DEBIAN_PACKAGES.get(program, program)}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for program in filter(is_missing, mark.args):
            if os.environ.get("CI") == "true":
                pytest.fail(f"CI=true, and {program} is missing: {remedy(program)}", pytrace=False)
            pytest.skip(f"needs {program}: {remedy(program)}")


@pytest.fixture(autouse=True)
def without_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """HONE_ variables of the shell that runs the tests must not change what they see."""
    for name in [name for name in os.environ if name.startswith("HONE_")]:
        monkeypatch.delenv(name)
    yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tests run in several processes; their reports come together here."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    left_out = Counter(reason.partition("needs ")[2].partition(":")[0] for reason in reasons if "needs " in reason)
    for program, count in left_out.items():
        terminalreporter.write_line(f"LEFT OUT: {count} tests need {program}; to have it: {remedy(program)}", yellow=True)
