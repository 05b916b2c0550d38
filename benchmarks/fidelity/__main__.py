"""`python -m benchmarks.fidelity`: the simulator beside the service, on the same arrivals.

A deployment with four models is profiled as `muxserve profile` does it; then it gets three loads, parts of
what it serves when too much arrives, and is profiled again. A machine that others share is not as fast for
minutes on end, so that goes on in rounds: profiles have the pace that the loads between them have. The same
arrivals are simulated under the same policy from the mean of all profiles.
Throughput is to agree within 10%, mean time to first token and mean time per output token within 25%, for
each model. Nothing is fitted to what is compared. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.engine import machine
from benchmarks.engine.contender import ContenderFailed
from benchmarks.engine.lineup import CannotRun
from benchmarks.engine.run import default_model
from benchmarks.fidelity.comparing import Comparison, compare, markdown, mean, plot
from benchmarks.online.deployment import Deployment, Setup
from muxserve.bench.generator import Generator, Limits, Run
from muxserve.bench.outcomes import Outcome, Status
from muxserve.bench.report import outcomes_as_json
from muxserve.bench.targets import Failed, target
from muxserve.bench.workload import Lengths, Mix, Request, Stream, popularity
from muxserve.cli.profile import describe, meter
from muxserve.cli.profiling import Table, Wanted, measure
from muxserve.placement.solver.cost import SERVICE, parse_costs
from muxserve.placement.solver.placement import Placed, Placement, Unit
from muxserve.placement.solver.shapes import Shape
from muxserve.placement.solver.workload import USABLE, Model, Node, Workload
from muxserve.sim.arrivals import Arrival
from muxserve.sim.cluster import SimOptions, simulate
from muxserve.v1 import common_pb2

RESULTS = Path(__file__).parents[1] / "results" / "fidelity"
FLOOD = 60.0
"""Requests per second that are more than can be served."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Times are seconds."""

    models: tuple[str, ...] = ("m0", "m1", "m2", "m3")
    alpha: float = 1.3
    loads: tuple[float, ...] = (0.3, 0.5, 0.7)
    """Parts of what is served in a flood. Near saturation waiting times say nothing about a simulator: there
    they change severalfold with a twentieth of the machine's speed, which is not constant."""
    rounds: int = 6
    """With a profile before each, and one after the last."""
    seconds: float = 25.0
    """Of arrivals at each load, in each round."""
    flood: float = 20.0
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    lengths: tuple[int, ...] = (8, 32, 128, 384)
    repeat: int = 1
    """Times that a cell is measured in each profile."""
    scale: float = 0.1
    """Of ShareGPT's lengths."""
    arena: int = 512 * 2**20
    policy: str = "mux"
    seed: int = 7
    warm_up: float = 0.2
    """Part of the arrivals that are not compared."""

    @property
    def mix(self) -> Mix:
        """Traffic of all models."""
        lengths = Lengths(context=1024).scaled(self.scale)
        shares = popularity(self.models, self.alpha)
        return Mix(tuple(Stream(model, share, lengths) for model, share in shares.items()))


QUICK = Plan(rounds=3, seconds=16.0, flood=10.0, batches=(1, 4, 16), lengths=(8, 32, 96))


@dataclass(frozen=True, slots=True)
class Load:
    """A load in one round: what was sent, and what came of it."""

    load: float
    rate: float
    """Requests per second."""
    requests: Sequence[Request]
    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class Measured:
    """The service's part of a run."""

    tables: Sequence[Table]
    """One more than rounds."""
    shape: common_pb2.ModelShape
    rounds: Sequence[Sequence[Load]]

    def as_object(self) -> dict[str, Any]:
        """For JSON, so that nothing is lost whatever comes of the simulation."""
        rounds = [
            [
                {"load": each.load, "rate": each.rate, "service": outcomes_as_json(each.outcomes)}
                for each in loads
            ]
            for loads in self.rounds
        ]
        return {"tables": list(self.tables), "rounds": rounds}


