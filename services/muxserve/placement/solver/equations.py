"""Equations 1 to 3 of the MuxServe paper: what a unit's models are expected to serve.

(3) tpt(m) = min{ b_m / (Σ_i t_p^i + t_d^m · l_o^m), W_m }: the prefills of all models of a unit serialise,
decodes overlap. (2) F(unit) = the largest Σ tpt over batches b whose KV is shared in proportion to the rates
(R equal for all, ε = 0) and fits the memory. (1) is the sum over units.

Sequences are taken as long as they get, prompt + output. Shares are those of the candidate (Algorithm 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.placement import Placement, kv_needed, kv_room, least_memory
from muxserve.placement.solver.workload import Model, Workload

HALVINGS = 14
"""Of the KV that batches may take, while looking for the best size: batches beyond what the rates need only
make prefills longer."""
MOST_BATCH = 4096.0


@dataclass(frozen=True, slots=True)
class Member:
    """A model in a unit, as Equation 3 sees it."""

    model: Model
    rate: float
    """Requests per second that are for this unit."""
    share: float
    """Of the SMs, for its jobs of either kind."""


def throughput(members: Sequence[Member], degree: int, usable: int, costs: CostModel) -> list[float] | None:
    """Requests per second of each member under the best batches; None: it does not fit.

    `usable`: bytes for weights and KV on each of `degree` GPUs.
    """
    room = kv_room(usable, degree, [m.model.shape.weight_bytes for m in members])
    if room < kv_needed([m.model.shape.kv_bytes for m in members]):
        return None
    if not members:
        return []
    sizes = [m.model.shape.kv_bytes * (m.model.prompt_tokens + m.model.output_tokens) for m in members]
    rates = [max(m.rate, 1e-9) for m in members]
    # KV of m is in proportion to its rate: b_m · size_m = kappa · rate_m.
    kappa = room / sum(rates)
    best: list[float] = []
    for _ in range(HALVINGS):
        batches = [max(1.0, min(MOST_BATCH, kappa * r / size)) for r, size in zip(rates, sizes, strict=True)]
        served = rates_at(members, batches, degree, costs)
        if sum(served) > sum(best):
            best = served
        kappa /= 2
    return best


def rates_at(
    members: Sequence[Member], batches: Sequence[float], degree: int, costs: CostModel
) -> list[float]:
    """Equation 3 for given batches."""
    prefills = sum(
        costs.prefill(m.model.model, degree, m.share, b, m.model.prompt_tokens)
        for m, b in zip(members, batches, strict=True)
    )
    return [
        min(
            b
            / (
                prefills
                + costs.decode(
                    m.model.model, degree, m.share, b, m.model.prompt_tokens + m.model.output_tokens / 2
                )
                * m.model.output_tokens
            ),
            m.rate,
        )
        for m, b in zip(members, batches, strict=True)
    ]


def equation_1(placement: Placement, workload: Workload, costs: CostModel) -> float:
    """Σ F over a placement's units, requests per second. A model's rate is divided among its replicas in
    proportion to their GPUs; shares are those for decode."""
    models = workload.by_name()
    gpus: dict[str, int] = {}
    for unit in placement.units:
        for placed in unit.models:
            gpus[placed.name] = gpus.get(placed.name, 0) + len(unit.gpus)
    total = 0.0
    for unit in placement.units:
        members = [
            Member(
                models[p.name], models[p.name].rate * len(unit.gpus) / gpus[p.name], max(p.decode_share, 0.1)
            )
            for p in unit.models
        ]
        usable = least_memory(workload.nodes, unit.gpus)
        total += sum(throughput(members, len(unit.gpus), usable, costs) or [0.0])
    return total
