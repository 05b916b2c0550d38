"""Two models that decode together against time-slicing, and what an idle third costs:
`python -m benchmarks.engine.colocation`.

Each model has a batch of its own. Alone: one long job. Together: leases by turns, of so many steps, as one
decode executor runs them. In theory nothing is lost: a token of either takes as long as it takes alone, so
that both together make 2 / (1/a + 1/b) tokens per second. Then the same with a third model loaded that nobody
asks.

A round measures each of these, in an order that changes from round to round. The median of a model's leases
in a measurement counts (alone, of as many steps of the long job), each from the end of the one before. Every
round has its own ratios; the figures are medians over rounds, for other programs may use the same cores. By
the clock, and by processor time. Sequences begin at a length and with a cache of zeros: what KV says costs
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.engine import machine
from benchmarks.engine.unit import Served, Unit, layout_of, load, open_model, random_like
from muxserve.engine.checkpoint import Checkpoint
from muxserve.engine.messages import DecodeJob, DecodeRow, Sampling

GREEDY = Sampling(temperature=0.0)
Clock = Literal["wall", "cpu"]
CLOCKS: tuple[Clock, ...] = ("wall", "cpu")
Leases = dict[str, list[dict[Clock, float]]]
"""Of one measurement, by model: seconds of each of its leases."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    model: Path | None = None
    """None: SmolLM2-135M-Instruct."""
    second: Path | None = None
    """None: random weights of the first one's shape."""
    rounds: int = 10
    batch: int = 16
    """Sequences of each model."""
    context: int = 128
    """Their length at the begin."""
    steps: int = 48
    """Of each model and measurement, a multiple of `lease`."""
    lease: int = 8
    threads: int = 2
    block_bytes: int = 16 * 2**10


def _now() -> dict[Clock, float]:
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


class Stage:
    """Two models with their batches, ready to decode; a third comes and goes."""

    def __init__(self, options: Options) -> None:
        self._options = options
        first = open_model(options.model)
        second = open_model(options.second) if options.second else random_like(first, 1)
        length = options.context + options.steps
        kinds = [(c, layout_of(c.spec, options.block_bytes)) for c in (first, second)]
        blocks = sum(options.batch * layout.spans(length) * layout.blocks_per_span for _, layout in kinds)
        self._unit = Unit(blocks, options.block_bytes, options.threads)
        self.models = [self._open(f"m{i}", checkpoint, length) for i, (checkpoint, _) in enumerate(kinds)]
        self._third = random_like(first, 2)
        self._third_weights = load(self._third)
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
            batch, context, weights = self._options.batch, self._options.context, self._third_weights
            self._idle = self._unit.add("idle", self._third, batch, context, weights)
        elif not there and self._idle is not None:
            self._unit.remove(self._idle)
            self._idle = None

    def alone(self, served: Served) -> Leases:
        """One model, one job."""
        times: Leases = {served.name: []}
        last = _now()
        for step in self._job(served, 0, self._options.steps):
            if step % self._options.lease == 0:
                last = _count(times, served, last)
        return times

    def together(self) -> Leases:
        """Both, in leases by turns."""
        times: Leases = {served.name: [] for served in self.models}
        last = _now()
        for done in range(0, self._options.steps, self._options.lease):
            for served in self.models:
                for _ in self._job(served, done, self._options.lease):
                    pass
                last = _count(times, served, last)
        return times

    def _job(self, served: Served, done: int, steps: int) -> Iterator[int]:
        """So many steps of its batch, after `done` of them; how many there have been."""
        length = self._options.context + done
        limit = self._options.context + self._options.steps + 1
        rows = tuple(DecodeRow(slot, length, limit, GREEDY) for slot in range(self._options.batch))
        job = DecodeJob(0, served.name, rows, steps)
        for number, step in enumerate(self._unit.runner.run(job), start=1):
            if step.failed:
                raise AssertionError(f"logits of slots {step.failed} of {served.name} are not finite")
            yield number

    def close(self) -> None:
        os.close(self._third_weights)
        self._unit.close()


def _count(times: Leases, served: Served, last: dict[Clock, float]) -> dict[Clock, float]:
    """Enter what has passed since `last` as a lease of that model; the time now."""
    now = _now()
    times[served.name].append({clock: now[clock] - last[clock] for clock in CLOCKS})
    return now


@dataclass(frozen=True, slots=True)
class Round:
    """All measurements, once; of `together` twice, without the idle model and with it."""

    alone: tuple[Leases, ...]
    without: tuple[Leases, ...]
    idle: tuple[Leases, ...]

    def over_theory(self, clock: Clock) -> float:
        """Tokens per second together over what time-slicing makes in theory."""
        return _seconds(self.alone, clock) / _seconds(self.without, clock)

    def over_none(self, clock: Clock) -> float:
        """Tokens per second with the third model over those without."""
        return _seconds(self.without, clock) / _seconds(self.idle, clock)


def _seconds(several: tuple[Leases, ...], clock: Clock) -> float:
    """Of one lease of each model, all of them together."""
    names = dict.fromkeys(name for leases in several for name in leases)
    pooled = ([one[clock] for leases in several for one in leases.get(name, [])] for name in names)
    return sum(statistics.median(times) for times in pooled)


def _round(stage: Stage, number: int) -> Round:
    """Every second round begins with the idle model."""
    alone = [stage.alone(stage.models[0])]
    together: dict[bool, list[Leases]] = {False: [], True: []}
    for there in (False, True, True, False) if number % 2 else (True, False, False, True):
        stage.idle(there)
        together[there].append(stage.together())
    alone.append(stage.alone(stage.models[1]))
    return Round(tuple(alone), tuple(together[False]), tuple(together[True]))


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    environment = machine.describe()
    stage = Stage(options)
    try:
        stage.together()  # the first pass of all touches memory that later ones find touched
        others = machine.Others([psutil.Process().pid])
        rounds = [_round(stage, number) for number in range(options.rounds)]
        elsewhere = others.cores()
    finally:
        stage.close()
    tokens = options.batch * options.lease * len(stage.models)
    ways: tuple[Literal["alone", "without", "idle"], ...] = ("alone", "without", "idle")
    return {
        "environment": environment,
        "options": {
            **asdict(options),
            "model": str(options.model or "SmolLM2-135M-Instruct"),
            "second": str(options.second or "random weights of that shape"),
        },
        "others_cores": elsewhere,
        "tokens_per_s": {
            way: {
                clock: tokens / statistics.median(_seconds(getattr(r, way), clock) for r in rounds)
                for clock in CLOCKS
            }
            for way in ways
        },
        "together_over_theory": {clock: _over([r.over_theory(clock) for r in rounds]) for clock in CLOCKS},
        "idle_third_over_none": {clock: _over([r.over_none(clock) for r in rounds]) for clock in CLOCKS},
        "rounds": [asdict(one) for one in rounds],
    }


def _over(ratios: list[float]) -> dict[str, float]:
    """Above 1 is faster."""
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
