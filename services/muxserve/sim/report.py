"""What a simulated cluster did, in the terms of a serving benchmark.

Figures are of a window from the warm-up's end until arrivals end: throughput counts what finished in it,
latencies and attainment are those of the requests that arrived in it, whenever they finish. A request that
does not finish has missed every target. The service level objective (SLO) of a request is a multiple, the
scale, of the time that it takes alone: on the smallest mesh that its model fits, with nothing beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muxserve.placement.solver.alone import alone
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.placement import Placement
from muxserve.placement.solver.workload import Workload
from muxserve.sim.cluster import Outcome
from muxserve.sim.requests import Request

SCALES = (1, 2, 4, 6, 8, 10, 12, 16, 20)
SLO_SCALE = 8
"""Where a single number is given."""
WARM_UP = 30.0
"""Seconds; at most a fifth of the run."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and percentiles, in seconds; 0 of nothing."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Nearest rank."""
        if not values:
            return cls(0.0, 0.0, 0.0)
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(sum(ordered) / len(ordered), ordered[round(last * 0.5)], ordered[round(last * 0.99)])


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model, or all."""

    requests: int
    """Arrived in the window."""
    rate: float
    """Arrivals per second in the window."""
    throughput: float
    """Requests finished per second."""
    token_throughput: float
    """Output tokens per second of those."""
    refused: int
    unfinished: int
    ttft: Summary
    tpot: Summary
    """Seconds per output token after the first, of a request's mean."""
    latency: Summary
    """End to end."""
    attainment: Mapping[str, float]
    """Part of requests that meet their SLO, by scale."""

    @property
    def served(self) -> float:
        """Part of the rate that is served, at most 1."""
        return min(1.0, self.throughput / self.rate) if self.rate > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """A simulation's results."""

    total: ModelReport
    models: Mapping[str, ModelReport]
    gpus: int
    """In use."""
    utilisation: Sequence[float]
    """By unit: part of time in which a job ran."""
    preemptions: int
    decisions: int

    @property
    def worst(self) -> str:
        """The model with the least attainment at `SLO_SCALE`; of equals, the one that is served least. Empty:
        no model."""
        scale = str(SLO_SCALE)
        return min(
            self.models,
            key=lambda m: (self.models[m].attainment[scale], self.models[m].served, m),
            default="",
        )

    @property
    def least_served(self) -> float:
        """The least part of its rate that a model is served."""
        return min((model.served for model in self.models.values()), default=1.0)

    def as_object(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "total": _object(self.total),
            "models": {name: _object(model) for name, model in self.models.items()},
            "slo_scale": SLO_SCALE,
            "worst_model": self.worst,
            "least_served": self.least_served,
            "gpus_used": self.gpus,
            "utilisation": list(self.utilisation),
            "preemptions": self.preemptions,
            "decisions": self.decisions,
        }


def report(outcome: Outcome, placement: Placement, workload: Workload, costs: CostModel) -> Report:
    """Work it out."""
    start = min(WARM_UP, outcome.duration / 5)
    unloaded = {model.name: alone(model, workload, costs) for model in workload.models}
    by_model: dict[str, list[Request]] = {model.name: [] for model in workload.models}
    for request in outcome.requests:
        by_model[request.model].append(request)
    window = (start, outcome.duration)
    return Report(
        total=_report(outcome.requests, window, unloaded),
        models={name: _report(requests, window, unloaded) for name, requests in by_model.items()},
        gpus=placement.gpus,
        utilisation=[busy / max(outcome.ended, 1e-9) for busy in outcome.busy],
        preemptions=outcome.preemptions,
        decisions=outcome.decisions,
    )


def _report(
    requests: Sequence[Request],
    window: tuple[float, float],
    unloaded: Mapping[str, Callable[[float, float], float]],
) -> ModelReport:
    start, end = window
    seconds = max(end - start, 1e-9)
    arrived = [r for r in requests if start <= r.arrival <= end]
    finished = [r for r in requests if start <= r.finish <= end]
    served = [r for r in arrived if r.finish >= 0]
    ratios = sorted((r.finish - r.arrival) / unloaded[r.model](r.prompt, r.output) for r in served)
    return ModelReport(
        requests=len(arrived),
        rate=len(arrived) / seconds,
        throughput=len(finished) / seconds,
        token_throughput=sum(r.output for r in finished) / seconds,
        refused=sum(r.refused for r in arrived),
        unfinished=sum(r.finish < 0 and not r.refused for r in arrived),
        ttft=Summary.of([r.first - r.arrival for r in served]),
        tpot=Summary.of([(r.finish - r.first) / (r.output - 1) for r in served if r.output > 1]),
        latency=Summary.of([r.finish - r.arrival for r in served]),
        attainment={
            str(scale): sum(ratio <= scale for ratio in ratios) / len(arrived) if arrived else 1.0
            for scale in SCALES
        },
    )


def _object(model: ModelReport) -> dict[str, Any]:
    def summary(value: Summary) -> dict[str, float]:
        return {"mean": value.mean, "p50": value.p50, "p99": value.p99}

    return {
        "requests": model.requests,
        "rate": model.rate,
        "throughput": model.throughput,
        "token_throughput": model.token_throughput,
        "served": model.served,
        "refused": model.refused,
        "unfinished": model.unfinished,
        "ttft": summary(model.ttft),
        "tpot": summary(model.tpot),
        "latency": summary(model.latency),
        "attainment": dict(model.attainment),
    }
