"""`python -m benchmarks.online`: popularity flips on two workers of one core each, with rebalancing on.

Five models, skewed by alpha = 2.1; each worker has room for the weights of three. In the middle of the run
the order of popularity is reversed. The best static placement for the new popularity is measured in the same
run: candidates (what the service came to; the most popular model on both workers and the others spread; the
most popular model alone) get the same arrivals on a deployment that does not rebalance. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.engine import machine
from benchmarks.engine.contender import ContenderFailed
from benchmarks.engine.lineup import CannotRun
from benchmarks.engine.run import default_model
from benchmarks.online import judging
from benchmarks.online.deployment import Deployment, Setup, copies
from benchmarks.online.pictures import plot
from benchmarks.online.streams import Run, Stream, send
from muxserve.bench.generator import Generator, Limits
from muxserve.bench.latency import Slo, calibrate, fit
from muxserve.bench.targets import Failed, target
from muxserve.bench.workload import Lengths, Mix, popularity, shifted
from muxserve.bench.workload import Stream as Kind

RESULTS = Path(__file__).parents[1] / "results" / "online"
RESTORED = 0.9
"""Part of the best static placement's goodput that counts as recovered."""
ROOM = 3
"""Models whose weights a worker has room for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Times are seconds."""

    models: tuple[str, ...] = ("m0", "m1", "m2", "m3", "m4")
    alpha: float = 2.1
    load: float = 0.7
    """Rate, in parts of what is served when too much arrives."""
    flood: float = 20.0
    before: float = 90.0
    after: float = 150.0
    static: float = 90.0
    """Of each candidate."""
    width: float = 15.0
    """Of the windows that goodput is taken of."""
    slo_scale: float = 8.0
    scale: float = 0.1
    """Of ShareGPT's lengths."""
    arena: int = 256 * 2**20
    seed: int = 7
    drain: float = 90.0
    """For what is left at the end."""

    @property
    def lengths(self) -> Lengths:
        """Of prompts and outputs."""
        return Lengths(context=1024).scaled(self.scale)

    def mix(self, order: Sequence[str]) -> Mix:
        """Traffic with the most popular model first."""
        shares = popularity(order, self.alpha)
        return Mix(tuple(Kind(model, share, self.lengths) for model, share in shares.items()))


QUICK = Plan(flood=10.0, before=45.0, after=90.0, static=45.0, width=12.0)


