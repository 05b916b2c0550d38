"""Which model goes to which worker. Pure: capacities and sizes in, an assignment out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model cannot be placed."""

    reason: str
    field: str
    """Setting at fault, for example "path" or "arena"; empty if there is none."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A model that looks for a place."""

    name: str
    weight_bytes: Mapping[str, int]
    """By worker id: bytes of its weights there. Workers that refuse the model are absent."""
    load: float = 1.0
    """Relative demand for compute, above 0."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker has left."""

    worker: str
    weight_bytes: int | None
    """Bytes that weights may still take; None: no limit."""
    load: float = 0.0
    """Sum of the loads of the models that it has."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A decision for every model that was asked about."""

    assigned: Mapping[str, str] = field(default_factory=dict)
    """Model name to worker id."""
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    """Model name to why not."""


@dataclass(slots=True)
class _Bin:
    worker: str
    room: float
    load: float


_Choice = Callable[[_Bin], tuple[float, float, str]]


def fit(demands: Sequence[Demand], capacities: Sequence[Capacity]) -> Fit:
    """Assign each model to one worker with room for its weights, heaviest first.

    Models are spread by load. Where that leaves one without a place they are packed as tightly as possible
    (best-fit decreasing: within 11/9 of the optimum; Johnson, 1973), which is taken if it places more.
    """
    spread = _fill(demands, capacities, lambda bin: (bin.load, -bin.room, bin.worker))
    if not spread.refused:
        return spread
    packed = _fill(demands, capacities, lambda bin: (bin.room, bin.load, bin.worker))
    return packed if len(packed.assigned) > len(spread.assigned) else spread


def _fill(demands: Sequence[Demand], capacities: Sequence[Capacity], choice: _Choice) -> Fit:
    bins = [
        _Bin(c.worker, float("inf") if c.weight_bytes is None else c.weight_bytes, c.load) for c in capacities
    ]
    assigned: dict[str, str] = {}
    refused: dict[str, Refusal] = {}
    for demand in sorted(demands, key=lambda d: (-max(d.weight_bytes.values(), default=0), d.name)):
        sizes = demand.weight_bytes
        open_bins = [bin for bin in bins if bin.worker in sizes and sizes[bin.worker] <= bin.room]
        if not open_bins:
            refused[demand.name] = _refusal(demand, bins)
            continue
        best = min(open_bins, key=choice)
        best.room -= sizes[best.worker]
        best.load += demand.load
        assigned[demand.name] = best.worker
    return Fit(assigned, refused)


def _refusal(demand: Demand, bins: Sequence[_Bin]) -> Refusal:
    candidates = [bin for bin in bins if bin.worker in demand.weight_bytes]
    if not candidates:
        return Refusal("there is no worker for it", "")
    largest = max(candidates, key=lambda bin: bin.room)
    needs = demand.weight_bytes[largest.worker] / MIB
    return Refusal(
        f"its weights need {needs:.1f} MiB, largest free is {largest.room / MIB:.1f} MiB on {largest.worker}",
        "weight_budget",
    )
