"""`simulate`: a whole cluster under a placement, from the first arrival until all is served or time is up."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from muxserve.placement.solver.cost import CostModel, Service
from muxserve.placement.solver.placement import Placement, kv_room, least_memory
from muxserve.placement.solver.workload import Workload
from muxserve.scheduler import policy as policies
from muxserve.scheduler.policy.interface import PolicyOptions
from muxserve.sim.arrivals import Arrival
from muxserve.sim.requests import Request
from muxserve.sim.unit import Unit

AHEAD = 16
"""Requests that wait in a unit of the service at most, as a multiple of their model's slots."""
PROGRESS_EVERY = 2000
"""Events between two reports of progress."""


@dataclass(frozen=True, slots=True)
class SimOptions:
    """What is simulated beside placement and workload."""

    policy: str = "adbs"
    options: PolicyOptions = field(default_factory=PolicyOptions)
    """Shares are taken from the placement."""
    slots: int = 256
    """Most sequences of a model that a unit runs at once."""
    ahead: int = 32
    """Most requests of a model that wait in a unit; more stay in the model's queue."""
    request_seconds: float = 0.0
    """On a request's way, beside its jobs."""
    compute_units: int = 0
    """What shares are made of; 0: any share can be had."""
    decode_lanes: int = 1
    """Decode jobs of different models that a unit runs side by side."""
    order_seconds: float = 0.0
    """From the end of a job to the beginning of one that is decided on only then."""
    lease_seconds: float = 0.0
    """Of a decode job, beside its steps."""
    patience: float = 120.0
    """Seconds after the last arrival when the simulation ends, whatever is left."""
    checked: bool = False
    """Whether every unit's books are checked after every decision; slow."""

    def of_service(self, service: Service) -> SimOptions:
        """The same for a deployment that was measured."""
        changed = replace(
            self,
            request_seconds=service.request_seconds,
            compute_units=service.compute_units,
            decode_lanes=service.decode_lanes,
            order_seconds=service.order_seconds,
            lease_seconds=service.lease_seconds,
        )
        if not service.slots:
            return changed
        return replace(changed, slots=service.slots, ahead=AHEAD * service.slots)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened."""

    requests: Sequence[Request]
    """By arrival; those that did not finish have a `finish` of -1."""
    duration: float
    """Seconds in which requests arrived."""
    ended: float
    """When the simulation did."""
    busy: Sequence[float]
    """By unit: seconds in which anything ran."""
    preemptions: int
    decisions: int


def simulate(
    placement: Placement,
    workload: Workload,
    costs: CostModel,
    arrivals: Sequence[Arrival],
    duration: float,
    options: SimOptions,
    progress: Callable[[float], None] = lambda done: None,
) -> Outcome:
    """Run it. The same arguments give the same outcome. `progress` is told the part of time that has passed.

    KeyError: no such policy. InvalidPlacement should have been raised by `verify` before.
    """
    return _Cluster(placement, workload, costs, options).run(arrivals, duration, progress)


class _Cluster:
    """Units, and the queue of each model, which any unit that has the model pulls from."""

    def __init__(
        self, placement: Placement, workload: Workload, costs: CostModel, options: SimOptions
    ) -> None:
        self._options = options
        self._queues: dict[str, deque[Request]] = {m.name: deque() for m in workload.models}
        self._hosts: dict[str, deque[int]] = {m.name: deque() for m in workload.models}
        """Units that have it; the one that was served longest ago comes first, as with blocked readers."""
        for number, planned in enumerate(placement.units):
            for placed in planned.models:
                self._hosts[placed.name].append(number)
        self.units = [
            self._make(placement, number, workload, costs) for number in range(len(placement.units))
        ]
        self._events: list[tuple[float, int, int]] = []
        """(time, unit, version)."""
        self._versions = [0] * len(self.units)

    def run(self, arrivals: Sequence[Arrival], duration: float, progress: Callable[[float], None]) -> Outcome:
        requests = [Request(i, a.model, a.time, a.prompt, a.output) for i, a in enumerate(arrivals, 1)]
        end = (arrivals[-1].time if arrivals else 0.0) + self._options.patience
        at, count, now = 0, 0, 0.0
        events = self._events
        # A request's way includes the order for its first job, which every job has.
        late = max(0.0, self._options.request_seconds - self._options.order_seconds)
        while True:
            count += 1
            if count % PROGRESS_EVERY == 0:
                progress(min(1.0, now / max(duration, 1e-9)))
            while events and events[0][2] != self._versions[events[0][1]]:
                heapq.heappop(events)
            due = events[0][0] if events else float("inf")
            coming = requests[at].arrival + late if at < len(requests) else float("inf")
            now = min(due, coming)
            if now > end or now == float("inf"):
                break
            if coming <= due:
                self._arrive(requests[at], now)
                at += 1
            else:
                self._step(events[0][1], now)
        progress(1.0)
        return Outcome(
            requests,
            duration,
            min(end, max((r.finish for r in requests), default=0.0)),
            [unit.executor.busy for unit in self.units],
            sum(unit.preemptions for unit in self.units),
            sum(unit.decisions for unit in self.units),
        )

    def _arrive(self, request: Request, now: float) -> None:
        self._queues[request.model].append(request)
        for number in self._pull(request.model):
            unit = self.units[number]
            idle = unit.advance(now) or not unit.prefilling
            # While a prefill runs no other one is begun: what came in waits for that in any case.
            self._turn(number, decide=idle)

    def _step(self, number: int, now: float) -> None:
        unit = self.units[number]
        decide = unit.advance(now)
        for model in unit.models:
            if self._queues[model]:
                self._pull(model)
        self._turn(number, decide)

    def _turn(self, number: int, decide: bool) -> None:
        unit = self.units[number]
        if decide:
            unit.decide()
            if self._options.checked:
                unit.check()
        self._versions[number] += 1
        due = unit.next_event()
        if due != float("inf"):
            heapq.heappush(self._events, (due, number, self._versions[number]))

    def _pull(self, model: str) -> list[int]:
        """Hand requests that wait in the queue to units with room; the units that got some."""
        queue, hosts, served = self._queues[model], self._hosts[model], []
        while queue:
            number = next((n for n in hosts if self.units[n].room(model) > 0), None)
            if number is None:
                break
            hosts.remove(number)
            hosts.append(number)
            self.units[number].deliver(queue.popleft())
            served.append(number)
        return served

    def _make(self, placement: Placement, number: int, workload: Workload, costs: CostModel) -> Unit:
        planned, models = placement.units[number], workload.by_name()
        degree = len(planned.gpus)
        usable = least_memory(workload.nodes, planned.gpus)
        kv_bytes = kv_room(usable, degree, [models[p.name].shape.weight_bytes for p in planned.models])
        shares = self._options.options
        if planned.models:
            shares = replace(
                shares,
                prefill_share=max(p.prefill_share for p in planned.models),
                decode_share=max(p.decode_share for p in planned.models),
            )
        return Unit(
            policies.create(self._options.policy, shares),
            [(models[p.name], models[p.name].rate / len(self._hosts[p.name])) for p in planned.models],
            costs,
            degree,
            kv_bytes,
            self._options.slots,
            self._options.ahead,
            lambda request: None,
            self._options.compute_units,
            self._options.decode_lanes,
            self._options.order_seconds,
            self._options.lease_seconds,
        )
