"""Models with their places, and the placement document that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from muxserve.common.config import ModelEntry
from muxserve.placement.fit import Refusal
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2

LOADING = inference_pb2.MODEL_STATE_LOADING
READY = inference_pb2.MODEL_STATE_READY
FAILED = inference_pb2.MODEL_STATE_FAILED


@dataclass(slots=True)
class PlacedModel:
    """A model of the configuration, and how far it is."""

    config: common_pb2.ModelConfig
    worker: str = ""
    """Id of the worker that it is assigned to; empty: none yet, or none at all (then it is FAILED)."""
    state: inference_pb2.ModelState.ValueType = LOADING
    reason: str = "waiting for a worker"
    """Why it is not READY."""
    field: str = ""
    """Setting at fault where it is FAILED."""
    shape: common_pb2.ModelShape | None = None
    """Known once a worker has read the checkpoint."""

    def assign(self, worker: str, shape: common_pb2.ModelShape) -> None:
        """Give it a place; its weights are still to be loaded."""
        self.worker, self.shape = worker, shape
        self.loading("loading")

    def loading(self, reason: str) -> None:
        """It is not served now and will be."""
        self.state, self.reason, self.field = LOADING, reason, ""

    def ready(self, shape: common_pb2.ModelShape) -> None:
        """Jobs can use it."""
        self.state, self.reason, self.field, self.shape = READY, "", "", shape

    def fail(self, refusal: Refusal) -> None:
        """It cannot be served."""
        self.state, self.reason, self.field = FAILED, refusal.reason, refusal.field


@dataclass(slots=True)
class Plan:
    """What placement has in mind: every configured model, and the workers that they were assigned to."""

    models: dict[str, PlacedModel]
    """By name."""
    workers: dict[str, admin_pb2.ServiceEntry] = field(default_factory=dict)
    """By id: the process that the states of its models speak of; kept while the worker is away."""

    def of_worker(self, worker: str) -> list[PlacedModel]:
        """The models assigned to `worker`."""
        return [model for model in self.models.values() if model.worker == worker]


def to_document(plan: Plan) -> admin_pb2.Placement:
    """`plan` as a document with epoch 0."""
    document = admin_pb2.Placement()
    units: dict[str, admin_pb2.Unit] = {}
    for name in sorted(plan.models):
        model = plan.models[name]
        if not model.worker:
            document.unplaced.append(_to_proto(model))
            continue
        if model.worker not in units:
            entry = plan.workers[model.worker]
            units[model.worker] = admin_pb2.Unit(
                unit=f"unit-{entry.id}",
                worker_id=entry.id,
                worker_address=entry.address,
                worker_incarnation=entry.incarnation,
            )
        units[model.worker].models.append(_to_proto(model))
    document.units.extend(units[worker] for worker in sorted(units))
    return document


def from_document(document: admin_pb2.Placement, models: Iterable[ModelEntry]) -> Plan:
    """The plan that goes on from `document` with the models that are configured now.

    A model keeps its place if it is configured as before, and is new otherwise.
    """
    before = {model.config.name: (unit, model) for unit in document.units for model in unit.models}
    plan = Plan({})
    for entry in models:
        config = entry.to_proto()
        plan.models[entry.name] = PlacedModel(config)
        unit, old = before.get(entry.name, (None, None))
        if unit is None or old is None or old.config != config:
            continue
        plan.workers[unit.worker_id] = admin_pb2.ServiceEntry(
            kind="worker", id=unit.worker_id, address=unit.worker_address, incarnation=unit.worker_incarnation
        )
        shape = old.shape if old.HasField("shape") else None
        plan.models[entry.name] = PlacedModel(config, unit.worker_id, old.state, old.reason, old.field, shape)
    return plan


def loads(models: Mapping[str, PlacedModel]) -> dict[str, float]:
    """Relative demand for compute by model name: expected arrivals, 1 where none are stated."""
    return {name: model.config.rate or 1.0 for name, model in models.items()}


def _to_proto(model: PlacedModel) -> admin_pb2.PlacedModel:
    return admin_pb2.PlacedModel(
        config=model.config,
        state=model.state,
        reason=model.reason,
        field=model.field,
        shape=model.shape,
    )
