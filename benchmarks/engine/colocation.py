"""Two models that decode together against time-slicing, and what an idle third costs:
`python -m benchmarks.engine.colocation`.

Each model has a batch of its own. Alone: one long job. Together: leases by turns, of so many steps, as one
decode executor runs them. In theory nothing is lost: a token of either takes as long as it takes alone, so
that both together make 2 / (1/a + 1/b) tokens per second. Then the same with a third model loaded that nobody
asks.

A round measures each of these, in an order that changes from round to round, and gives ratios of its own; the
figures are medians over rounds. Sequences begin at a length and with a cache of zeros: what KV says costs
nothing. Rates are by the clock and by processor time, which tells where other programs use the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine import machine
from benchmarks.engine.unit import Served, Unit, layout_of, open_model, random_like
from muxserve.engine.checkpoint import Checkpoint
from muxserve.engine.messages import DecodeJob, DecodeRow, Sampling

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Options:
    """What to run."""

    model: Path | None = None
    """None: SmolLM2-135M-Instruct."""
    second: Path | None = None
    """None: random weights of the first one's shape."""
    rounds: int = 8
    batch: int = 16
    """Sequences of each model."""
    context: int = 128
    """Their length at the begin."""
    steps: int = 48
    """Of each model and measurement, a multiple of `lease`."""
    lease: int = 8
    threads: int = 2
    block_bytes: int = 16 * 2**10


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one measurement, all its tokens."""

    tokens: int
    wall_s: float
    cpu_s: float

    def rate(self, clock: str) -> float:
        """Tokens per second of that clock, "wall" or "cpu"."""
        return self.tokens / (self.wall_s if clock == "wall" else self.cpu_s)


class Stage:
    """Two models with their batches, ready to decode; a third comes and goes."""

    def __init__(self, options: Options) -> None:
        self._options = options
        first = open_model(options.model)
        second = open_model(options.second) if options.second else random_like(first, 1)
        self._third = random_like(first, 2)
        length = options.context + options.steps
        kinds = [(c, layout_of(c.spec, options.block_bytes)) for c in (first, second)]
        blocks = sum(options.batch * layout.spans(length) * layout.blocks_per_span for _, layout in kinds)
        self._unit = Unit(blocks, options.block_bytes, options.threads)
        self.models = [self._open(f"m{i}", checkpoint, length) for i, (checkpoint, _) in enumerate(kinds)]
        self._idle: Served | None = None

    def _open(self, name: str, checkpoint: Checkpoint, length: int) -> Served:
        served = self._unit.add(name, checkpoint, self._options.batch, length)
        for number in range(self._options.batch):
            slot = served.tables.acquire(number)
            served.tables.assign(slot, 0, self._unit.pool.allocate(name, served.layout.spans(length)))
            served.tables.tokens[slot] = range(100 + slot, 100 + slot + length)
        return served

    def idle(self, there: bool) -> None:
        """Have the third model, or not."""
        if there and self._idle is None:
            self._idle = self._unit.add("idle", self._third, self._options.batch, self._options.context)
        elif not there and self._idle is not None:
            self._unit.remove(self._idle)
            self._idle = None

    def alone(self, served: Served) -> Cost:
        """One model, one job."""
        return self._measure(lambda: self._job(served, 0, self._options.steps), 1)

    def together(self) -> Cost:
        """Both, in leases by turns."""

        def turns() -> None:
            for done in range(0, self._options.steps, self._options.lease):
                for served in self.models:
                    self._job(served, done, self._options.lease)

        return self._measure(turns, len(self.models))

    def _measure(self, work: Callable[[], None], models: int) -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        tokens = models * self._options.steps * self._options.batch
        return Cost(tokens, time.perf_counter() - wall, time.process_time() - cpu)

    def _job(self, served: Served, done: int, steps: int) -> None:
        """So many steps of its batch, after `done` of them."""
        length = self._options.context + done
        limit = self._options.context + self._options.steps + 1
        rows = tuple(DecodeRow(slot, length, limit, GREEDY) for slot in range(self._options.batch))
        for step in self._unit.runner.run(DecodeJob(0, served.name, rows, steps, self._options.threads)):
            if step.failed:
                raise AssertionError(f"logits of slots {step.failed} of {served.name} are not finite")

    def close(self) -> None:
        self._unit.close()


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    environment = machine.describe()
    stage = Stage(options)
    others = machine.Others([psutil.Process().pid])
    rounds: list[dict[str, Cost]] = []
    try:
        stage.together()  # the first pass of all touches memory that later ones find touched
        rounds.extend(_round(stage, number) for number in range(options.rounds))
    finally:
        stage.close()
    clocks = ("wall", "cpu")
    return {
        "environment": environment,
        "options": {
            **asdict(options),
            "model": str(options.model or "SmolLM2-135M-Instruct"),
            "second": str(options.second or "random weights of that shape"),
        },
        "others_cores": others.cores(),
        "tokens_per_s": {
            name: {clock: statistics.median(one[name].rate(clock) for one in rounds) for clock in clocks}
            for name in rounds[0]
        },
        "together_over_theory": {clock: _over_rounds(rounds, clock, _over_theory) for clock in clocks},
        "idle_third_over_none": {clock: _over_rounds(rounds, clock, _over_none) for clock in clocks},
        "rounds": [{name: asdict(cost) for name, cost in one.items()} for one in rounds],
    }


def _round(stage: Stage, number: int) -> dict[str, Cost]:
    """All measurements once; every second round the other way round."""
    first, second = stage.models

    def with_third(there: bool) -> Callable[[], Cost]:
        def measure() -> Cost:
            stage.idle(there)
            return stage.together()

        return measure

    plan: list[tuple[str, Callable[[], Cost]]] = [
        ("first", lambda: stage.alone(first)),
        ("together", with_third(False)),
        ("together_idle", with_third(True)),
        ("together_idle_again", with_third(True)),
        ("together_again", with_third(False)),
        ("second", lambda: stage.alone(second)),
    ]
    return {name: measure() for name, measure in (plan if number % 2 else plan[::-1])}


def _over_theory(one: dict[str, Cost], clock: str) -> float:
    theory = 2 / (1 / one["first"].rate(clock) + 1 / one["second"].rate(clock))
    return _mean(one, clock, "together", "together_again") / theory


def _over_none(one: dict[str, Cost], clock: str) -> float:
    idle = _mean(one, clock, "together_idle", "together_idle_again")
    return idle / _mean(one, clock, "together", "together_again")


def _mean(one: dict[str, Cost], clock: str, *names: str) -> float:
    return statistics.fmean(one[name].rate(clock) for name in names)


def _over_rounds(
    rounds: list[dict[str, Cost]], clock: str, ratio: Callable[[dict[str, Cost], str], float]
) -> dict[str, float]:
    """Above 1 is faster."""
    ratios = [ratio(one, clock) for one in rounds]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main(argv: list[str] | None = None) -> None:
    """Prints the JSON, without single rounds."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.colocation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="model directory or GGUF file")
    parser.add_argument(
        "--second", type=Path, help="the other model; else random weights of the first's shape"
    )
    for name in ("rounds", "batch", "context", "steps", "lease", "block_bytes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Options, name))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="raw results, as JSON")
    chosen = vars(parser.parse_args(argv))
    out = chosen.pop("out")
    found = run(Options(**chosen))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    del found["rounds"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
