"""`muxserve bench`: prepares targets and workload, runs, and tells."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from muxserve.bench.generator import Generator, Limits, Run
from muxserve.bench.latency import Lone, Slo, Unloaded, calibrate, fit
from muxserve.bench.plots import plot
from muxserve.bench.probing import prepare, verdict
from muxserve.bench.progress import shown
from muxserve.bench.report import Report, as_json, describe, outcomes_as_json, report, show
from muxserve.bench.search import Goodput, Search
from muxserve.bench.targets import Failed, Target, target
from muxserve.bench.workload import (
    Lengths,
    Mix,
    Request,
    Stream,
    TraceError,
    popularity,
    read_trace,
    trace_line,
)

FAILED = 1
LEAST_CONTEXT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure. Times are seconds."""

    targets: tuple[str, ...]
    """Each an address (host:port of a gateway, or http://…), or MODEL=ADDRESS."""
    models: tuple[str, ...] = ()
    """Most popular first. Empty: all that the targets serve, by name."""
    rate: float = 1.0
    """Requests a second, in all. A search begins there."""
    alpha: float = 1.3
    """Exponent of the models' popularity."""
    duration: float = 60.0
    """Of what is measured, after the warm-up. A search's probes take so long each."""
    warmup: float = 5.0
    """Requests of that time are sent and not counted."""
    seed: int = 0
    lengths: Lengths = field(default_factory=Lengths)
    """`context` is clipped to each model's own."""
    trace: Path | None = None
    """Requests to send in place of drawn ones; `duration` then cuts it short if that is less."""
    time_scale: float = 1.0
    """Seconds of the run for one of the trace."""
    tenants: Mapping[str, float]
    """Parts of the traffic by tenant."""
    priority: int = 0
    text: bool = False
    vocabulary: int = 1000
    slo_scale: float = 8.0
    calibrate: bool = True
    """Measure unloaded latencies first; without them there is no SLO."""
    calibration: Path | None = None
    """File with unloaded latencies: read if it is there, else written."""
    deadlines: bool = False
    """Send each request's SLO as its deadline."""
    drain: float = 60.0
    search: bool = False
    """Look for the goodput in place of one run at `rate`."""
    probes: int = 8
    resolution: float = 1.08
    api_key: str = ""
    out: Path | None = None
    """For raw results, JSON."""
    plot: Path | None = None
    save_trace: Path | None = None
    as_json: bool = False
    """Print the report as JSON."""


class BadOptions(Exception):
    """Options that cannot be followed; the message names the flag."""


