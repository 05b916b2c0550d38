"""Models with their places, and the placement document that says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from muxserve.common.config import ModelEntry
from muxserve.placement.fit import Refusal
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2

LOADING = inference_pb2.MODEL_STATE_LOADING
READY = inference_pb2.MODEL_STATE_READY
FAILED = inference_pb2.MODEL_STATE_FAILED
ASLEEP = inference_pb2.MODEL_STATE_ASLEEP
DRAINING = inference_pb2.MODEL_STATE_DRAINING

WAKING = "waking"
"""Why a place is LOADING that was asleep."""
NOWHERE = "waiting for a worker"
"""Why a model without a place is not served, until one was looked for."""


@dataclass(slots=True, eq=False)
class Place:
    """A model on a worker, and how far it is there."""

    worker: str
    """Id."""
    state: inference_pb2.ModelState.ValueType = LOADING
    reason: str = "loading"
    """Why it is not READY."""
    field: str = ""
    """Setting at fault where it is FAILED."""
    shape: common_pb2.ModelShape | None = None
    """Known once a worker has read the checkpoint."""
    drain_until: int = 0
    """Unix time in ms when what runs here is handed back, where it is DRAINING or ASLEEP."""
    expected_wait: float = 0.0
    """Seconds that a request has to wait for it, from `room_at` on, where it is ASLEEP or was woken. 0: not
    known, infinite: there can be no room."""
    room_at: int = 0
    """Unix time in ms when there will be room for it, where it is ASLEEP. 0: there is."""
    load_seconds: float = 0.0
    """That loading it took the last time. 0: not known."""
    loads: int = 0
    """How often it was loaded."""
    occupied: bool = True
    """Whether the worker may have its weights, or is to get them. Not in the document: who takes that over
    finds out."""

    @property
    def loaded(self) -> bool:
        """Whether its weights are there to stay, or on their way in."""
        return self.state in (LOADING, READY)

    def loading(self, reason: str = "loading") -> None:
        """It is not served now and will be."""
        self._become(LOADING, reason)

    def wake(self) -> None:
        """It was ASLEEP and is loaded again: requests wait for it."""
        self._become(LOADING, WAKING)

    @property
    def woken(self) -> bool:
        """Whether it loads because it was asleep."""
        return (self.state, self.reason) == (LOADING, WAKING)

    def ready(self, shape: common_pb2.ModelShape | None = None) -> None:
        """Jobs can use it."""
        self._become(READY, "")
        self.shape = shape or self.shape

    def fail(self, refusal: Refusal) -> None:
        """It cannot be served."""
        self._become(FAILED, refusal.reason)
        self.field = refusal.field

    def sleep(self, drain_until: int = 0) -> None:
        """It takes no new requests, and its weights go when what runs has ended or was handed back."""
        self._become(ASLEEP, "asleep")
        self.drain_until = drain_until

    def drain(self, drain_until: int = 0) -> None:
        """It takes no new requests, and is on its way out of the document."""
        self._become(DRAINING, "draining")
        self.drain_until = drain_until

    def _become(self, state: inference_pb2.ModelState.ValueType, reason: str) -> None:
        self.state, self.reason, self.field, self.drain_until = state, reason, "", 0
        self.occupied = self.occupied or state in (LOADING, READY)


@dataclass(slots=True, eq=False)
class PlannedModel:
    """A model of the configuration, and its places."""

    config: common_pb2.ModelConfig
    places: dict[str, Place] = field(default_factory=dict)
    """By worker."""
    refusal: Refusal | None = None
    """Why it has no place, if one was looked for."""

    @property
    def name(self) -> str:
        """The name that it is served under."""
        return self.config.name

    def add(self, place: Place) -> Place:
        """Give it one place more."""
        self.places[place.worker] = place
        self.refusal = None
        return place

    def vacated(self, worker: str) -> None:
        """Its weights are gone from `worker`: the place goes, unless it is the only one, where it sleeps."""
        place = self.places[worker]
        place.occupied = False
        if len(self.places) > 1:
            del self.places[worker]
        else:
            place.sleep()


@dataclass(slots=True, eq=False)
class Plan:
    """What placement has in mind: every configured model, and the workers that they were assigned to."""

    models: dict[str, PlannedModel]
    """By name."""
    workers: dict[str, admin_pb2.ServiceEntry] = field(default_factory=dict)
    """By id: the process that the states of its places speak of; kept while the worker is away."""
    migration: admin_pb2.Migration | None = None
    planned: list[admin_pb2.Migration] = field(default_factory=list)
    """To follow it."""
    ended: list[admin_pb2.Migration] = field(default_factory=list)
    """Newest first."""
    drained: set[str] = field(default_factory=set)
    """Ids of workers that are to have no models."""
    pins: dict[str, bool] = field(default_factory=dict)
    """By model name, in place of what is configured."""

    @property
    def under_way(self) -> list[admin_pb2.Migration]:
        """The migration that goes on, if one does, and those that are to follow."""
        return [*([self.migration] if self.migration is not None else []), *self.planned]

    def places(self) -> Iterator[tuple[PlannedModel, Place]]:
        """Every place, with its model."""
        for model in self.models.values():
            for place in model.places.values():
                yield model, place

    def of_worker(self, worker: str) -> list[tuple[PlannedModel, Place]]:
        """The places on `worker`, with their models."""
        return [(model, place) for model, place in self.places() if place.worker == worker]

    def lose(self, worker: str) -> None:
        """The worker is away: what it serves waits for it."""
        for _, place in self.of_worker(worker):
            if place.loaded:
                place.loading(f"{worker} is away")
            place.occupied = False
        if not self.of_worker(worker):
            self.workers.pop(worker, None)

    def meet(self, worker: admin_pb2.ServiceEntry) -> bool:
        """The worker is there. Whether it is the process that was there before; a new one has no weights."""
        before = self.workers.get(worker.id)
        self.workers[worker.id] = worker
        same = before is not None and before.incarnation == worker.incarnation
        for _, place in self.of_worker(worker.id):
            if not same:
                place.occupied = False
                if place.loaded:
                    place.loading()
            elif place.loaded:
                place.occupied = True
        return same

    def pinned(self, name: str) -> bool:
        """Whether the model is never put to sleep, and moved only by hand."""
        return self.pins.get(name, self.models[name].config.pinned)


def to_document(plan: Plan) -> admin_pb2.Placement:
    """`plan` as a document with epoch 0. Every worker has a unit, so that the schedulers are ready for models
    that come."""
    document = admin_pb2.Placement(
        migration=plan.migration,
        planned=plan.planned,
        ended=plan.ended,
        drained_workers=sorted(plan.drained),
        pinned=plan.pins,
    )
    units = {
        worker: admin_pb2.Unit(
            unit=f"unit-{entry.id}",
            worker_id=entry.id,
            worker_address=entry.address,
            worker_incarnation=entry.incarnation,
        )
        for worker, entry in sorted(plan.workers.items())
    }
    for _, model in sorted(plan.models.items()):
        for place in model.places.values():
            units[place.worker].models.append(_placed(model, place))
        if not model.places:
            document.unplaced.append(_unplaced(model))
    document.units.extend(units.values())
    return document


def from_document(document: admin_pb2.Placement, models: Iterable[ModelEntry]) -> Plan:
    """The plan that goes on from `document` with the models that are configured now.

    A model keeps its places if it is configured as before, and is new otherwise.
    """
    plan = Plan({})
    for entry in models:
        plan.models[entry.name] = PlannedModel(entry.to_proto())
    for unit in document.units:
        plan.workers[unit.worker_id] = admin_pb2.ServiceEntry(
            kind="worker", id=unit.worker_id, address=unit.worker_address, incarnation=unit.worker_incarnation
        )
        for placed in unit.models:
            model = plan.models.get(placed.config.name)
            if model is not None and model.config == placed.config:
                model.add(_place(unit.worker_id, placed))
    known = {name for name, model in plan.models.items() if model.places}
    if document.HasField("migration") and document.migration.model in known:
        plan.migration = _copy(document.migration)
    plan.planned = [_copy(migration) for migration in document.planned if migration.model in known]
    plan.ended = list(document.ended)
    plan.drained = set(document.drained_workers)
    plan.pins = {name: pinned for name, pinned in document.pinned.items() if name in plan.models}
    return plan


def loads(models: Mapping[str, PlannedModel]) -> dict[str, float]:
    """Relative demand for compute by model name: expected arrivals, 1 where none are stated."""
    return {name: model.config.rate or 1.0 for name, model in models.items()}


def _placed(model: PlannedModel, place: Place) -> admin_pb2.PlacedModel:
    return admin_pb2.PlacedModel(
        config=model.config,
        state=place.state,
        reason=place.reason,
        field=place.field,
        shape=place.shape,
        drain_until_unix_ms=place.drain_until,
        expected_wait_seconds=place.expected_wait,
        room_at_unix_ms=place.room_at,
        load_seconds=place.load_seconds,
        loads=place.loads,
    )


def _unplaced(model: PlannedModel) -> admin_pb2.PlacedModel:
    refusal = model.refusal
    if refusal is None:
        return admin_pb2.PlacedModel(config=model.config, state=LOADING, reason=NOWHERE)
    return admin_pb2.PlacedModel(
        config=model.config, state=FAILED, reason=refusal.reason, field=refusal.field
    )


def _place(worker: str, placed: admin_pb2.PlacedModel) -> Place:
    return Place(
        worker,
        placed.state,
        placed.reason,
        placed.field,
        placed.shape if placed.HasField("shape") else None,
        placed.drain_until_unix_ms,
        placed.expected_wait_seconds,
        placed.room_at_unix_ms,
        placed.load_seconds,
        placed.loads,
    )


def _copy(migration: admin_pb2.Migration) -> admin_pb2.Migration:
    """The plan's own, which it changes."""
    copy = admin_pb2.Migration()
    copy.CopyFrom(migration)
    return copy
