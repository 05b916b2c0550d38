"""A run's figures: as a value, as JSON, as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from muxserve.bench.generator import Run
from muxserve.bench.latency import Slo
from muxserve.bench.outcomes import Outcome
from muxserve.bench.search import Goodput, Probe
from muxserve.bench.statistics import Spread, Summary, by, fairness, summarize, wilson

TOTAL = "all"


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run."""

    total: Summary
    models: dict[str, Summary]
    tenants: dict[str, Summary]
    """Empty where there is only one."""
    model_fairness: float
    """Jain's index of the models' served parts (tokens that came over tokens asked for)."""
    tenant_fairness: float
    worst_model: str
    """That with the least attainment, without an SLO the one with the slowest P99; "" of nothing."""
    generator_cores: float
    """Cores that the load generator itself took, on average."""
    worst_lag: float
    """Most seconds that a request was sent after it was due."""
    offered: float
    """Requests per second that arrived in the window."""


def report(run: Run, begin: float, end: float, slo: Slo | None) -> Report:
    """Of the requests that arrived in [begin, end), in seconds of the run."""
    arrived = [one for one in run.outcomes if begin <= one.at < end]
    models = by(run.outcomes, lambda one: one.model)
    tenants = by(run.outcomes, lambda one: one.tenant)
    of_models = {name: summarize(group, begin, end, slo) for name, group in models.items()}
    total = summarize(run.outcomes, begin, end, slo)
    return Report(
        total=total,
        models=of_models,
        tenants={name: summarize(group, begin, end, slo) for name, group in tenants.items()}
        if len(tenants) > 1
        else {},
        model_fairness=fairness(by(arrived, lambda one: one.model).values()),
        tenant_fairness=fairness(by(arrived, lambda one: one.tenant).values()),
        worst_model=_worst(of_models, slo),
        generator_cores=run.cpu_seconds / run.seconds if run.seconds else 0.0,
        worst_lag=run.worst_lag,
        offered=total.requests / (end - begin),
    )


def _worst(models: dict[str, Summary], slo: Slo | None) -> str:
    arrived = {name: summary for name, summary in models.items() if summary.requests}
    if slo is not None:
        return min(arrived, key=lambda name: arrived[name].attainment[slo.scale], default="")
    slow = {name: one.latency.p99 for name, one in arrived.items() if not math.isnan(one.latency.p99)}
    return max(slow, key=slow.__getitem__, default="")


def as_json(value: Any) -> Any:
    """Dataclasses as objects; NaN, which JSON does not have, as null."""
    if hasattr(value, "__dataclass_fields__"):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def outcomes_as_json(outcomes: Iterable[Outcome]) -> dict[str, list[Any]]:
    """Column by column, to 10 µs: a fraction of the size of a list of objects."""
    names = list(Outcome.__dataclass_fields__)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for one in outcomes:
        for name in names:
            value = getattr(one, name)
            columns[name].append(round(value, 5) if isinstance(value, float) else value)
    return columns


def tables(result: Report, slo: Slo | None) -> list[Table]:
    """For people."""
    rows = {TOTAL: result.total, **(result.models if len(result.models) > 1 else {})}
    rows |= {f"tenant {name or '(default)'}": one for name, one in result.tenants.items()}
    counts = _table(
        "requests", "arrived", "ok", "refused", "late", "failed", "unfinished", "req/s", "tokens/s"
    )
    times = _table(
        "latency", "TTFT mean", "P50", "P99", "TPOT mean", "P50", "P99", "end to end mean", "P50", "P99"
    )
    for name, one in rows.items():
        numbers = (one.requests, one.ok, one.refused, one.late, one.failed, one.unfinished)
        counts.add_row(name, *map(str, numbers), f"{one.request_rate:.2f}", f"{one.token_rate:.1f}")
        times.add_row(name, *_times(one.ttft), *_times(one.tpot), *_times(one.latency))
    found = [counts, times]
    if slo is not None:
        scales = list(result.total.attainment)
        attained = _table(
            "met SLO, by scale", *(f"{scale:g}" for scale in scales), "of admitted", "refused after"
        )
        for name, one in rows.items():
            parts = [*one.attainment.values(), *list(one.admitted_attainment.values())[-1:]]
            attained.add_row(name, *map(_percent, parts), _seconds(one.refusal.p99))
        found.append(attained)
    return found


def show(result: Report, slo: Slo | None, console: Console) -> None:
    """All tables and what is left to say."""
    for table in tables(result, slo):
        console.print(table)
    worst = f"worst model: {result.worst_model}" if len(result.models) > 1 else ""
    console.print(
        f"offered {result.offered:.2f} requests/s; fairness (Jain) of models {result.model_fairness:.3f}"
        + (f", of tenants {result.tenant_fairness:.3f}" if result.tenants else "")
        + (f"; {worst}" if worst else ""),
        markup=False,
    )
    console.print(
        f"generator: {result.generator_cores:.3f} cores, requests sent at most "
        f"{1000 * result.worst_lag:.1f} ms after they were due",
        markup=False,
    )


def describe(goodput: Goodput, unit: str = "requests/s") -> str:
    """One line that says how sure the figure is."""
    if goodput.rate == 0:
        if goodput.below is None:
            return "unknown: there was no time to try a rate"
        return f"below {goodput.below:.2f} {unit}: no rate that was tried passed"
    best = max((probe for probe in goodput.probes if probe.passed and probe.rate == goodput.rate), key=_size)
    low, high = wilson(best.requests - best.missed, best.requests)
    upper = f"fails at {goodput.below:.2f}" if goodput.below is not None else "no rate failed"
    return (
        f"{goodput.rate:.2f} {unit} ({upper}); there {best.missed} of {best.requests} missed, "
        f"95% interval {low:.1%} to {high:.1%}"
    )


def _size(probe: Probe) -> int:
    return probe.requests


def _table(first: str, *columns: str) -> Table:
    table = Table()
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _times(spread: Spread) -> tuple[str, str, str]:
    return _seconds(spread.mean), _seconds(spread.p50), _seconds(spread.p99)


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
