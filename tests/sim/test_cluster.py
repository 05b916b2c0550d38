"""The simulator: laws that any queueing system obeys, and that it is the service's policies that decide."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from muxserve.placement.solver.cost import Service
from muxserve.placement.solver.placement import Placement, Unit
from muxserve.placement.solver.workload import Workload
from muxserve.scheduler import policy as service_policies
from muxserve.scheduler.policy.adbs import Adbs
from muxserve.scheduler.policy.interface import Decision, Event, Finished, JobEnded, PolicyOptions, Snapshot
from muxserve.sim import cluster
from muxserve.sim.arrivals import Arrival, poisson
from muxserve.sim.cluster import Outcome, SimOptions, simulate
from muxserve.sim.report import report
from tests.placement.solver.inputs import COSTS
from tests.sim.inputs import together, two_models

POLICIES = sorted(service_policies.POLICIES)


def run(
    work: Workload, placement: Placement, duration: float, policy: str = "adbs", **options: float
) -> Outcome:
    arrivals = poisson(work, duration, seed=1)
    chosen = SimOptions(policy=policy, checked=True, **options)  # type: ignore[arg-type]
    return simulate(placement, work, COSTS, arrivals, duration, chosen)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_arrives_is_served_once_and_in_full(policy: str) -> None:
    work = two_models()
    outcome = run(work, together(work, 0), 20, policy)
    assert len(outcome.requests) == len(poisson(work, 20, 1)) > 20
    for request in outcome.requests:
        assert request.emitted == request.output
        assert request.arrival < request.first <= request.finish


def test_littles_law() -> None:
    """The mean number in the system is the rate times the mean time in it."""
    work = two_models(4.0)
    outcome = run(work, together(work, 0, 1), 60)
    events = [(r.arrival, 1) for r in outcome.requests] + [(r.finish, -1) for r in outcome.requests]
    area, present, before = 0.0, 0, 0.0
    for at, change in sorted(events):
        area += present * (at - before)
        present, before = present + change, at
    assert present == 0
    rate = len(outcome.requests) / outcome.ended
    sojourn = sum(r.finish - r.arrival for r in outcome.requests) / len(outcome.requests)
    assert area / outcome.ended == pytest.approx(rate * sojourn)


def test_the_law_of_utilisation() -> None:
    """A lone sequence after another keeps the mesh busy for exactly as long as its jobs take."""
    work = two_models()
    arrivals = [Arrival(100.0 * i, "hot", 100, 50) for i in range(3)]
    outcome = simulate(together(work, 0), work, COSTS, arrivals, 300, SimOptions())
    one = outcome.requests[0]
    assert sum(outcome.busy) == pytest.approx(sum(r.finish - r.arrival for r in outcome.requests))
    steps = sum(COSTS.decode("llama-7b", 1, 1.0, 1, 100 + n) for n in range(1, 50))
    alone = COSTS.prefill("llama-7b", 1, 1.0, 1, 100) + steps
    assert one.finish - one.arrival == pytest.approx(alone, rel=0.02)


def test_the_same_arguments_give_the_same_outcome() -> None:
    work = two_models()
    first, second = (run(work, together(work, 0, 1), 20) for _ in range(2))
    assert [(r.first, r.finish) for r in first.requests] == [(r.first, r.finish) for r in second.requests]
    assert first.decisions == second.decisions


def test_another_seed_gives_other_requests_and_a_model_keeps_its_own() -> None:
    work = two_models()
    assert poisson(work, 20, 1) != poisson(work, 20, 2)
    alone = Workload(work.nodes, work.models[:1])
    assert poisson(alone, 20, 1) == [a for a in poisson(work, 20, 1) if a.model == "hot"]


def test_arrivals_have_the_rate_and_the_lengths_that_were_asked_for() -> None:
    work = two_models(40.0)
    arrivals = [a for a in poisson(work, 200, 3) if a.model == "hot"]
    assert len(arrivals) / 200 == pytest.approx(40, rel=0.05)
    assert sum(a.prompt for a in arrivals) / len(arrivals) == pytest.approx(100, rel=0.05)
    assert sum(a.output for a in arrivals) / len(arrivals) == pytest.approx(200, rel=0.05)


def test_the_policies_are_the_services_own() -> None:
    """The objects that decide here are instances of the classes that the scheduler makes its own from."""
    work = two_models()
    for name in POLICIES:
        units = cluster._Cluster(together(work, 0), work, COSTS, SimOptions(policy=name)).units
        assert type(units[0].policy) is type(service_policies.create(name, PolicyOptions()))


def test_every_decision_comes_from_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Watching(Adbs):
        def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
            asked.append(now)
            return super().decide(snapshot, now)

    monkeypatch.setitem(service_policies.POLICIES, "watching", Watching)
    work = two_models()
    outcome = run(work, together(work, 0), 10, "watching")
    assert len(asked) == outcome.decisions > 0
    assert asked == sorted(asked)


def test_the_policy_is_told_what_the_service_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every job and of every request, and what it asks for of a sequence."""
    heard: list[Event] = []
    prompts: set[int] = set()

    class Listening(Adbs):
        def observe(self, event: Event) -> None:
            heard.append(event)
            super().observe(event)

        def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
            prompts.update(r.prompt for m in snapshot.models for r in m.running)
            return super().decide(snapshot, now)

    monkeypatch.setitem(service_policies.POLICIES, "adbs", Listening)
    work = two_models()
    outcome = run(work, together(work, 0), 5)
    ended = {event.sequence: event for event in heard if isinstance(event, Finished)}
    assert set(ended) == {request.number for request in outcome.requests}
    for request in outcome.requests:
        event = ended[request.number]
        assert (event.model, event.output, event.expired) == (request.model, request.output, False)
        assert event.seconds == pytest.approx(request.finish - request.arrival)
    assert any(isinstance(event, JobEnded) for event in heard)
    assert prompts <= {request.prompt for request in outcome.requests}


