"""`python -m benchmarks.placement --workload W.yaml --cost COST.json`: all algorithms' placements, simulated.

For each number of nodes the workload's models keep their rates; with --scale-rates these grow with the nodes.
Prints a table in Markdown, and writes everything as JSON with --output. With --roofline: how far predicted
times are from the table's instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.placement.prediction import errors, print_errors
from muxserve.cli.place import compute, estimated, read_inputs
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.workload import Workload
from muxserve.sim.arrivals import poisson
from muxserve.sim.cluster import SimOptions, simulate
from muxserve.sim.report import report

ALGORITHMS = ("paper", "greedy", "spatial", "best")
HEAD = (
    "| nodes | rate | algorithm | policy | time to place, s | GPUs | Eq. 3, req/s | simulated, req/s "
    "| SLO x4 | SLO x8 | worst model x8 | least served | TTFT mean / P99, s | TPOT mean / P99, ms "
    "| simulated in, s |"
)


def main() -> None:
    options = _options()
    workload, costs = read_inputs(options.workload, options.cost)
    if options.roofline:
        found = errors(json.loads(options.cost.read_text()), workload)
        print_errors(found)
        results: Any = found
    else:
        print(HEAD)
        print("|" + " --- |" * (HEAD.count("|") - 1))
        results = []
        for nodes in options.nodes:
            scaled = at(workload, nodes, options.scale_rates)
            for algorithm in options.algorithms:
                results += rows(scaled, costs, algorithm, options)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def at(workload: Workload, nodes: int, scale_rates: bool) -> Workload:
    """The workload on so many of its first node."""
    factor = nodes / len(workload.nodes) if scale_rates else 1.0
    models = tuple(replace(model, rate=model.rate * factor) for model in workload.models)
    return replace(workload, nodes=(workload.nodes[0],) * nodes, models=models)


def rows(
    workload: Workload, costs: CostModel, algorithm: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One result for each policy."""
    began = time.monotonic()
    placement = compute(workload, costs, algorithm, options.time_limit)
    placing = time.monotonic() - began
    placement.verify(workload, costs)
    estimate = estimated(placement, workload, costs)
    found = []
    for policy in options.policies:
        began = time.monotonic()
        arrivals = poisson(workload, options.duration, options.seed)
        outcome = simulate(placement, workload, costs, arrivals, options.duration, SimOptions(policy=policy))
        result = report(outcome, placement, workload, costs)
        simulating = time.monotonic() - began
        total, worst = result.total, result.worst
        print(
            f"| {len(workload.nodes)} | {workload.rate:.0f} | {algorithm} | {policy} | {placing:.1f} "
            f"| {placement.gpus} | {estimate['equation_3']:.1f} | {total.throughput:.1f} "
            f"| {total.attainment['4']:.1%} | {total.attainment['8']:.1%} "
            f"| {worst} {result.models[worst].attainment['8']:.1%} | {result.least_served:.0%} "
            f"| {total.ttft.mean:.2f} / {total.ttft.p99:.2f} "
            f"| {1e3 * total.tpot.mean:.0f} / {1e3 * total.tpot.p99:.0f} | {simulating:.0f} |",
            flush=True,
        )
        found.append(
            {
                "nodes": len(workload.nodes),
                "rate": workload.rate,
                "algorithm": algorithm,
                "policy": policy,
                "placing_seconds": placing,
                "simulating_seconds": simulating,
                "duration": options.duration,
                "placement": replace(placement, estimate=estimate).as_object(),
                "result": result.as_object(),
            }
        )
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--cost", type=Path, required=True)
    parser.add_argument("--nodes", type=_numbers, default=[4], help="comma-separated")
    parser.add_argument("--scale-rates", action="store_true")
    parser.add_argument("--algorithms", type=lambda text: text.split(","), default=list(ALGORITHMS))
    parser.add_argument("--policies", type=lambda text: text.split(","), default=["adbs", "mux"])
    parser.add_argument("--duration", type=float, default=150.0, help="seconds of arrivals")
    parser.add_argument("--time-limit", type=float, default=90.0, help="of `best`, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--roofline", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
