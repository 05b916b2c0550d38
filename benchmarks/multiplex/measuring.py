"""`Field`: all systems of a comparison, measured by turns with the same arrivals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.multiplex.plan import Plan
from benchmarks.multiplex.systems import System
from muxserve.bench.generator import Deadline, Generator, Limits, Run
from muxserve.bench.latency import Slo, Unloaded, calibrate, fit
from muxserve.bench.outcomes import Status
from muxserve.bench.probing import prepare, verdict
from muxserve.bench.report import Report, as_json, describe, outcomes_as_json, report
from muxserve.bench.search import Goodput, Search
from muxserve.bench.targets import Failed
from muxserve.bench.workload import Mix, Request

Tell = Callable[[str], None]
WARMUP = 0.25
"""Part of a cell's arrivals that are not counted: until then queues have not formed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One system under one load."""

    system: str
    rate: float
    """Requests per second that were to arrive."""
    token_rate: float
    """Output tokens that arrived per second, after the warm-up and until arrivals ended."""
    report: Report
    outcomes: dict[str, list[Any]]
    """Raw, by column."""


class Field:
    """The systems, and what is known about their pace. Only one of them works at a time."""

    def __init__(self, systems: Sequence[System], plan: Plan, tell: Tell, begun: float | None = None) -> None:
        """begun: since when the plan's budget is used up, by the monotonic clock. Default: now."""
        self.systems = {system.name: system for system in systems}
        self.unloaded: dict[str, Unloaded] = {}
        """By system."""
        self.ours = systems[0].name
        """The one that is compared with the others."""
        self._plan = plan
        self._tell = tell
        self._begun = time.monotonic() if begun is None else begun
        for system in systems:
            system.pause()

    async def calibrate(self, mix: Mix) -> None:
        """Unloaded latencies: once for all policies of our engine, with the first, and once for each other
        engine. All models share a checkpoint, so the first stands for all. Raises Failed."""
        stream = mix.streams[0]
        ours: Unloaded | None = None
        for name, system in self.systems.items():
            if ours is None or system.own_pace:
                system.resume()
                lone = await calibrate(system.routes[stream.model], stream, mix, self._plan.repeats)
                system.pause()
                found = fit(lone)
                self._tell(f"{name}: unloaded latency {as_json(found)}")
                ours = found if ours is None and not system.own_pace else ours
            else:
                found = ours
            self.unloaded[name] = found

    def slo(self, system: str, mix: Mix) -> Slo:
        """What it is held to."""
        unloaded = self.unloaded[system]
        return Slo(self._plan.slo_scale, {stream.model: unloaded for stream in mix.streams})

    async def run(self, system: str, requests: Sequence[Request], deadline: Deadline, limits: Limits) -> Run:
        """One run. Raises Failed where it does not answer any more."""
        return await self._turn(system, Generator(requests, self.systems[system].routes, deadline, limits))

    async def _turn(self, name: str, generator: Generator) -> Run:
        system = self.systems[name]
        system.resume()
        try:
            await settle(system, self._plan.vocabulary)
            return await generator.run()
        finally:
            system.pause()

    async def cell(self, system: str, mix: Mix, rate: float, seconds: float, *, wait: bool) -> Cell:
        """Measure at a rate, with no deadlines. wait: for all answers; else the end of arrivals ends it."""
        requests = mix.poisson(rate, seconds, self._plan.seed)
        slo = self.slo(system, mix)
        longest = max(map(slo.deadline, requests), default=0.0)
        run = await self.run(system, requests, lambda _: None, Limits(drain=longest if wait else 0.0))
        found = report(run, WARMUP * seconds, seconds, slo)
        tokens = run.token_rate(round(WARMUP * seconds), round(seconds))
        return Cell(system, rate, tokens, found, outcomes_as_json(run.outcomes))

    async def goodputs(
        self, names: Sequence[str], mix: Mix, starts: Mapping[str, float]
    ) -> dict[str, Goodput]:
        """Search for each, a probe of every one by turns, until all know enough or time is up."""
        plan = self._plan
        searches = {
            name: Search(starts[name], step=1.35, resolution=plan.resolution, probes=plan.probes)
            for name in names
        }
        going = True
        while going:
            going = False
            for name, search in searches.items():
                rate = search.next_rate()
                if rate is None or time.monotonic() - self._begun > plan.budget:
                    continue
                going = True
                slo = self.slo(name, mix)
                requests = mix.poisson(rate, plan.probe, plan.seed)
                generator, watch = prepare(requests, self.systems[name].routes, slo)
                run = await self._turn(name, generator)
                probe = verdict(rate, requests, watch)
                search.record(probe)
                self._tell(
                    f"{name}: {rate:.2f} requests/s {'pass' if probe.passed else 'fail'}: {probe.missed} of "
                    f"{probe.requests} missed after {run.seconds:.0f} s"
                )
        found = {name: search.result for name, search in searches.items()}
        for name, goodput in found.items():
            self._tell(f"{name}: goodput {describe(goodput)}")
        return found

    async def dismiss(self, names: Sequence[str]) -> None:
        """End these systems: even idle they take some percent of a core."""
        await asyncio.gather(*(self.systems.pop(name).close() for name in names))

    async def close(self) -> None:
        """End all systems."""
        await asyncio.gather(*(system.close() for system in self.systems.values()))


async def settle(system: System, vocabulary: int) -> None:
    """A short request of every model, so that what ran before is over and nothing sleeps. Raises Failed."""
    requests = [Request(0.0, model, (vocabulary - 1,) * 8, 4) for model in system.routes]
    for outcome in (await Generator(requests, system.routes).run()).outcomes:
        if outcome.status is not Status.OK:
            raise Failed(f"{system.name}, {outcome.model}: {outcome.status}: {outcome.error}")
