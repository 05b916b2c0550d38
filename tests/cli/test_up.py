"""`muxserve up` as a process: it looks after its children, and takes them along whichever way it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.model_factory import make_model

MUXSERVE = str(Path(sys.executable).with_name("muxserve"))
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("models") / "tiny", head_dim=64, heads=4, kv_heads=2)


class Up:
    """A running `muxserve up` with one small model."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.ready_file = folder / "ready.json"
        self.log = folder / "up.log"
        command = [
            MUXSERVE,
            "up",
            "--model",
            f"a={model}",
            "--arena",
            "8MiB",
            "--port",
            "0",
            "--admin-port",
            "0",
        ]
        command += ["--ready-file", str(self.ready_file), "--run-dir", str(folder / "run")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ready(self) -> dict[str, Any]:
        deadline = time.monotonic() + 90
        while not self.ready_file.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return dict(json.loads(self.ready_file.read_text()))

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> int:
        """Send a signal; the exit code. Nothing of the family may be left then."""
        family = self.family()
        assert len(family) >= 7
        self.process.send_signal(number)
        code = self.process.wait(20)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
        return code


@pytest.fixture
def up(tmp_path: Path, model: Path) -> Iterator[Up]:
    running = Up(tmp_path, model)
    yield running
    running.process.kill()
    running.process.wait()


def test_sigint_stops_everything_and_is_no_failure(up: Up) -> None:
    up.ready()
    began = time.monotonic()
    assert up.end(signal.SIGINT) == 0
    assert time.monotonic() - began < 10
    assert not up.ready_file.exists()
    assert not (up.ready_file.parent / "run" / "redis").exists()


def test_killing_up_leaves_no_process(up: Up) -> None:
    up.ready()
    assert up.end(signal.SIGKILL) == -signal.SIGKILL


def test_killed_services_come_back_under_their_addresses(up: Up) -> None:
    before, victims = up.ready(), ("gateway-0", "placement-0", "redis")
    for name in victims:
        os.kill(before["services"][name]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(up.ready()["services"][n]["pid"] in (0, before["services"][n]["pid"]) for n in victims):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    after = up.ready()
    assert all(after["services"][n]["address"] == before["services"][n]["address"] for n in victims)
    environment = {**os.environ, "MUXSERVE_ADDRESS": after["gateway"], "MUXSERVE_ADMIN": after["admin"]}
    generate = [MUXSERVE, "generate", "-m", "a", "--max-tokens", "2", "--timeout", "60", "-"]
    while subprocess.run(generate, input=b"hi", capture_output=True, env=environment).returncode != 0:
        assert time.monotonic() < deadline
    assert up.end(signal.SIGTERM) == 0


def test_a_signal_while_it_starts_stops_it(up: Up) -> None:
    deadline = time.monotonic() + 30
    while len(up.family()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = up.family()
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(20) == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
