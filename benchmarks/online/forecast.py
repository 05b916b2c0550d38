"""`python -m benchmarks.online.forecast`: what the advisor expects of a worker, beside what is in time there.

The six models of `benchmarks.online`, not moved: the most popular one with the two that are asked for
least, and models by turns, at four loads each. For the worker of the most popular model: headroom and turn
as the advisor forecasts them from what it observes meanwhile, the part of requests that met their objective,
and what `OBSERVED`, from which advice follows, makes of the forecast. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.engine import machine
from benchmarks.engine.contender import ContenderFailed
from benchmarks.engine.lineup import CannotRun
from benchmarks.engine.run import default_model
from benchmarks.online import judging
from benchmarks.online.__main__ import RESULTS
from benchmarks.online.arrangement import Loaded, by_turns, first_apart
from benchmarks.online.deployment import Deployment
from benchmarks.online.experiment import QUICK, ROOM, Experiment
from benchmarks.online.streams import Run, Stream, send
from muxserve.bench.latency import Slo
from muxserve.bench.targets import Failed
from muxserve.common.errors import Unavailable
from muxserve.common.registry import Registry
from muxserve.common.store import connect
from muxserve.placement.advisor_situation import Situation
from muxserve.placement.advisor_watch import Watch
from muxserve.placement.solver.fixed import OBSERVED
from muxserve.placement.traffic import Traffic
from muxserve.placement.workers import WorkerCalls

LOADS = (0.4, 0.5, 0.55, 0.6)
SECONDS = 30.0
SETTLED = 8.0
"""Seconds of a cell after which forecasts and requests count."""
HORIZON = 120.0


@dataclass(frozen=True, slots=True)
class Cell:
    """Of the worker with the most popular model."""

    placement: str
    load: float
    rate: float
    """Requests per second, of all models."""
    headroom: float
    turn_ms: float
    ratio: float
    """Times as long as alone: by the forecast."""
    ratio_seen: float
    """The median of what it was."""
    expected: float
    """Part of its requests in time, as `OBSERVED` has it."""
    met: float
    """As it was."""


class Forecasts(Experiment):
    """One run."""

    async def cells(self) -> list[Cell]:
        """Raises ContenderFailed, Failed."""
        deployment = await Deployment.start(
            replace(self._setup(), rebalance="off"), self._folder / "forecasts"
        )
        try:
            slo = await self._slo(deployment)
            capacity = await self._capacity(deployment)
            order, workers = self._plan.models[::-1], await deployment.workers()
            found = []
            for name, wanted in (
                ("first apart", first_apart(order, workers, ROOM)),
                ("by turns", by_turns(order, workers)),
            ):
                await deployment.arrange(wanted, ROOM)
                for load in LOADS:
                    cell = await self._cell(deployment, slo, name, wanted, (load, load * capacity))
                    found.append(cell)
                    self.tell(f"{name}, {load}: headroom {cell.headroom}, met {cell.met}")
            return found
        finally:
            await deployment.close()

    async def _cell(
        self, deployment: Deployment, slo: Slo, name: str, wanted: Loaded, load: tuple[float, float]
    ) -> Cell:
        """load: in parts of what is served when flooded, and in requests per second."""
        run, seed = Run(time.monotonic()), self._plan.seed + round(1000 * load[0])
        first = self._plan.models[-1]
        watching = asyncio.create_task(_observe(deployment, first, run.begin + SETTLED))
        await send(deployment.gateway, self._mixes[1].poisson(load[1], SECONDS, seed), run, self._plan.drain)
        watching.cancel()
        seen = await watching
        beside = {model for model, at in wanted.items() if at == wanted[first]}
        streams = [s for s in run.streams if s.model in beside and s.at >= SETTLED]
        headroom, turn, ratio = (median(each) for each in zip(*seen, strict=True))
        return Cell(
            name,
            load[0],
            round(load[1], 2),
            round(headroom, 3),
            round(1000 * turn, 1),
            round(ratio, 2),
            round(median(_ratio(s, slo) for s in streams if s.model == first), 2),
            round(OBSERVED.in_time(headroom, ratio), 3),
            round(judging.part(streams, slo, SETTLED, SECONDS), 3),
        )


async def _observe(deployment: Deployment, first: str, begin: float) -> list[tuple[float, float, float]]:
    """Forecasts (headroom, turn, ratio) of the worker with the model `first`, until cancelled."""
    redis, calls = connect(f"redis://{deployment.redis}/0"), WorkerCalls(HORIZON)
    watch = Watch(redis, Registry(redis), calls, Traffic())
    found = []
    try:
        while True:
            placement = await deployment.placement()
            with suppress(Unavailable):
                await watch.look(placement)
            if time.monotonic() >= begin:
                situation = Situation(watch.workers(placement), watch.models(placement, 0.0), HORIZON)
                found.append(_forecast(situation, first))
            await asyncio.sleep(1.0)
    except asyncio.CancelledError:
        return found
    finally:
        await asyncio.gather(watch.close(), calls.close(), redis.aclose())


def _forecast(situation: Situation, first: str) -> tuple[float, float, float]:
    i = next(i for i, model in enumerate(situation.models) if model.name == first)
    k = next(k for k, models in enumerate(situation.now) if i in models)
    forecast = situation.objective.forecasts(situation.now)[k]
    return forecast.headroom, forecast.turn, situation.objective.ratio(i, forecast.turn)


def _ratio(stream: Stream, slo: Slo) -> float:
    limit = slo.seconds(stream.model, stream.prompt_tokens, stream.asked)
    return slo.scale * (stream.end - stream.at) / limit


def _table(cells: Sequence[Cell]) -> str:
    lines = [
        "| | of flooded | headroom | times the time alone: forecast, seen | in time: expected, seen |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.placement} | {c.load} | {c.headroom:.2f} | {c.ratio:.1f}, {c.ratio_seen:.1f}"
        f" | {c.expected:.0%}, {c.met:.0%} |"
        for c in cells
    ]
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 if it could not be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="GGUF file (default: SmolLM2 of the demo)")
    parser.add_argument("--out", type=Path, help=f"folder for raw JSON, such as {RESULTS.name}/")
    options = parser.parse_args()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    try:
        described, others = machine.describe(), machine.Others([os.getpid()])
        with TemporaryDirectory(prefix="muxserve-forecast-") as scratch:
            forecasts = Forecasts(QUICK, options.model or default_model(), Path(scratch))
            cells = asyncio.run(forecasts.cells())
    except (ContenderFailed, CannotRun, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    record: dict[str, Any] = {"environment": described | {"other_cores": others.cores()}}
    record["cells"] = [asdict(cell) for cell in cells]
    if options.out is not None:
        (options.out / "forecast.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(_table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
