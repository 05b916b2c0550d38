"""Processes beside a test's own, which run a few lines of Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def start(code: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    """A process that runs `code`, whose sys.argv[1:] are `arguments`. It may import from `tests`."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)  # type: ignore[call-overload]


def run(code: str, *arguments: str) -> None:
    """Run `code` to its end, which has to be a good one."""
    process = start(code, *arguments)
    assert process.wait(timeout=120) == 0
