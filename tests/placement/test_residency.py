"""Who is loaded, over time: a world of workers and requests that carries out what `Residency` decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxserve.placement.residency import (
    ModelView,
    PlaceView,
    Residency,
    Rules,
    Sleep,
    Stage,
    View,
    Wake,
)

STEP = 0.25
DRAIN = 1.0
"""Seconds in which the requests of a model that is put to sleep end or give way."""
Key = tuple[str, str]


@dataclass
class Tally:
    """A load and its place's time in memory."""

    key: Key
    size: int
    at: float


@dataclass
class World:
    """One or more workers. A READY model ends one request in each `service` seconds."""

    models: dict[str, ModelView]
    places: dict[Key, PlaceView]
    budgets: dict[str, float]
    rules: Rules = field(default_factory=Rules)
    service: float = 0.5
    now: float = 0.0
    served: int = 0
    loads: list[Tally] = field(default_factory=list)
    sleeps: list[Key] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.residency = Residency(self.rules)
        self.until: dict[Key, float] = {}
        self.next_end: dict[str, float] = {}

    def ask(self, model: str, requests: int = 1) -> None:
        before = self.models[model]
        self.models[model] = replace(before, requests=before.requests + requests, last_used=self.now)

    def view(self) -> View:
        return View(self.now, self.models, tuple(self.places.values()), self.budgets)

    def used(self, worker: str) -> int:
        return sum(
            p.weight_bytes for p in self.places.values() if p.worker == worker and p.stage is not Stage.ASLEEP
        )

    def stage(self, model: str, worker: str = "w") -> Stage:
        return self.places[model, worker].stage

    def step(self) -> list[Wake | Sleep]:
        """One round, and the time until the next."""
        for key, place in self.places.items():
            if self.until.get(key, 0.0) <= self.now:
                if place.stage is Stage.LOADING:
                    self.places[key] = replace(place, stage=Stage.READY, since=self.now)
                elif place.stage is Stage.LEAVING:
                    self.places[key] = replace(place, stage=Stage.ASLEEP)
        decided = self.residency.decide(self.view())
        for each in decided:
            self._carry_out(each)
        for name, model in self.models.items():
            ready = any(p.stage is Stage.READY for p in self.places.values() if p.model == name)
            if not (ready and model.requests):
                self.next_end[name] = self.now + self.service
            elif self.next_end.setdefault(name, self.now + self.service) <= self.now:
                self.models[name] = replace(model, requests=model.requests - 1, last_used=self.now)
                self.next_end[name] = self.now + self.service
                self.served += 1
        for worker, budget in self.budgets.items():
            assert self.used(worker) <= budget
        self.now += STEP
        return decided

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def _carry_out(self, decided: Wake | Sleep) -> None:
        key = decided.model, decided.worker
        place, model = self.places[key], self.models[decided.model]
        if isinstance(decided, Wake):
            assert place.stage is Stage.ASLEEP
            self.places[key] = replace(place, stage=Stage.LOADING)
            self.until[key] = self.now + place.load_seconds
            self.loads.append(Tally(key, place.weight_bytes, self.now))
            return
        assert place.stage is Stage.READY
        self._check_sleep(place, model)
        self.places[key] = replace(place, stage=Stage.LEAVING)
        self.until[key] = self.now + (DRAIN if model.requests else 0.0)
        self.sleeps.append(key)

    def _check_sleep(self, place: PlaceView, model: ModelView) -> None:
        assert not model.pinned
        resident = [p for p in self.places.values() if p.model == place.model and p.stage is Stage.READY]
        assert len(resident) > model.min_resident
        whole = self.rules.residency(place)
        assert self.now >= place.since + (whole if model.requests else whole / 2)


def world(
    sizes: dict[str, int], budget: float, *, loaded: Iterable[str] = (), load_seconds: float = 0.5
) -> World:
    """One worker "w" with these models."""
    here = set(loaded)
    places = {
        (name, "w"): PlaceView(name, "w", Stage.READY if name in here else Stage.ASLEEP, size, load_seconds)
        for name, size in sizes.items()
    }
    return World({name: ModelView() for name in sizes}, places, {"w": budget})


def test_the_first_request_wakes_a_model_where_there_is_room_and_the_next_ones_do_not_load_it_again() -> None:
    w = world({"a": 10, "b": 10}, 20, loaded="a")
    w.ask("b", 5)
    assert w.step() == [Wake("b", "w")]
    w.run(10)
    assert len(w.loads) == 1 and w.served == 5


