"""`python -m benchmarks.gpu --out DIR`: all sections, raw JSON, a summary last."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.context import Context, write_json
from benchmarks.gpu.process import SectionProcess, measure, missing, read_part
from benchmarks.gpu.report import summary
from benchmarks.gpu.sections import BY_NAME, SECTIONS, Section

DESCRIPTION = """\
What the engine does on one GPU (H100, H200): whether kernels are right, memory across processes, attention on
blocks against contiguous KV, decode and prefill of whole models against ceilings measured in the same run,
prefill and decode on shares of the multiprocessors against time slicing, transformers' continuous batching as
a peer, memory per model, and the whole service. Random weights; no network; eight minutes.

Runs from a checkout with PYTHONPATH=services:gpu:proto:. and needs no installed package of ours. A section
whose modules are missing is skipped, and named. OUT/results.json is complete after each section and current
within a second; OUT/log.txt has what sections print. Each section is a process: one that fails or hangs is
recorded with its traceback, and the others go on.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results.json, summary.txt and log.txt")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (8)")
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument(
        "--only", default="", metavar="A,B", help=f"these sections beside environment, of {names}"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="shapes of a few hundred elements: finds faults, measures nothing"
    )
    parser.add_argument(
        "--inline", action="store_true", help="all sections in this process: none can be ended"
    )
    parser.add_argument("--render", type=Path, metavar="FILE", help="print the summary of a results.json")
    options = parser.parse_args(argv)
    unknown = [name for name in options.only.split(",") if name and name not in BY_NAME]
    if unknown:
        parser.error(f"--only: no section {', '.join(unknown)}; there are {names}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: kernels are interpreted, which only --tiny shapes bear")
    if not options.render and not options.out:
        parser.error("--out: where to?")
    return options


class Run:
    """What has been found, written to OUT whenever there is more of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._begun = time.monotonic()
        self._ends = self._begun + 60 * options.minutes
        wanted = options.only.split(",") if options.only else []
        wanted += ["environment"] if wanted else []  # what the others' figures are fractions of
        self.sections = [s for s in SECTIONS if (s.name in wanted if wanted else s.by_default)]
        self.results: dict[str, Any] = {
            "command": sys.argv[1:],
            "device": options.device,
            "tiny": options.tiny,
            "sections": {},
        }

    def save(self) -> None:
        self.results["seconds"] = time.monotonic() - self._begun
        write_json(self._options.out / "results.json", self.results)

    def enter(self, name: str, result: dict[str, Any]) -> None:
        """What a section has found, until now or at its end."""
        if self.results["sections"].get(name) != result:
            self.results["sections"][name] = result
            self.save()

    def earlier(self) -> dict[str, Any]:
        """What there is to go by for the next section."""
        return {name: each.get("found", {}) for name, each in self.results["sections"].items()}

    def allowed(self, section: Section) -> float:
        """Seconds for it: its part of what is left, by what was planned for it and for those after it."""
        rest = self.sections[self.sections.index(section) :]
        planned = sum(each.seconds for each in rest if not self.skipped(each))
        # What a section takes beyond its time, and to end, is the others' too.
        left: float = self._ends - time.monotonic() - 3 * len(rest)
        return max(1.0, left * section.seconds / planned)

    def skipped(self, section: Section) -> list[str]:
        return missing(section, self._options.device)

    def say(self, name: str, doing: str) -> None:
        """The progress line."""
        passed = int(time.monotonic() - self._begun)
        line = f"[{passed // 60}:{passed % 60:02}] {name}: {doing}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line[:110]}", end="", file=sys.stderr, flush=True)
        elif doing in ("begins", "ended") or doing.startswith(("skipped", "failed")):
            print(line, file=sys.stderr, flush=True)


def run_inline(run: Run, options: argparse.Namespace, folder: Path) -> None:
    """One after another, here."""
    for section in run.sections:
        if lacking := run.skipped(section):
            run.enter(section.name, {"skipped": lacking})
            continue

        def say(doing: str, name: str = section.name) -> None:
            run.say(name, doing)

        run.say(section.name, "begins")
        ends = time.monotonic() + run.allowed(section)
        part = folder / f"{section.name}.json"
        context = Context(options.device, options.tiny, ends, run.earlier(), part, say)
        run.enter(section.name, measure(section, context))


def run_processes(run: Run, options: argparse.Namespace, folder: Path, log: IO[str]) -> None:
    """Each in its own; while one measures, the next one imports what it needs."""
    for section in run.sections:
        if lacking := run.skipped(section):
            run.enter(section.name, {"skipped": lacking})
            run.say(section.name, f"skipped, for there is no {', '.join(lacking)}")
    wanted = [section for section in run.sections if not run.skipped(section)]
    started: dict[str, SectionProcess] = {}

    def start(number: int) -> None:
        if number < len(wanted):
            section = wanted[number]
            started[section.name] = SectionProcess(section, options.device, folder, log)

    try:
        start(0)
        for number, section in enumerate(wanted):
            process = started[section.name]
            run.say(section.name, "begins")
            process.begin(run.allowed(section), run.earlier(), options.tiny)
            start(number + 1)
            while not process.wait(0.5):
                part = read_part(process.part)
                run.enter(section.name, part)
                run.say(section.name, part.get("doing", ""))
            result = process.result()
            process.kill()  # what it has left running
            run.enter(section.name, result)
            run.say(section.name, "failed" if "error" in result else "ended")
    finally:
        for process in started.values():
            process.kill()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. 0 if no section failed."""
    options = parse(argv)
    if options.render:
        import json

        print(summary(json.loads(options.render.read_text())))
        return 0
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    run.save()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if not options.inline:
        signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory() as folder, (options.out / "log.txt").open("w") as log:
            if options.inline:
                run_inline(run, options, Path(folder))
            else:
                run_processes(run, options, Path(folder), log)
    except KeyboardInterrupt:
        run.results["cut_off"] = True
    except Exception:
        run.results["error"] = traceback.format_exc()
    run.save()
    text = summary(run.results)
    (options.out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}")
    failed = [name for name, each in run.results["sections"].items() if "error" in each]
    return 1 if failed or "error" in run.results else 0


if __name__ == "__main__":
    sys.exit(main())
