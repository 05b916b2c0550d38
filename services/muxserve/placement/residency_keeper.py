"""`Keeper`: carries out what `Residency` decides, in every round of the reconciler, through the plan."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping

import structlog

from muxserve.common.errors import ServiceError
from muxserve.placement.document import ASLEEP, DRAINING, LOADING, READY, Place, Plan, PlannedModel
from muxserve.placement.residency import ModelView, PlaceView, Residency, Rules, Stage, View, Wake
from muxserve.placement.residency_demand import Demand, Use
from muxserve.placement.settings import PlacementSettings
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

QUICK, SLOW = 0.1, 0.3
"""Seconds between rounds, while something sleeps and otherwise."""
NOTICED = 0.2
"""Seconds that a wait is longer than the load: until it is noticed who waits, and that it is loaded."""
RETRY = 1.0
"""Seconds after which a worker is asked again that did not say what its weights may take."""
START, BANDWIDTH = 0.5, 0.5e9
"""What loading is expected to take while none was measured: seconds, and bytes in each further second."""
FORGOTTEN = 60.0
"""Seconds in which half of what a load took longer than expected is forgotten."""
COARSE = 0.25
"""Seconds by which the moment has to change at which there will be room, to be written again."""

Entry = admin_pb2.ServiceEntry
Key = tuple[str, str]
"""Model and worker."""


class Keeper:
    """An `Adviser`: wakes and puts to sleep, and says in the document how long a request has to wait."""

    def __init__(
        self,
        settings: PlacementSettings,
        demand: Demand,
        calls: WorkerCalls,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`wake` asks for a round; `clock`: Unix time."""
        self._drain_seconds = settings.drain_seconds
        rules = Rules(settings.residency, settings.residency_factor, settings.residency_most)
        self._residency = Residency(rules)
        self._demand = demand
        self._calls = calls
        self._wake = wake
        self._clock = clock
        self._budgets: dict[tuple[str, str], float] = {}
        """By id and incarnation of a worker."""
        self._asked: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._since: dict[Key, tuple[int, float]] = {}
        """Of READY places: the number of their load, and when they were first seen so."""
        self._learned: dict[Key, tuple[int, float]] = {}
        """The number of the latest load, and when it was first heard of."""

    async def attend(self, plan: Plan, workers: Mapping[str, Entry]) -> float:
        """See `Adviser`."""
        now = self._clock()
        asleep = any(place.state == ASLEEP for _, place in plan.places())
        uses = await self._demand.read(plan.models, now, closely=asleep)
        budgets = self._known_budgets(workers)
        open_budgets = {name: size for name, size in budgets.items() if name not in plan.drained}
        self._replicate(plan, open_budgets)
        view = self._view(plan, uses, open_budgets, now)
        for decided in self._residency.decide(view):
            model = plan.models[decided.model]
            place = model.places[decided.worker]
            if isinstance(decided, Wake):
                log.info("waking", model=model.name, worker=place.worker)
                place.wake()
            else:
                requests = view.models[model.name].requests
                log.info("putting to sleep", model=model.name, worker=place.worker, requests=requests)
                place.sleep(round(1000 * (now + self._drain_seconds)))
        self._say_waits(plan, workers, self._view(plan, uses, open_budgets, now))
        return QUICK if asleep else SLOW

    async def close(self) -> None:
        """Ask no more."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._demand.close()

    def _view(self, plan: Plan, uses: Mapping[str, Use], budgets: Mapping[str, float], now: float) -> View:
        models = {name: _model_view(plan, model, uses[name]) for name, model in plan.models.items()}
        places = []
        for model, place in plan.places():
            stage, shape = _stage(plan, model, place), place.shape
            if stage is not None and shape is not None:
                since = self._ready_since(model, place, now)
                seconds = self._load_seconds(plan, model, place, now)
                places.append(PlaceView(model.name, place.worker, stage, shape.weight_bytes, seconds, since))
        return View(now, models, [*places, *_to_come(plan)], budgets)

    def _ready_since(self, model: PlannedModel, place: Place, now: float) -> float:
        key = (model.name, place.worker)
        if place.state != READY:
            self._since.pop(key, None)
            return 0.0
        if self._since.get(key, (0, 0.0))[0] != place.loads:
            self._since[key] = (place.loads, now)
        return self._since.setdefault(key, (place.loads, now))[1]

    def _load_seconds(self, plan: Plan, model: PlannedModel, place: Place, now: float) -> float:
        """What loading it took, or is likely to take where it was not loaded yet.

        A load that took unusually long (weights that were made from another format, a busy disk) is forgotten
        with time: nobody would wait for the next one, and so nobody would learn that it is over.
        """
        if place.shape is None:
            return 0.0
        if place.load_seconds:
            key = (model.name, place.worker)
            if self._learned.get(key, (0, 0.0))[0] != place.loads:
                self._learned[key] = (place.loads, now)
            usual = min(place.load_seconds, _prior(place.shape.weight_bytes))
            age = now - self._learned.setdefault(key, (place.loads, now))[1]
            return usual + (place.load_seconds - usual) * math.pow(0.5, age / FORGOTTEN)
        known = [p for _, p in plan.of_worker(place.worker) if p.load_seconds and p.shape is not None]
        expected = sum(_prior(p.shape.weight_bytes) for p in known if p.shape is not None)
        ratio = sum(p.load_seconds for p in known) / expected if known else 1.0
        return ratio * _prior(place.shape.weight_bytes)

    def _say_waits(self, plan: Plan, workers: Mapping[str, Entry], view: View) -> None:
        rooms = self._residency.room_at(view)
        for model, place in plan.places():
            room = rooms.get((model.name, place.worker))
            if place.state == ASLEEP and room is not None:
                wait = self._load_seconds(plan, model, place, view.now) + NOTICED
                place.expected_wait = _about(place.expected_wait, math.inf if math.isinf(room) else wait)
                place.room_at = _coarsely(place.room_at, room, view.now)
                continue
            place.room_at = 0
            if not (place.woken and place.worker in workers):
                place.expected_wait = 0.0
            elif not place.expected_wait:  # it was woken before anybody could have read that it slept
                place.expected_wait = round(self._load_seconds(plan, model, place, view.now) + NOTICED, 2)

    def _replicate(self, plan: Plan, budgets: Mapping[str, float]) -> None:
        """Give models as many places as have to be loaded; they are asleep, so that they are woken."""
        for model in plan.models.values():
            if not model.places or plan.migration is not None:
                continue
            shape = next(iter(model.places.values())).shape
            free = sorted(budgets.keys() - model.places.keys(), key=lambda w: len(plan.of_worker(w)))
            while shape is not None and free and len(model.places) < model.config.min_resident:
                place = model.add(Place(free.pop(0), shape=shape, occupied=False))
                place.sleep()
                log.info("replica placed", model=model.name, worker=place.worker)

    def _known_budgets(self, workers: Mapping[str, Entry]) -> dict[str, float]:
        """Of those workers that have said what their weights may take; the others are asked."""
        present = {(entry.id, entry.incarnation): entry for entry in workers.values()}
        for key in self._budgets.keys() - present.keys():
            del self._budgets[key]
        for key, entry in present.items():
            if key not in self._budgets and key not in self._asked:
                self._asked[key] = asyncio.create_task(self._ask(key, entry), name=f"budget of {entry.id}")
        return {key[0]: self._budgets[key] for key in present if key in self._budgets}

    async def _ask(self, key: tuple[str, str], entry: Entry) -> None:
        try:
            info = await self._calls.info(entry.address)
        except ServiceError as error:
            log.debug("a worker does not say what its weights may take", worker=entry.id, error=str(error))
            await asyncio.sleep(RETRY)
        else:
            self._budgets[key] = float(info.weight_budget_bytes) or math.inf
            self._wake()
        finally:
            del self._asked[key]


def _model_view(plan: Plan, model: PlannedModel, use: Use) -> ModelView:
    config = model.config
    ready = any(place.state == READY for place in model.places.values())
    return ModelView(
        requests=use.in_flight if ready else use.waiting,
        last_used=use.last,
        pinned=plan.pinned(model.name),
        priority=config.residency_priority,
        keep_alive=config.keep_alive,
        min_resident=config.min_resident,
    )


def _stage(plan: Plan, model: PlannedModel, place: Place) -> Stage | None:
    """None: it takes no memory and is not to be woken. Models that are to be moved stay as they are, and what
    they leave comes free."""
    if plan.migration is not None and plan.migration.model == model.name and place.state == DRAINING:
        return Stage.LEAVING if place.occupied else None
    if any(migration.model == model.name for migration in plan.under_way):
        return Stage.FIXED if place.occupied else None
    if place.state == ASLEEP:
        return Stage.LEAVING if place.occupied else Stage.ASLEEP
    return {READY: Stage.READY, LOADING: Stage.LOADING, DRAINING: Stage.FIXED}.get(place.state)


def _to_come(plan: Plan) -> list[PlaceView]:
    """Places that planned migrations lead to: their room is not for others, and the models need not be
    woken."""
    coming: dict[Key, PlaceView] = {}
    for migration in plan.planned:
        model, target = plan.models[migration.model], migration.target_worker
        there = model.places.get(target)
        if not target or migration.asleep or (there is not None and there.occupied):
            continue
        size = max((place.shape.weight_bytes for place in model.places.values() if place.shape), default=0)
        coming[model.name, target] = PlaceView(model.name, target, Stage.FIXED, size, 0.0)
    return list(coming.values())


def _prior(weight_bytes: int) -> float:
    return START + weight_bytes / BANDWIDTH


def _about(before: float, wait: float) -> float:
    """A wait as the document says it: as it said before, if that is about right."""
    if math.isinf(wait) or abs(wait - before) > max(0.05, 0.1 * wait):
        return round(wait, 2)
    return before


def _coarsely(before: int, room: float, now: float) -> int:
    """When there will be room, as the document says it: as it said before, if that is about right."""
    if math.isinf(room) or room <= now:
        return 0
    after = round(1000 * room)
    return before if abs(after - before) <= 1000 * COARSE else after