class Benchmark:
    """One run."""

    def __init__(self, plan: Plan, checkpoint: Path, folder: Path) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._folder = folder
        self._begun = time.monotonic()

    async def run(self) -> Measured:
        """The service's part. Raises ContenderFailed, Failed."""
        plan = self._plan
        setup = Setup(
            dict.fromkeys(plan.models, self._checkpoint),
            2**40,
            plan.arena,
            workers=1,
            cores=None,
            rebalance="off",
            policy=plan.policy,
        )
        deployment = await Deployment.start(setup, self._folder / "service")
        try:
            rate = await self._flood(deployment)
            shape = await self._shape(deployment)
            tables, rounds = [await self._profile(deployment)], []
            for number in range(plan.rounds):
                rounds.append(await self._load(deployment, rate, number))
                tables.append(await self._profile(deployment))
        finally:
            await deployment.close()
        return Measured(tables, shape, rounds)

    def compare(self, measured: Measured) -> dict[str, Any]:
        """Simulate what was sent, and say how far the simulator is off."""
        plan, loads = self._plan, []
        table = mean(measured.tables)
        for rounds in zip(*measured.rounds, strict=True):
            real = [each.outcomes for each in rounds]
            simulated = [self._simulate(table, measured.shape, each.requests) for each in rounds]
            window = (plan.warm_up * plan.seconds, plan.seconds)
            found = compare(rounds[0].load, rounds[0].rate, real, simulated, window)
            self.tell(f"load {found.load:g}: {found.summary()}")
            loads.append((found, [outcomes_as_json(each) for each in simulated]))
        return {
            "summary": _summary([found for found, _ in loads]),
            "loads": [asdict(found) | {"simulated": simulated} for found, simulated in loads],
        }

    def tell(self, line: str) -> None:
        """On standard error, with the time."""
        print(f"{time.monotonic() - self._begun:6.1f} s  {line}", file=sys.stderr, flush=True)

    async def _profile(self, deployment: Deployment) -> Table:
        """Of one model: the others are the same checkpoint."""
        plan, name = self._plan, self._plan.models[0]
        described = await asyncio.to_thread(describe, deployment.admin)
        lanes = described.get("decode_lanes", 1)
        wanted = Wanted(
            {name: 1024}, plan.batches, plan.lengths, plan.repeat, company=plan.models, lanes=lanes
        )
        table = await measure(deployment.gateway, wanted, meter(deployment.admin))
        table[SERVICE] |= described
        self.tell(f"profiled: {table[SERVICE]}")
        return table

    async def _shape(self, deployment: Deployment) -> common_pb2.ModelShape:
        return (await deployment.placement()).units[0].models[0].shape

    async def _flood(self, deployment: Deployment) -> float:
        """Requests per second that are served of too many."""
        plan = self._plan
        flood = plan.mix.poisson(FLOOD, plan.flood, plan.seed)
        run = await self._send(deployment, flood, Limits(drain=0.0))
        tokens = run.token_rate(round(plan.flood / 3), round(plan.flood))
        rate = tokens / plan.mix.mean_output(plan.seed)
        self.tell(f"flooded: {tokens:.0f} tokens/s, {rate:.1f} requests/s")
        return rate

    async def _load(self, deployment: Deployment, most: float, number: int) -> list[Load]:
        """A round: each load for a while."""
        plan, found = self._plan, []
        for load in plan.loads:
            requests = plan.mix.poisson(load * most, plan.seconds, plan.seed + 1 + number)
            run = await self._send(deployment, requests, Limits())
            found.append(Load(load, load * most, requests, run.outcomes))
            self.tell(f"round {number + 1}, load {load:g}: {len(requests)} requests, {run.seconds:.0f} s")
        return found

    async def _send(self, deployment: Deployment, requests: Sequence[Request], limits: Limits) -> Run:
        gateway = target(deployment.gateway)
        try:
            return await Generator(requests, dict.fromkeys(self._plan.models, gateway), limits=limits).run()
        finally:
            await gateway.close()

    def _simulate(
        self, table: Table, shape: common_pb2.ModelShape, requests: Sequence[Request]
    ) -> list[Outcome]:
        plan = self._plan
        costs = parse_costs(table)
        arrivals = [Arrival(r.at, r.model, r.prompt_tokens, r.output_tokens) for r in requests]
        outcome = simulate(
            _placement(plan),
            _workload(plan, shape, requests),
            costs,
            arrivals,
            plan.seconds,
            SimOptions(policy=plan.policy).of_service(costs.service),
        )
        return [
            Outcome(
                at=request.arrival,
                sent=request.arrival,
                model=request.model,
                tenant="",
                priority=0,
                prompt_tokens=request.prompt,
                asked_tokens=request.output,
                tokens=request.emitted,
                first=request.first if request.first >= 0 else None,
                end=request.finish,
                status=Status.OK if request.finish >= 0 else Status.UNFINISHED,
            )
            for request in outcome.requests
        ]