def test_the_model_that_idles_longest_makes_room_and_others_stay() -> None:
    w = world({"a": 10, "b": 10, "c": 10, "d": 10}, 30, loaded="abc")
    for name, used in (("a", 5.0), ("b", 1.0), ("c", 7.0)):
        w.models[name] = ModelView(last_used=used)
    w.now = 20.0
    w.ask("d")
    assert w.step() == [Sleep("b", "w")]
    assert w.step() == [Wake("d", "w")]
    w.run(2)
    assert (w.stage("a"), w.stage("c"), w.stage("d")) == (Stage.READY,) * 3


def test_of_idle_models_those_of_lower_priority_make_room_first_and_a_busy_one_only_if_none_idles() -> None:
    w = world({"a": 10, "b": 10, "c": 10, "d": 10}, 30, loaded="abc")
    w.models |= {"a": ModelView(priority=1), "b": ModelView(last_used=9.0), "c": ModelView(priority=-5)}
    w.now = 20.0
    w.ask("c", 100)
    w.ask("d")
    assert w.step() == [Sleep("b", "w")]


def test_no_more_is_put_to_sleep_than_makes_room() -> None:
    w = world({"small": 1, "large": 20, "new": 20}, 21, loaded=("small", "large"))
    w.models["large"] = ModelView(last_used=1.0)
    w.now = 20.0
    w.ask("new")
    assert w.step() == [Sleep("large", "w")]


def test_what_was_just_loaded_stays_for_half_of_its_residency_though_it_idles() -> None:
    w = world({"a": 10, "b": 10}, 10)
    w.ask("a")
    w.step()
    w.ask("b")
    while w.stage("b") is Stage.ASLEEP:
        w.step()
    (a, b) = w.loads
    assert a.at + 0.5 + 2.5 <= b.at <= a.at + 0.5 + 2.5 + 1.5


def test_a_pinned_model_stays_and_who_needs_its_room_is_told_that_there_is_none() -> None:
    w = world({"a": 10, "b": 10}, 10, loaded="a")
    w.models["a"] = ModelView(pinned=True)
    w.ask("b")
    w.run(100)
    assert w.stage("a") is Stage.READY and not w.sleeps
    assert w.residency.room_at(w.view())["b", "w"] == float("inf")


def test_a_model_that_is_pinned_while_it_sleeps_is_woken() -> None:
    w = world({"a": 10, "b": 10}, 10, loaded="a")
    w.models["b"] = ModelView(pinned=True)
    w.run(20)
    assert (w.stage("a"), w.stage("b")) == (Stage.ASLEEP, Stage.READY)


def test_one_for_whom_there_can_be_no_room_does_not_hold_up_the_others() -> None:
    w = world({"pinned": 10, "huge": 20, "small": 5}, 20, loaded=("pinned",))
    w.models["pinned"] = ModelView(pinned=True)
    w.ask("huge")
    w.run(1)
    w.ask("small")
    w.run(3)
    assert w.served == 1 and w.stage("small") is Stage.READY


def test_as_many_replicas_stay_as_the_model_says_and_missing_ones_are_woken() -> None:
    w = world({"a": 10}, 10)
    w.models["a"] = ModelView(min_resident=2, keep_alive=1.0)
    for worker in ("v", "u"):
        w.places["a", worker] = PlaceView("a", worker, Stage.ASLEEP, 10, 0.5)
        w.budgets[worker] = 10
    w.run(100)
    assert sorted(place.stage.value for place in w.places.values()) == ["asleep", "ready", "ready"]
    assert len(w.loads) == 2


def test_a_model_that_nobody_uses_sleeps_after_its_time_though_nobody_needs_the_room() -> None:
    w = world({"a": 10, "b": 10}, 20, loaded="ab")
    w.models["a"] = ModelView(keep_alive=30.0)
    w.ask("a")
    w.run(29)
    assert w.stage("a") is Stage.READY
    w.run(3)
    assert (w.stage("a"), w.stage("b")) == (Stage.ASLEEP, Stage.READY)


def test_a_large_model_is_not_overtaken_by_small_ones() -> None:
    w = world({"large": 30, **{f"s{n}": 10 for n in range(6)}}, 30, loaded=("s0", "s1", "s2"))
    for n in range(6):
        w.ask(f"s{n}", 1000)
    w.run(1)
    w.ask("large")
    w.run(20)
    assert w.stage("large") is Stage.READY or w.models["large"].requests == 0


