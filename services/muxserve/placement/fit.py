"""Which model goes to which worker. Pure: capacities and sizes in, an assignment out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
    stays: bool = False
    """Whether its weights have to stay loaded."""
    priority: int = 0
    """Where not all can be loaded, those of higher priority are first."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker has left."""

    worker: str
    weight_bytes: int | None
    """Bytes that weights may still take; None: no limit."""
    load: float = 0.0
    """Sum of the loads of the models that it has."""
    for_turns: int = 0
    """Bytes that weights may take which need not stay loaded: of models there that are put to sleep for one
    another."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A decision for every model that was asked about."""

    assigned: Mapping[str, str] = field(default_factory=dict)
    """Model name to worker id."""
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    """Model name to why not."""
    asleep: Collection[str] = ()
    """Those of the assigned for which there is room only while others sleep."""


@dataclass(slots=True)
class _Bin:
    worker: str
    room: float
    load: float
    for_turns: float


_Choice = Callable[[_Bin], tuple[float, float, str]]


def fit(demands: Sequence[Demand], capacities: Sequence[Capacity]) -> Fit:
    """Assign each model to one worker with room for its weights, heaviest first.

    Models are spread by load. Where that leaves one without a place they are packed as tightly as possible
    (best-fit decreasing: within 11/9 of the optimum; Johnson, 1973). If that leaves one without a place too,
    they take turns: those that have to stay are loaded, then those of the highest priority and load, and the
    others sleep where they fit once they are woken.
    """
    spread = _fill(_by_size(demands), _bins(capacities), _least_loaded)
    if not spread.refused:
        return spread
    packed = _fill(_by_size(demands), _bins(capacities), lambda bin: (bin.room, bin.load, bin.worker))
    if not packed.refused:
        return packed
    turns = _take_turns(demands, _bins(capacities))
    return max(spread, packed, turns, key=lambda fit: len(fit.assigned))


def _by_size(demands: Sequence[Demand]) -> Sequence[Demand]:
    return sorted(demands, key=lambda d: (-max(d.weight_bytes.values(), default=0), d.name))


def _bins(capacities: Sequence[Capacity]) -> Sequence[_Bin]:
    return [
        _Bin(c.worker, float("inf") if c.weight_bytes is None else c.weight_bytes, c.load, c.for_turns)
        for c in capacities
    ]


def _least_loaded(bin: _Bin) -> tuple[float, float, str]:
    return bin.load, -bin.room, bin.worker


def _take_turns(demands: Sequence[Demand], bins: Sequence[_Bin]) -> Fit:
    staying = [demand for demand in demands if demand.stays]
    others = sorted(
        (demand for demand in demands if not demand.stays), key=lambda d: (-d.priority, -d.load, d.name)
    )
    first = _fill(_by_size(staying), bins, _least_loaded)
    for demand in staying:
        if worker := first.assigned.get(demand.name):
            next(bin for bin in bins if bin.worker == worker).for_turns -= demand.weight_bytes[worker]
    second = _fill(others, bins, _least_loaded)
    assigned, refused = {**first.assigned, **second.assigned}, {**first.refused, **second.refused}
    asleep = []
    for demand in others:
        sizes = demand.weight_bytes
        fitting = [bin for bin in bins if bin.worker in sizes and sizes[bin.worker] <= bin.for_turns]
        if demand.name in refused and fitting:
            best = min(fitting, key=_least_loaded)
            best.load += demand.load
            assigned[demand.name] = best.worker
            del refused[demand.name]
            asleep.append(demand.name)
    return Fit(assigned, refused, asleep)


def _fill(demands: Sequence[Demand], bins: Sequence[_Bin], choice: _Choice) -> Fit:
    """Assign in the order of `demands`; `bins` are what is left then."""
    assigned: dict[str, str] = {}
    refused: dict[str, Refusal] = {}
    for demand in demands:
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
