"""Beyond skew: the paper's two cases, minutes of overload, and one tenant that sends ten times as much."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from benchmarks.multiplex.measuring import Field, Tell
from benchmarks.multiplex.plan import Case, Plan
from benchmarks.multiplex.skew import FLOOD
from muxserve.bench.generator import Limits, Run
from muxserve.bench.outcomes import Outcome, Status
from muxserve.bench.report import as_json, outcomes_as_json, report
from muxserve.bench.statistics import Spread, meets
from muxserve.bench.workload import Mix, merge, shifted

ALPHA = 1.3
TIMES = 3.0
"""Capacity: of the overload."""
LIGHT = 0.3
"""Of capacity: before and after the overload."""
RECOVERY = 5.0
"""Seconds after which service is to be as before."""
TENANTS = ("a", "b", "c", "greedy")
TENANT_LOAD = 1.2
"""Of capacity, the greedy one's ten parts included."""
GREED = 10


async def capacity(field: Field, mix: Mix, plan: Plan) -> float:
    """Requests per second that can be served: saturated throughput, with no deadlines."""
    unloaded = field.unloaded[field.ours].latency(round(plan.lengths.prompt), round(plan.lengths.output))
    cell = await field.cell(field.ours, mix, FLOOD / unloaded, plan.saturation, wait=False)
    return cell.token_rate / mix.mean_output(plan.seed)


async def case(field: Field, plan: Plan, which: Case, tell: Tell) -> dict[str, Any]:
    """Throughput of every policy when more arrives than it can serve, with little memory."""
    mix = which.mix(plan)
    await field.calibrate(mix)
    cells = []
    for name in field.systems:
        unloaded = field.unloaded[name].latency(round(plan.lengths.prompt), round(plan.lengths.output))
        cell = await field.cell(name, mix, FLOOD / unloaded, plan.cases, wait=False)
        cells.append(cell)
        models = {model: round(one.request_rate, 2) for model, one in cell.report.models.items()}
        tell(f"{which.name}: {name}: {cell.token_rate:.0f} tokens/s, requests/s by model {models}")
    return {"case": as_json(which), "cells": as_json(cells)}


async def overload(field: Field, plan: Plan, tell: Tell) -> dict[str, Any]:
    """Three times what can be served, for minutes, each request with its SLO as deadline; light load before
    and after. One run, so that nothing rests in between."""
    mix = plan.mix(ALPHA)
    await field.calibrate(mix)
    slo = field.slo(field.ours, mix)
    limit = await capacity(field, mix, plan)
    light = mix.poisson(LIGHT * limit, plan.light, plan.seed)
    flood = mix.poisson(TIMES * limit, plan.overload, plan.seed + 1)
    begin, end = plan.light, plan.light + plan.overload
    requests = merge(light, shifted(flood, begin), shifted(light, end + RECOVERY))
    memory: list[tuple[float, int]] = []
    sampling = asyncio.create_task(_sample(field, memory))
    try:
        run = await field.run(field.ours, requests, slo.deadline, Limits(drain=60))
    finally:
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
    during = report(run, begin, end, slo)
    before, after = (
        report(run, 0, begin, slo),
        report(run, end + RECOVERY, end + RECOVERY + plan.light, slo),
    )
    refused = [one for one in run.outcomes if one.status is Status.REFUSED]
    admitted = [one for one in _arrived(run, begin, end) if one.status is not Status.REFUSED]
    found = {
        "capacity": limit,
        "offered": during.offered,
        "admitted": len(admitted),
        "admitted_met": sum(meets(one, slo, slo.scale) for one in admitted) / max(1, len(admitted)),
        "answered_per_second": during.total.request_rate,
        "refused": len(refused),
        "refused_after_p99_s": during.total.refusal.p99,
        "refused_with_retry_after": sum(one.retry_after is not None for one in refused)
        / max(1, len(refused)),
        "memory_growth": _growth(memory, begin, end),
        "before_p99_latency_s": before.total.latency.p99,
        "after_p99_latency_s": after.total.latency.p99,
        "before_met": list(before.total.attainment.values())[-1],
        "after_met": list(after.total.attainment.values())[-1],
    }
    tell(f"overload: {as_json(found)}")
    return {
        **as_json(found),
        "memory": memory,
        "during": as_json(during),
        "before": as_json(before),
        "after": as_json(after),
        "outcomes": outcomes_as_json(run.outcomes),
    }


async def tenants(field: Field, plan: Plan, tell: Tell) -> dict[str, Any]:
    """Four tenants alike; then the same requests and nine times as many more of one of them."""
    mix = plan.mix(ALPHA)
    await field.calibrate(mix)
    limit = await capacity(field, mix, plan)
    each = TENANT_LOAD * limit / (len(TENANTS) - 1 + GREED)
    alike = merge(
        *(
            _of(mix, name).poisson(each, plan.tenants, plan.seed + number)
            for number, name in enumerate(TENANTS)
        )
    )
    more = _of(mix, TENANTS[-1]).poisson((GREED - 1) * each, plan.tenants, plan.seed + len(TENANTS))
    slo = field.slo(field.ours, mix)
    waits: dict[str, Spread] = {}
    raw = {}
    for name, requests in {"alike": alike, "greedy": merge(alike, more)}.items():
        # Without deadlines: what the greedy one has piled up is there, and must not be in the way.
        run = await field.run(field.ours, requests, lambda _: None, Limits(drain=120))
        others = [one for one in run.outcomes if one.tenant != TENANTS[-1]]
        waits[name] = Spread.of(one.ttft for one in others if one.status is Status.OK)
        raw[name] = {
            "report": as_json(report(run, 0, plan.tenants, slo)),
            "outcomes": outcomes_as_json(run.outcomes),
            "others_answered": sum(one.status is Status.OK for one in others) / max(1, len(others)),
        }
    found = {
        "capacity": limit,
        "requests_per_second_each": each,
        "others_ttft": as_json(waits),
        "others_p99_ttft_ratio": waits["greedy"].p99 / waits["alike"].p99,
        "others_p50_ttft_ratio": waits["greedy"].p50 / waits["alike"].p50,
    }
    tell(f"tenants: {as_json(found)}")
    return {**as_json(found), **raw}


def _of(mix: Mix, tenant: str) -> Mix:
    return Mix(mix.streams, {tenant: 1.0}, mix.priority, mix.vocabulary, mix.text)


def _arrived(run: Run, begin: float, end: float) -> list[Outcome]:
    return [one for one in run.outcomes if begin <= one.at < end]


async def _sample(field: Field, memory: list[tuple[float, int]]) -> None:
    """Bytes of all processes together, every few seconds of the run."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    while True:
        sizes = await asyncio.to_thread(field.systems[field.ours].memory)
        memory.append((round(loop.time() - begun, 2), sum(sizes.values())))
        await asyncio.sleep(5)


def _growth(memory: Sequence[tuple[float, int]], begin: float, end: float) -> float:
    """Bytes at the end of the overload over those a quarter into it, when pools and queues are full."""
    inside = [size for at, size in memory if begin + (end - begin) / 4 <= at < end]
    return inside[-1] / inside[0] if len(inside) > 1 else math.nan
