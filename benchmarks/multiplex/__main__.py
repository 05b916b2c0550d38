"""`python -m benchmarks.multiplex`: four models of unequal popularity on two cores, policy beside policy, and
one server per model beside them. The last line is one JSON object of ratios.

Everything is SmolLM2-135M in bfloat16 under several names: to the scheduler they are different models with
queues, quotas and batches of their own; in memory they share weights, which different checkpoints would not,
and peers load them once each. A request's SLO is --slo-scale times its unloaded latency, alone on the same
engine: peers that take longer alone may take longer under load. Systems take turns with the same arrivals;
while it is not a peer's turn it sleeps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.engine import machine
from benchmarks.engine.contender import ContenderFailed
from benchmarks.engine.lineup import CannotRun, check_peers, cores
from benchmarks.engine.run import default_model
from benchmarks.multiplex import trials
from benchmarks.multiplex.measuring import Field
from benchmarks.multiplex.pictures import plot_loads, plot_overload, plot_skew
from benchmarks.multiplex.plan import CASES, FULL, MODELS, POLICIES, QUICK, Plan
from benchmarks.multiplex.report import markdown
from benchmarks.multiplex.skew import Skew, measure
from benchmarks.multiplex.systems import VLLM, Ours, System, Vllm
from muxserve.bench.report import as_json
from muxserve.bench.targets import Failed

SECTIONS = ("skew", "cases", "overload", "tenants")
HEADLINE_ALPHA = 1.3
RESULTS = Path(__file__).parents[1] / "results" / "multiplex"


class Benchmark:
    """One run."""

    def __init__(self, options: argparse.Namespace, plan: Plan, folder: Path) -> None:
        self._options = options
        self._plan = plan
        self._folder = folder
        self._begun = time.monotonic()
        self._model: Path = options.model or default_model()
        self._started = 0
        self.ratios: dict[str, Any] = {}

    async def run(self) -> None:
        """All sections that were asked for. Raises ContenderFailed, CannotRun, Failed."""
        for section in self._options.only or (SECTIONS[:1] if self._options.quick else SECTIONS):
            raw = {"environment": machine.describe(), "plan": as_json(self._plan), "section": section}
            others = machine.Others([os.getpid()])
            raw["measured"] = await getattr(self, f"_{section}")()
            raw["environment"] |= {"load_after": os.getloadavg(), "other_cores": others.cores()}
            self.tell(f"{section}: others took {raw['environment']['other_cores']:.2f} cores meanwhile")
            raw["ratios"] = self.ratios
            if self._options.out is not None:
                name = f"{section}-quick" if self._options.quick else section
                self._options.out.mkdir(parents=True, exist_ok=True)
                (self._options.out / f"{name}.json").write_text(json.dumps(raw) + "\n", encoding="utf-8")

    async def _skew(self) -> list[Any]:
        field = await self._field(self._plan.policies, MODELS, self._plan.arena, peers=True)
        done: list[Skew] = []
        try:
            for alpha in self._plan.alphas:
                done.append(await measure(field, self._plan, alpha, self.tell))
                self.tell(json.dumps({"alpha": alpha, **done[-1].ratios()}))
        finally:
            await field.close()
        headline = next((skew for skew in done if skew.alpha == HEADLINE_ALPHA), done[0])
        self.ratios |= headline.ratios()
        if len(done) > 1:
            self.ratios["alphas"] = {f"{skew.alpha:g}": skew.ratios() for skew in done}
        if self._options.out is not None:
            ending = "-quick" if self._options.quick else ""
            plot_skew(done, self._options.out / f"goodput{ending}.png")
            for skew in done:
                if len(skew.cells) > 1:
                    plot_loads(skew, self._options.out / f"loads-{skew.alpha:g}.png")
        return [skew.as_json() for skew in done]

    async def _cases(self) -> list[Any]:
        found = []
        for case in CASES:
            policies = [policy for policy in case.policies if policy in self._plan.policies]
            field = await self._field(policies, MODELS[: len(case.rates)], case.arena)
            try:
                found.append(await trials.case(field, self._plan, case, self.tell))
            finally:
                await field.close()
        return found

    async def _overload(self) -> dict[str, Any]:
        field = await self._field(self._plan.policies[:1], MODELS, self._plan.arena)
        try:
            found = await trials.overload(field, self._plan, self.tell)
        finally:
            await field.close()
        self.ratios["overload_admitted_met"] = round(found["admitted_met"], 4)
        self.ratios["overload_refused_after_p99_s"] = found["refused_after_p99_s"]
        if self._options.out is not None:
            plot_overload(found, self._options.out / "overload.png")
        return found

    async def _tenants(self) -> dict[str, Any]:
        field = await self._field(self._plan.policies[:1], MODELS, self._plan.arena)
        try:
            found = await trials.tenants(field, self._plan, self.tell)
        finally:
            await field.close()
        self.ratios["tenant_p99_ttft_ratio"] = round(found["others_p99_ttft_ratio"], 3)
        return found

    async def _field(
        self, policies: Sequence[str], models: Sequence[str], arena: int, *, peers: bool = False
    ) -> Field:
        """Start everybody at once. Raises ContenderFailed, CannotRun."""
        self._started += 1
        folder = self._folder / f"{self._started}"
        begun = time.monotonic()
        starting: list[asyncio.Task[System]] = [
            asyncio.create_task(Ours.start(policy, self._model, models, folder / policy, arena))
            for policy in policies
        ]
        if peers and self._options.peer_python:
            python, context = self._options.peer_python, self._plan.context
            threads = cores()[: self._options.peer_threads or None]
            starting.append(
                asyncio.create_task(
                    Vllm.start(python, self._model, models, folder / VLLM, arena, context, threads)
                )
            )
        systems = await _all(starting)
        self.tell(
            f"{', '.join(system.name for system in systems)}: ready after {time.monotonic() - begun:.0f} s"
        )
        return Field(systems, self._plan, self.tell, self._begun)

    def tell(self, line: str) -> None:
        """On standard error, with the time."""
        print(f"{time.monotonic() - self._begun:6.1f} s  {line}", file=sys.stderr, flush=True)


async def _all(starting: Sequence[asyncio.Task[System]]) -> list[System]:
    """All systems, or none: those that started are ended where another does not."""
    try:
        return list(await asyncio.gather(*starting))
    except BaseException:
        for task in starting:
            task.cancel()
        for found in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(found, System):
                await found.close()
        raise


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="alpha 1.3 alone; within eight minutes")
    parser.add_argument("--model", type=Path, help="GGUF file or directory (default: SmolLM2 of the demo)")
    parser.add_argument("--peer-python", default="", help="interpreter that has vLLM: measure it too")
    parser.add_argument("--peer-threads", type=int, default=0, help="of each vLLM (default: all cores)")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="of the sections; repeatable")
    parser.add_argument(
        "--policy",
        action="append",
        choices=POLICIES,
        help="the first is compared with the others (default: all)",
    )
    parser.add_argument("--alpha", action="append", type=float, help="(default: 0.7, 1.3, 2.1); repeatable")
    parser.add_argument(
        "--load",
        action="append",
        type=float,
        help="at which all are measured beside each other, as a part of what mux serves in a flood "
        "(default: 0.5, 0.8, 1.2; --quick: 0.8, of mux alone); repeatable",
    )
    parser.add_argument("--slo-scale", type=float, help="(default: 8)")
    parser.add_argument("--scale-lengths", type=float, help="factor on ShareGPT's lengths (default: 0.1)")
    parser.add_argument("--probe-seconds", type=float, help="of each rate of a search")
    parser.add_argument("--seed", type=int, help="(default: 7)")
    parser.add_argument("--out", type=Path, help=f"folder for raw JSON and plots, such as {RESULTS.name}/")
    parser.add_argument("--render", type=Path, help="folder of earlier results: print its tables and end")
    parser.add_argument("--logs", type=Path, help="keep the services' logs there")
    return parser.parse_args()


def _plan(options: argparse.Namespace) -> Plan:
    chosen: dict[str, Any] = {
        "alphas": options.alpha and tuple(options.alpha),
        "policies": options.policy and tuple(options.policy),
        "searched": options.policy and tuple(options.policy),
        "loads": options.load and tuple(sorted(options.load)),
        "slo_scale": options.slo_scale,
        "scale": options.scale_lengths,
        "probe": options.probe_seconds,
        "seed": options.seed,
    }
    return replace(
        QUICK if options.quick else FULL,
        **{key: value for key, value in chosen.items() if value is not None},
    )


def main() -> int:
    """Exit code 1 if somebody cannot take part."""
    options = _arguments()
    if options.render:
        print(markdown(options.render))
        return 0

    async def run(folder: Path) -> dict[str, Any]:
        benchmark = Benchmark(options, _plan(options), folder)
        task = asyncio.create_task(benchmark.run())
        # As Ctrl-C does: end all that was started.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await task
        return benchmark.ratios

    try:
        if options.peer_python:
            check_peers((VLLM,), options.peer_python)
        with TemporaryDirectory(prefix="muxserve-benchmark-") as scratch:
            ratios = asyncio.run(run(options.logs or Path(scratch)))
    except (ContenderFailed, CannotRun, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 143
    print(json.dumps(ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