def test_a_worker_that_is_away_is_left_alone() -> None:
    w = world({"a": 10, "b": 10}, 10, loaded="a")
    w.budgets = {}
    w.ask("b")
    w.run(30)
    assert not w.loads and not w.sleeps


def test_places_on_somebody_elses_order_are_left_alone() -> None:
    w = world({"a": 10, "b": 10}, 10)
    w.places["a", "w"] = replace(w.places["a", "w"], stage=Stage.FIXED)
    w.ask("b")
    w.run(30)
    assert not w.loads and not w.sleeps


@pytest.mark.parametrize(("busy", "expected"), [(False, 2.5), (True, 5.0)])
def test_when_there_will_be_room(busy: bool, expected: float) -> None:
    w = world({"a": 10, "b": 10, "c": 10}, 10, loaded="a")
    w.now = 1.0
    if busy:
        w.ask("a", 100)
    assert w.residency.room_at(w.view())["b", "w"] == expected
    w.ask("b")
    # c would have to wait for b, which is loaded first and then used.
    assert w.residency.room_at(w.view())["c", "w"] == expected + 0.5 + 5.0
    w.now = 20.0
    assert w.residency.room_at(w.view())["b", "w"] == 20.0


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Up to eight models on one or two workers; each fits a worker beside what is protected there."""
    workers = draw(st.sampled_from((("w",), ("w", "v"))))
    names = [f"m{n}" for n in range(draw(st.integers(2, 8)))]
    rules = Rules(draw(st.sampled_from((1.0, 4.0))), draw(st.sampled_from((2.0, 10.0))))
    models, places = {}, {}
    for name in names:
        models[name] = ModelView(
            priority=draw(st.integers(-2, 2)),
            keep_alive=draw(st.sampled_from((0.0, 0.0, 3.0))),
            pinned=draw(st.integers(0, 5)) == 0,
        )
        for worker in draw(st.sampled_from([workers, workers[:1], workers[-1:]])):
            size, seconds = draw(st.integers(1, 10)), draw(st.sampled_from((0.25, 0.5, 1.0)))
            places[name, worker] = PlaceView(name, worker, Stage.ASLEEP, size, seconds)
    pinned = sum(p.weight_bytes for p in places.values() if models[p.model].pinned)
    budgets = {w: float(pinned + draw(st.integers(10, 30))) for w in workers}
    return World(models, places, budgets, rules, service=draw(st.sampled_from((0.25, 1.0))))


@settings(max_examples=150, deadline=None)
@given(world=worlds(), arrivals=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 20)), max_size=60))
def test_whatever_is_asked_for_comes_in_the_end_within_budget_and_bounds(
    world: World, arrivals: list[tuple[int, int]]
) -> None:
    """`World` checks budgets, pins and residencies at every step."""
    names, asked = sorted(world.models), 0
    for number, count in arrivals:
        world.ask(names[number % len(names)], count)
        asked += count
        world.run(number * STEP)
    # No model waits longer than all others are loaded, and stay, once; each then serves for its residency.
    longest = max(world.rules.residency(p) + p.load_seconds + DRAIN for p in world.places.values())
    least = min(world.rules.residency(p) for p in world.places.values())
    turns = 2 + asked * world.service / (least / 2)
    end = world.now + turns * len(names) * (longest + 4 * STEP)
    while world.served < asked and world.now < end:
        world.step()
    assert world.served == asked
    _check_bound(world, 60.0, least / 2)


@settings(max_examples=40, deadline=None)
@given(
    order=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    gap=st.sampled_from((0.0, 0.25, 1.0, 3.0)),
    burst=st.sampled_from((1, 50)),
)
def test_loads_per_minute_are_bounded_under_any_alternating_load(
    order: list[int], gap: float, burst: int
) -> None:
    w = world({f"m{n}": 10 for n in range(6)}, 30)
    w.service = 0.25
    while w.now < 120:
        for number in order:
            w.ask(f"m{number}", burst)
            w.run(gap or STEP)
    _check_bound(w, 60.0, w.rules.residency(next(iter(w.places.values()))) / 2)


def _check_bound(world: World, window: float, stay: float) -> None:
    """Weights loaded within a window occupy memory for `stay` seconds each, so there is a most."""
    for worker, budget in world.budgets.items():
        loads = [load for load in world.loads if load.key[1] == worker]
        for first in loads:
            inside = sum(each.size for each in loads if first.at <= each.at < first.at + window)
            assert inside <= budget * (2 + window / stay)