class Bench:
    """One call of the command. To be closed."""

    def __init__(self, options: BenchOptions, console: Console) -> None:
        self._options = options
        self._console = console
        self._all: dict[str, Target] = {}
        self._routes: dict[str, Target] = {}
        self._contexts: dict[str, int] = {}
        self._lone: dict[str, list[Lone]] = {}

    async def run(self) -> dict[str, Any]:
        """Measure; raw results. Raises BadOptions, Failed, TraceError, OSError."""
        await self._find_models()
        mix = self._mix()
        slo = await self._slo(mix)
        raw: dict[str, Any] = {
            "options": self._told(),
            "unloaded": as_json(dict(slo.unloaded)) if slo else None,
        }
        raw["calibration"] = {name: as_json(found) for name, found in self._lone.items()}
        if self._options.search:
            if slo is None:
                raise BadOptions("--search needs an SLO: it cannot be used with --no-calibrate")
            goodput = await self._search(mix, slo)
            return raw | {"goodput": as_json(goodput)}
        requests, seconds = self._requests(mix)
        run, begin, end = await self._measure(requests, seconds, slo)
        result = report(run, begin, end, slo)
        if self._options.plot is not None:
            plot(run, result, slo, self._options.plot)
        self._tell(result, slo)
        return raw | {"report": as_json(result), "outcomes": outcomes_as_json(run.outcomes)}

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(each.close() for each in self._all.values()))

    async def _find_models(self) -> None:
        """Who serves which model, and its context. Raises BadOptions, Failed."""
        named: dict[str, str] = {}
        anywhere: list[str] = []
        for given in self._options.targets:
            model, equals, address = given.partition("=")
            if equals and "://" not in model:
                named[model] = address
            else:
                anywhere.append(given)
        for address in dict.fromkeys((*named.values(), *anywhere)):
            self._all[address] = target(address, self._options.api_key)
        served = {address: await each.contexts() for address, each in self._all.items()}
        for address in anywhere:
            for model, context in served[address].items():
                self._routes.setdefault(model, self._all[address])
                self._contexts.setdefault(model, context)
        for model, address in named.items():
            if model not in served[address]:
                known = ", ".join(sorted(served[address])) or "none"
                raise BadOptions(f"--target: {address} does not serve {model} (it serves {known})")
            self._routes[model] = self._all[address]
            self._contexts[model] = served[address][model]
        wanted = self._options.models or tuple(sorted(self._routes))
        if missing := [model for model in wanted if model not in self._routes]:
            raise BadOptions(f"--model: no target serves {missing[0]}")
        if not wanted:
            raise BadOptions("--target: there is no model that can be used")
        self._routes = {model: self._routes[model] for model in wanted}

    def _mix(self) -> Mix:
        options = self._options
        shares = popularity(tuple(self._routes), options.alpha)
        streams = []
        for model, share in shares.items():
            own = self._contexts[model] or options.lengths.context
            context = min(options.lengths.context, own)
            if context < LEAST_CONTEXT:
                raise BadOptions(f"--context: {context} tokens are too few for {model}")
            streams.append(Stream(model, share, replace(options.lengths, context=context)))
        return Mix(tuple(streams), options.tenants, options.priority, options.vocabulary, options.text)

    async def _slo(self, mix: Mix) -> Slo | None:
        """Unloaded latencies from the file, or measured. Raises Failed, OSError, BadOptions."""
        options = self._options
        if not options.calibrate:
            return None
        known: dict[str, Unloaded] = {}
        if options.calibration is not None and options.calibration.exists():
            try:
                read = json.loads(options.calibration.read_text(encoding="utf-8"))
                known = {name: Unloaded(**entry) for name, entry in read.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise BadOptions(f"--calibration: {options.calibration}: {error}") from error
        for stream in mix.streams:
            if stream.model not in known:
                self._console.print(f"calibrating {stream.model}: lone requests", markup=False)
                self._lone[stream.model] = await calibrate(self._routes[stream.model], stream, mix)
                known[stream.model] = fit(self._lone[stream.model])
        if options.calibration is not None and self._lone:
            options.calibration.write_text(json.dumps(as_json(known), indent=1) + "\n", encoding="utf-8")
        return Slo(options.slo_scale, known)

    def _requests(self, mix: Mix) -> tuple[list[Request], float]:
        """The run's requests, and for how long they arrive. Raises TraceError, BadOptions, OSError."""
        options = self._options
        whole = options.warmup + options.duration
        if options.trace is None:
            requests = mix.poisson(options.rate, whole, options.seed)
        else:
            found = read_trace(options.trace, mix, options.time_scale, options.seed)
            requests = [request for request in found if request.at < whole]
            if unknown := {request.model for request in requests} - self._routes.keys():
                raise BadOptions(f"--trace: no target serves {min(unknown)}")
            # A trace that ends earlier is measured to its end.
            last = max((request.at for request in requests), default=0.0)
            whole = min(whole, last + 1e-6)
        if whole <= options.warmup or not any(request.at >= options.warmup for request in requests):
            raise BadOptions("--duration, --rate: no request arrives after the warm-up")
        if options.save_trace is not None:
            options.save_trace.write_text("".join(trace_line(request) + "\n" for request in requests))
        return requests, whole

    async def _measure(
        self, requests: Sequence[Request], seconds: float, slo: Slo | None
    ) -> tuple[Run, float, float]:
        options = self._options
        deadline = slo.deadline if slo is not None and options.deadlines else lambda _: None
        generator = Generator(requests, self._routes, deadline, Limits(drain=options.drain))
        async with shown(generator, "measuring", self._console):
            run = await generator.run()
        return run, options.warmup, seconds

    async def _search(self, mix: Mix, slo: Slo) -> Goodput:
        options = self._options
        search = Search(options.rate, probes=options.probes, resolution=options.resolution)
        while (rate := search.next_rate()) is not None:
            requests = mix.poisson(rate, options.duration, options.seed)
            generator, watch = prepare(requests, self._routes, slo)
            async with shown(generator, f"{rate:.2f} requests/s", self._console):
                run = await generator.run()
            probe = verdict(rate, requests, watch)
            search.record(probe)
            self._console.print(
                f"{rate:8.2f} requests/s: {'passed' if probe.passed else 'failed'} with {probe.missed} of "
                f"{probe.requests} missed after {run.seconds:.0f} s",
                markup=False,
            )
        found = search.result
        line = f"goodput at 99% of SLO scale {slo.scale:g}: {describe(found)}"
        Console(highlight=False, soft_wrap=True).print(
            json.dumps(as_json(found)) if options.as_json else line
        )
        return found

    def _tell(self, result: Report, slo: Slo | None) -> None:
        out = Console(highlight=False, soft_wrap=self._options.as_json)
        if self._options.as_json:
            out.print(json.dumps(as_json(result)), markup=False)
        else:
            show(result, slo, out if out.is_terminal else Console(highlight=False, width=150))

    def _told(self) -> dict[str, Any]:
        told = asdict(replace(self._options, api_key=""))
        return {key: str(value) if isinstance(value, Path) else as_json(value) for key, value in told.items()}


def run(options: BenchOptions) -> int:
    """Run the command; the exit code."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    async def main() -> dict[str, Any]:
        bench = Bench(options, console)
        try:
            return await bench.run()
        finally:
            await bench.close()

    try:
        raw = uvloop.run(main())
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(raw) + "\n", encoding="utf-8")
    except (BadOptions, Failed, TraceError, OSError) as error:
        console.print(f"error: {error}", markup=False)
        return FAILED
    except KeyboardInterrupt:
        return 130
    return 0
