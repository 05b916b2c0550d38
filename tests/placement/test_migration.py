"""The state machine of migrations, with no worker, no Redis and no clock: whatever dies, it converges."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from muxserve.common.config import ModelEntry
from muxserve.placement import migration as machine
from muxserve.placement.document import (
    ASLEEP,
    DRAINING,
    FAILED,
    LOADING,
    READY,
    Place,
    Plan,
    PlannedModel,
    from_document,
    to_document,
)
from muxserve.placement.fit import Refusal
from muxserve.placement.migration import Seen, advance, leaving, roll_back
from muxserve.v1 import admin_pb2, common_pb2

ENTRY = ModelEntry(name="a", path="100")
WORKERS = ("worker-0", "worker-1")


def entry(worker: str, incarnation: int = 0) -> admin_pb2.ServiceEntry:
    return admin_pb2.ServiceEntry(
        kind="worker", id=worker, address=worker, incarnation=str(incarnation), pid=1
    )


@dataclass
class World:
    """A model on worker-0, and what workers, errands and the scheduler would do about the plan."""

    plan: Plan
    present: set[str] = field(default_factory=lambda: set(WORKERS))
    incarnations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WORKERS, 0))
    open: int = 2
    """Sequences on the source."""
    now: int = 1000
    loaded: dict[str, set[int]] = field(default_factory=lambda: {"worker-0": {0}, "worker-1": set()})
    """By worker: incarnations that have the weights."""

    @classmethod
    def make(cls, source: str = "worker-0", target: str = "worker-1", **more: object) -> World:
        model = PlannedModel(ENTRY.to_proto())
        shape = common_pb2.ModelShape(weight_bytes=100)
        model.add(Place("worker-0", READY, "", shape=shape))
        plan = Plan({"a": model}, {worker: entry(worker) for worker in WORKERS})
        plan.planned = [
            admin_pb2.Migration(
                id="m",
                model="a",
                source_worker=source,
                target_worker=target,
                phase=machine.PLANNED,
                drain_seconds=1.0,
                **more,  # type: ignore[arg-type]
            )
        ]
        return cls(plan)

    @property
    def states(self) -> dict[str, int]:
        return {place.worker: place.state for _, place in self.plan.places()}

    @property
    def phase(self) -> int:
        now = self.plan.migration or (self.plan.planned[0] if self.plan.planned else self.plan.ended[0])
        return now.phase

    def step(self) -> int:
        """One round of the reconciler."""
        for worker in WORKERS:
            if worker in self.present:
                self.plan.meet(entry(worker, self.incarnations[worker]))
            else:
                self.plan.lose(worker)
        advance(self.plan, Seen(self.present, self.open, self.now))
        assert self.plan.models["a"].places, "a model never loses its last place"
        return self.phase

    def place(self, worker: str) -> Place:
        return self.plan.models["a"].places[worker]

    def load(self, worker: str, fails: bool = False) -> None:
        """An errand: what is to be loaded there is, or cannot be."""
        place = self.plan.models["a"].places.get(worker)
        if place is None or place.state != LOADING or worker not in self.present:
            return
        if fails:
            place.fail(Refusal("no room", "weight_budget"))
        else:
            self.loaded[worker] = {self.incarnations[worker]}
            place.ready()

    def unload(self, worker: str) -> None:
        """An errand: what is to be unloaded there is, unless sequences are open."""
        model = self.plan.models["a"]
        place = model.places.get(worker)
        if place is None or worker not in self.present or not place.occupied:
            return
        busy = worker == "worker-0" and self.open
        if (place.state == ASLEEP or leaving(self.plan, model, place)) and not busy:
            self.loaded[worker] = set()
            place.occupied = False

    def die(self, worker: str) -> None:
        self.present.discard(worker)
        self.loaded[worker] = set()
        if worker == "worker-0":
            self.open = 0

    def come_back(self, worker: str) -> None:
        if worker not in self.present:
            self.incarnations[worker] += 1
            self.present.add(worker)

    def restart_placement(self) -> None:
        self.plan = from_document(to_document(self.plan), [ENTRY])


def test_a_move_goes_through_its_phases() -> None:
    world = World.make()
    assert world.step() == machine.LOADING
    assert world.states == {"worker-0": READY, "worker-1": LOADING}
    assert world.step() == machine.LOADING
    world.load("worker-1")
    assert world.step() == machine.HANDING_OVER
    assert world.states == {"worker-0": DRAINING, "worker-1": READY}
    assert world.place("worker-0").drain_until == 2000
    assert world.step() == machine.HANDING_OVER
    world.now = 2000
    assert world.step() == machine.DRAINING_SOURCE
    world.unload("worker-0")
    assert world.place("worker-0").occupied, "it is not time yet"
    world.open = 0
    assert world.step() == machine.UNLOADING
    world.unload("worker-0")
    assert world.step() == machine.DONE
    assert world.states == {"worker-1": READY}
    assert world.plan.migration is None


def test_an_idle_source_is_not_waited_for() -> None:
    world = World.make()
    world.open = 0
    world.step()
    world.load("worker-1")
    assert [world.step(), world.step()] == [machine.HANDING_OVER, machine.UNLOADING]


def test_a_load_ends_with_one_place_more() -> None:
    world = World.make(source="")
    world.step()
    world.load("worker-1")
    assert world.step() == machine.DONE
    assert world.states == {"worker-0": READY, "worker-1": READY}


def test_the_last_place_goes_to_sleep_rather_than_away() -> None:
    world = World.make(target="")
    assert world.step() == machine.HANDING_OVER
    world.open = 0
    assert world.step() == machine.UNLOADING
    world.unload("worker-0")
    assert world.step() == machine.DONE
    assert world.states == {"worker-0": ASLEEP}


def test_a_model_that_sleeps_moves_without_being_loaded() -> None:
    world = World.make()
    world.open = 0
    world.place("worker-0").sleep()
    for _ in range(6):
        world.step()
        world.unload("worker-0")
        world.unload("worker-1")
    assert (world.phase, world.states) == (machine.DONE, {"worker-1": ASLEEP})


def test_a_target_that_cannot_load_it_leaves_everything_as_it_was() -> None:
    world = World.make()
    world.step()
    world.load("worker-1", fails=True)
    assert world.step() == machine.ROLLING_BACK
    world.unload("worker-1")
    assert world.step() == machine.ROLLED_BACK
    assert (world.states, world.plan.ended[0].error) == ({"worker-0": READY}, "no room")


def test_a_dead_target_hands_back_to_the_source() -> None:
    world = World.make()
    world.step()
    world.load("worker-1")
    assert world.step() == machine.HANDING_OVER
    world.die("worker-1")
    assert world.step() == machine.ROLLING_BACK
    assert world.states["worker-0"] == READY
    assert world.step() == machine.ROLLED_BACK
    assert world.states == {"worker-0": READY}


def test_a_dead_source_has_nothing_to_hand_over() -> None:
    world = World.make()
    world.step()
    world.load("worker-1")
    world.step()
    world.die("worker-0")
    assert [world.step(), world.step()] == [machine.UNLOADING, machine.DONE]
    assert world.states == {"worker-1": READY}


def test_a_source_that_died_before_the_target_was_ready_is_not_waited_for() -> None:
    world = World.make()
    world.step()
    world.die("worker-0")
    assert world.step() == machine.LOADING
    world.load("worker-1")
    for _ in range(3):
        world.step()
    assert (world.phase, world.states) == (machine.DONE, {"worker-1": READY})


def test_what_cannot_begin_is_not_begun() -> None:
    world = World.make()
    world.plan.drained.add("worker-1")
    assert world.step() == machine.ROLLED_BACK
    assert "drained" in world.plan.ended[0].error
    assert world.states == {"worker-0": READY}


@pytest.mark.parametrize("before", [machine.LOADING, machine.HANDING_OVER, machine.DRAINING_SOURCE])
def test_it_can_be_cancelled_until_the_source_is_unloaded(before: int) -> None:
    world = World.make()
    while world.step() != before:
        world.load("worker-1")
        world.now += 600
    roll_back(world.plan, "cancelled")
    assert world.states["worker-0"] == READY
    world.unload("worker-1")
    assert world.step() == machine.ROLLED_BACK
    assert world.states == {"worker-0": READY}


def test_it_is_resumed_from_the_document_in_every_phase() -> None:
    world = World.make()
    seen = []
    while not world.plan.ended:
        seen.append(world.step())
        world.restart_placement()
        world.load("worker-1")
        world.now += 600
        world.open = max(0, world.open - (world.phase == machine.DRAINING_SOURCE))
        world.unload("worker-0")
    assert world.states == {"worker-1": READY}
    assert list(dict.fromkeys(seen[:-1])) == [
        machine.LOADING,
        machine.HANDING_OVER,
        machine.DRAINING_SOURCE,
        machine.UNLOADING,
    ]


@pytest.mark.parametrize("seed", range(300))
def test_whatever_dies_it_converges_to_a_valid_placement(seed: int) -> None:
    chance = random.Random(seed)
    source, target = chance.choice([("worker-0", "worker-1"), ("", "worker-1"), ("worker-0", "")])
    world = World.make(source=source, target=target, asleep=chance.random() < 0.2)
    for _ in range(chance.randrange(40)):
        worker = chance.choice(WORKERS)
        acts: list[Callable[[], object]] = [
            world.step,
            world.step,
            world.step,
            world.restart_placement,
            partial(world.load, worker, fails=chance.random() < 0.15),
            partial(world.unload, worker),
            partial(world.die, worker),
            partial(world.come_back, worker),
            partial(setattr, world, "open", max(0, world.open - 1)),
            partial(setattr, world, "now", world.now + 400),
        ]
        chance.choice(acts)()
        if world.plan.migration and chance.random() < 0.03 and world.phase in machine.REVERSIBLE:
            roll_back(world.plan, "cancelled")
    for _ in range(20):  # nothing fails any more
        world.now += 400
        world.open = max(0, world.open - 1)
        for worker in WORKERS:
            world.come_back(worker)
        world.step()
        for worker in WORKERS:
            world.load(worker)
            world.unload(worker)
    assert world.plan.migration is None and not world.plan.planned
    states = world.states
    assert set(states.values()) <= {READY, ASLEEP, FAILED}
    for worker in WORKERS:
        has = world.incarnations[worker] in world.loaded[worker]
        assert has == (states.get(worker) == READY), "what the document says is what is there"
    (ended,) = world.plan.ended
    done = ended.phase == machine.DONE
    expected = {("worker-0", "worker-1"): {"worker-1"}, ("", "worker-1"): set(WORKERS)}
    assert states.keys() == (expected.get((source, target), {"worker-0"}) if done else {"worker-0"})