class Benchmark:
    """One run."""

    def __init__(self, plan: Plan, checkpoint: Path, folder: Path) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._folder = folder
        self._begun = time.monotonic()
        self._mixes = plan.mix(plan.models), plan.mix(plan.models[::-1])

    async def run(self, rate: float | None) -> dict[str, Any]:
        """Everything. `rate`: of arrivals; None: by `load`. Raises ContenderFailed, Failed."""
        plan = self._plan
        paths = copies(self._checkpoint, plan.models, self._folder / "models")
        budget = await self._weights(paths)
        setup = Setup(paths, round((ROOM + 0.5) * budget), plan.arena)
        deployment = await Deployment.start(setup, self._folder / "online")
        try:
            slo = await self._slo(deployment)
            rate = rate or plan.load * await self._capacity(deployment)
            self.tell(f"{rate:.2f} requests/s")
            run, history = await self._flip(deployment, rate)
            reached = await deployment.loaded()
        finally:
            await deployment.close()
        statics = await self._statics(replace(setup, rebalance="off"), rate, reached)
        return self._judge(run, history, slo, statics, rate)

    def tell(self, line: str) -> None:
        """On standard error, with the time."""
        print(f"{time.monotonic() - self._begun:6.1f} s  {line}", file=sys.stderr, flush=True)

    async def _weights(self, paths: Mapping[str, Path]) -> int:
        """Bytes of a model's weights, as a worker says."""
        first = next(iter(paths))
        setup = Setup({first: paths[first]}, 2**40, 64 * 2**20, workers=1, rebalance="off")
        deployment = await Deployment.start(setup, self._folder / "alone")
        try:
            units = (await deployment.placement()).units
            return next(m.shape.weight_bytes for unit in units for m in unit.models)
        finally:
            await deployment.close()

    async def _slo(self, deployment: Deployment) -> Slo:
        gateway = target(deployment.gateway)
        try:
            mix = self._mixes[0]
            unloaded = fit(await calibrate(gateway, mix.streams[0], mix))
        finally:
            await gateway.close()
        return Slo(self._plan.slo_scale, dict.fromkeys(self._plan.models, unloaded))

    async def _capacity(self, deployment: Deployment) -> float:
        """Requests per second that are answered when far more arrive; placement gets used to them, too."""
        plan, mix = self._plan, self._mixes[0]
        gateway = target(deployment.gateway)
        try:
            requests = mix.poisson(60.0, plan.flood, plan.seed + 1)
            generator = Generator(requests, dict.fromkeys(plan.models, gateway), limits=Limits(drain=0.0))
            run = await generator.run()
        finally:
            await gateway.close()
        tokens = run.token_rate(round(plan.flood / 3), round(plan.flood))
        found = tokens / mix.mean_output(plan.seed)
        self.tell(f"flooded: {tokens:.0f} tokens/s, {found:.1f} requests/s")
        return found

    async def _flip(self, deployment: Deployment, rate: float) -> tuple[Run, list[dict[str, Any]]]:
        plan = self._plan
        before = self._mixes[0].poisson(rate, plan.before, plan.seed)
        requests = [*before, *shifted(self._mixes[1].poisson(rate, plan.after, plan.seed + 2), plan.before)]
        run, history = Run(time.monotonic()), list[dict[str, Any]]()
        watching = asyncio.create_task(deployment.watch(run.begin, history))
        try:
            await send(deployment.gateway, requests, run, plan.drain)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        moves = [c["migration"] for c in history if c.get("migration", {}).get("phase") == "loading"]
        self.tell(f"flipped: {judging.accounts(run.streams)}, {len(moves)} loads")
        return run, history

    async def _statics(
        self, setup: Setup, rate: float, reached: dict[str, set[str]]
    ) -> dict[str, tuple[dict[str, list[str]], list[Stream]]]:
        """By name: where models were, and what became of the arrivals after the flip."""
        plan = self._plan
        requests = self._mixes[1].poisson(rate, plan.static, plan.seed + 2)
        deployment = await Deployment.start(setup, self._folder / "static")
        found: dict[str, tuple[dict[str, list[str]], list[Stream]]] = {}
        try:
            workers = sorted(unit.worker_id for unit in (await deployment.placement()).units)
            candidates = {"reached": reached} if all(reached.values()) else {}
            candidates |= candidates_for(plan.models[::-1], workers)
            for name, wanted in candidates.items():
                if any(wanted == other for other in list(candidates.values())[: len(found)]):
                    continue
                await deployment.arrange(wanted)
                run = Run(time.monotonic())
                await send(deployment.gateway, requests, run, plan.drain)
                found[name] = ({model: sorted(at) for model, at in wanted.items()}, run.streams)
                self.tell(f"static, {name}: {judging.accounts(run.streams)}")
        finally:
            await deployment.close()
        return found

    def _judge(
        self,
        run: Run,
        history: list[dict[str, Any]],
        slo: Slo,
        statics: Mapping[str, tuple[dict[str, list[str]], list[Stream]]],
        rate: float,
    ) -> dict[str, Any]:
        plan, streams = self._plan, run.streams
        warm = plan.static / 4  # until then queues have not formed
        parts = {name: judging.part(found, slo, warm, plan.static) for name, (_, found) in statics.items()}
        best = max(parts, key=lambda name: parts[name])
        flip, end = plan.before, plan.before + plan.after
        found = judging.recovery(streams, slo, flip, end, RESTORED * parts[best], plan.width)
        summary = {
            "rate": round(rate, 3),
            "met_before": round(judging.part(streams, slo, flip / 2, flip), 4),
            "met_first_seconds": round(judging.part(streams, slo, flip, flip + plan.width), 4),
            "met_after": round(judging.part(streams, slo, end - plan.after / 2, end), 4),
            "goodput_before": round(judging.goodput(streams, slo, flip / 2, flip), 3),
            "goodput_after": round(judging.goodput(streams, slo, end - plan.after / 2, end), 3),
            "best_static": best,
            "met_static": {name: round(value, 4) for name, value in parts.items()},
            "goodput_static": round(judging.goodput(statics[best][1], slo, warm, plan.static), 3),
            "recovered_after_s": found if found != float("inf") else None,
            "accounts": judging.accounts(streams),
            "pauses": judging.pauses(streams, judging.migration_spans(history)),
        }
        return {
            "summary": summary,
            "history": history,
            "series": judging.series(streams, slo, end, plan.width),
            "streams": judging.raw(streams),
            "statics": {
                name: {"placement": at, "streams": judging.raw(streams)}
                for name, (at, streams) in statics.items()
            },
            "unloaded": asdict(next(iter(slo.unloaded.values()))),
        }


def candidates_for(order: Sequence[str], workers: Sequence[str]) -> dict[str, dict[str, set[str]]]:
    """Static placements worth trying for two workers, `order` by popularity: the first model on both and the
    others by turns; the first alone."""
    both = {order[0]: set(workers)}
    both |= {model: {workers[i % len(workers)]} for i, model in enumerate(order[1:])}
    found = {"first on both": both}
    if len(order) - 1 <= ROOM:
        rest = workers[1:]
        found["first alone"] = {order[0]: {workers[0]}} | {
            model: {rest[i % len(rest)]} for i, model in enumerate(order[1:])
        }
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within six minutes")
    parser.add_argument("--model", type=Path, help="GGUF file (default: SmolLM2 of the demo)")
    parser.add_argument("--rate", type=float, help="requests per second (default: by what can be served)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help=f"folder for raw JSON and plots, such as {RESULTS.name}/")
    parser.add_argument("--logs", type=Path, help="keep the services' logs there")
    return parser.parse_args()


def main() -> int:
    """Exit code 1 if it could not be measured."""
    options = _arguments()
    plan = replace(QUICK if options.quick else Plan(), seed=options.seed)
    try:
        checkpoint = options.model or default_model()
        described, others = machine.describe(), machine.Others([os.getpid()])
        with TemporaryDirectory(prefix="muxserve-online-") as scratch:
            benchmark = Benchmark(plan, checkpoint, options.logs or Path(scratch))
            found = asyncio.run(benchmark.run(options.rate))
    except (ContenderFailed, CannotRun, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = {"environment": described, "plan": asdict(plan)} | found
    found["environment"] |= {"other_cores": others.cores()}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        name = "online-quick" if options.quick else "online"
        (options.out / f"{name}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        plot(found, options.out / f"{name}.png")
    print(json.dumps(found["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