def _workload(plan: Plan, shape: common_pb2.ModelShape, requests: Sequence[Request]) -> Workload:
    """One mesh with the arena's memory beside the weights; rates are as the operator states them: none."""
    known = Shape(
        layers=shape.layers,
        hidden=1,
        heads=shape.kv_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=1,
        vocabulary=1,
        tied=True,
    )
    weights = len(plan.models) * known.weight_bytes
    prompts: Mapping[str, list[int]] = {m: [] for m in plan.models}
    outputs: Mapping[str, list[int]] = {m: [] for m in plan.models}
    for request in requests:
        prompts[request.model].append(request.prompt_tokens)
        outputs[request.model].append(request.output_tokens)
    models = tuple(
        Model(name, plan.models[0], 0.0, _mean(prompts[name]), _mean(outputs[name]), known)
        for name in plan.models
    )
    return Workload((Node(1, round((plan.arena + weights) / USABLE) + 1),), models)


def _placement(plan: Plan) -> Placement:
    return Placement((Unit(((0, 0),), tuple(Placed(m, plan.models[0], 1) for m in plan.models)),))


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 1.0


def _summary(loads: Sequence[Comparison]) -> dict[str, Any]:
    rows = [row for load in loads for row in load.rows]
    return {
        "holds": all(row.holds for row in rows),
        "rows": len(rows),
        "rows_that_hold": sum(row.holds for row in rows),
        "worst_throughput": max((row.throughput_error for row in rows), key=abs, default=0.0),
        "worst_ttft": max((row.ttft_error for row in rows), key=abs, default=0.0),
        "worst_tpot": max((row.tpot_error for row in rows), key=abs, default=0.0),
    }


def _write(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within seven minutes")
    parser.add_argument("--model", type=Path, help="GGUF file (default: SmolLM2 of the demo)")
    parser.add_argument("--policy", default="mux")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help=f"folder for raw JSON and plots, such as {RESULTS.name}/")
    parser.add_argument("--logs", type=Path, help="keep the services' logs there")
    return parser.parse_args()


def main() -> int:
    """Exit code 1 if it could not be measured."""
    options = _arguments()
    plan = replace(QUICK if options.quick else Plan(), seed=options.seed, policy=options.policy)
    try:
        checkpoint = options.model or default_model()
        described, others = machine.describe(), machine.Others([os.getpid()])
        with TemporaryDirectory(prefix="muxserve-fidelity-") as scratch:
            benchmark = Benchmark(plan, checkpoint, options.logs or Path(scratch))
            measured = asyncio.run(benchmark.run())
    except (ContenderFailed, CannotRun, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found: dict[str, Any] = {"environment": described | {"other_cores": others.cores()}, "plan": asdict(plan)}
    found |= measured.as_object()
    name = "fidelity-quick" if options.quick else "fidelity"
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        _write(options.out / f"{name}.json", found)
    compared = benchmark.compare(measured)
    print(markdown(compared["loads"]), file=sys.stderr)
    if options.out is not None:
        _write(options.out / f"{name}.json", found | compared)
        plot(compared["loads"], options.out / f"{name}.png")
    print(json.dumps(compared["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