def test_what_was_measured_of_a_deployment_is_simulated() -> None:
    measured = Service(
        0.02, compute_units=2, slots=8, decode_lanes=2, order_seconds=0.005, lease_seconds=0.001
    )
    options = SimOptions(policy="mux").of_service(measured)
    assert (options.policy, options.compute_units, options.slots) == ("mux", 2, 8)
    assert (options.decode_lanes, options.order_seconds, options.lease_seconds) == (2, 0.005, 0.001)
    work = two_models()
    plain, late = (
        simulate(together(work, 0), work, COSTS, [Arrival(1.0, work.models[0].name, 16, 1)], 5, each)
        for each in (SimOptions(), SimOptions(request_seconds=0.02, order_seconds=0.005))
    )
    assert late.requests[0].first == pytest.approx(plain.requests[0].first + 0.02), "its order among them"


def test_replicas_share_a_models_queue() -> None:
    work = two_models(8.0)
    one, two = (run(work, together(work, *gpus), 40) for gpus in ((0,), (0, 1)))
    assert max(two.busy) < 1.3 * min(two.busy)
    slow, quick = (sum(r.finish - r.arrival for r in o.requests) / len(o.requests) for o in (one, two))
    assert quick < slow


def test_a_unit_without_memory_to_spare_preempts_and_still_serves_everybody() -> None:
    work = two_models(2.0)
    small = Workload(
        tuple(type(node)(node.gpus, 48 * 2**30) for node in work.nodes), work.models, work.constraints
    )
    arrivals = [Arrival(0.01 * i, random.Random(i).choice(("hot", "cold")), 300, 300) for i in range(60)]
    placement = together(small, 0)
    placement.verify(small, COSTS)
    outcome = simulate(placement, small, COSTS, arrivals, 10, SimOptions(checked=True, patience=1e4))
    assert outcome.preemptions > 0
    assert all(r.emitted == r.output for r in outcome.requests)


def test_a_model_without_a_place_is_not_served_and_counts_as_missed() -> None:
    work = two_models()
    placement = together(work, 0)
    alone = Placement(tuple(Unit(u.gpus, u.models[:1]) for u in placement.units))
    result = report(run(work, alone, 20), alone, work, COSTS)
    assert result.models["cold"].unfinished == result.models["cold"].requests > 0
    assert result.models["cold"].attainment["20"] == 0
    assert result.worst == "cold"
    assert result.least_served == 0


def test_overload_is_reported_as_such() -> None:
    work = two_models(200.0)
    placement = together(work, 0)
    result = report(run(work, placement, 15, patience=5.0), placement, work, COSTS)
    assert result.total.served < 0.5
    assert result.total.unfinished > 0
    assert result.total.attainment["8"] < 0.9
    assert result.utilisation[0] > 0.95


def test_a_report_adds_up() -> None:
    work = two_models(4.0)
    placement = together(work, 0, 1)
    result = report(run(work, placement, 40), placement, work, COSTS)
    assert result.total.requests == sum(m.requests for m in result.models.values())
    assert result.total.throughput == pytest.approx(sum(m.throughput for m in result.models.values()))
    values = list(result.total.attainment.values())
    assert values == sorted(values)
    assert result.total.ttft.p50 <= result.total.ttft.p99
    assert result.gpus == 2
    shown = result.as_object()
    assert set(shown["models"]) == {"hot", "cold"}
    assert shown["total"]["attainment"]["8"] == result.total.attainment["8"]


def test_progress_reaches_the_end() -> None:
    work = two_models()
    seen: list[float] = []
    simulate(together(work, 0), work, COSTS, poisson(work, 30, 1), 30, SimOptions(), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
