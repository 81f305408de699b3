"""What comes out of files and requests is shown, and does nothing, on terminals and in logs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from app.cli import main

EVIL = "node \x1b]0;owned\x07\x9b31m\r\n2026-01-01 00:00:00,000 INFO    hone: all is well\u2028and more\u202e"


def test_an_entry_of_the_log_is_one_entry_and_moves_no_terminal() -> None:
    program = "import logging, sys; from app.plain import log_to_stderr; log_to_stderr('info'); log = logging.getLogger('hone')\n"
    program += "try: raise ValueError(sys.argv[1])\nexcept ValueError: log.exception('model %s', sys.argv[1])"
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", program, EVIL], capture_output=True, text=True, encoding="utf-8", check=True)
    entries = [line for line in done.stderr.splitlines() if not line.startswith("    ")]
    assert len(entries) == 1 and "ERROR   hone: model node" in entries[0]
    assert "    Traceback (most recent call last):" in done.stderr and "all is well" in done.stderr
    assert all(letter.isprintable() or letter == "\n" for letter in done.stderr)


def test_an_error_that_the_command_line_tells_moves_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", EVIL.replace("\r\n", ""), "out.packed"]) == 1
    told = capsys.readouterr().err
    assert "node  ]0;owned" in told
    assert all(letter.isprintable() or letter == "\n" for letter in told)
