"""From what services say to what the advisor looks at, and from its advice to what operators are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muxserve.placement.advisor import Advice
from muxserve.placement.advisor_situation import Served, Worker
from muxserve.placement.advisor_speeds import Speeds
from muxserve.placement.solver.machines import Footprint
from muxserve.placement.traffic import Traffic
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2, worker_pb2

LOADED = (inference_pb2.MODEL_STATE_READY, inference_pb2.MODEL_STATE_LOADING)
BY_HAND = 6.0
"""How many times as long as by itself a model rests that was moved by hand or could not be moved."""
ITEM = {"float32": 4}
"""Bytes of an element by dtype, where it is not 2."""


def kv_bytes(shape: common_pb2.ModelShape) -> int:
    """Bytes of K and V of a token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * ITEM.get(shape.dtype, 2)


def footprint(shape: common_pb2.ModelShape) -> Footprint:
    """What a model takes."""
    return Footprint.of(shape.weight_bytes, kv_bytes(shape), shape.layers)


def workers(
    placement: admin_pb2.Placement, infos: Mapping[str, worker_pb2.WorkerInfo], speeds: Speeds
) -> list[Worker]:
    """The workers that answer."""
    found = []
    for unit in placement.units:
        info = infos.get(unit.worker_id)
        if info is None:
            continue
        prefill, decode = speeds.factors(unit.worker_id)
        found.append(
            Worker(
                unit.worker_id,
                info.device,
                info.compute_units,
                info.weight_budget_bytes,
                info.pool.total_blocks * info.pool.block_bytes,
                prefill,
                decode,
                unit.worker_id in placement.drained_workers,
            )
        )
    return found


def models(
    placement: admin_pb2.Placement, traffic: Traffic, waiting: Mapping[str, int], now_ms: int, rest: float
) -> list[Served]:
    """The models that have a place and a known shape. `rest`: seconds that they stay where they came to."""
    places: dict[str, dict[str, admin_pb2.PlacedModel]] = {}
    for unit in placement.units:
        for placed in unit.models:
            places.setdefault(placed.config.name, {})[unit.worker_id] = placed
    resting = _resting(placement, now_ms, rest)
    found = []
    for name, at in sorted(places.items()):
        shape = next((placed.shape for placed in at.values() if placed.HasField("shape")), None)
        if shape is None:
            continue
        config = next(iter(at.values())).config
        states = {worker: placed.state for worker, placed in at.items()}
        found.append(
            Served(
                name,
                shape.weight_bytes,
                kv_bytes(shape),
                shape.layers,
                traffic.flow(name),
                loaded=frozenset(worker for worker, state in states.items() if state in LOADED),
                asleep=frozenset(
                    worker for worker, state in states.items() if state == inference_pb2.MODEL_STATE_ASLEEP
                ),
                pinned=placement.pinned.get(name, config.pinned),
                min_resident=config.min_resident,
                refused_by=frozenset(
                    worker for worker, state in states.items() if state == inference_pb2.MODEL_STATE_FAILED
                ),
                waiting=waiting.get(name, 0),
                load_seconds=max((placed.load_seconds for placed in at.values()), default=0.0),
                frozen=name in resting,
            )
        )
    return found


def _resting(placement: admin_pb2.Placement, now_ms: int, rest: float) -> set[str]:
    """Models that were moved only now, or are to be."""
    resting = {migration.model for migration in placement.planned}
    if placement.HasField("migration"):
        resting.add(placement.migration.model)
    for migration in placement.ended:
        well = migration.phase == admin_pb2.MIGRATION_PHASE_DONE and migration.author == "rebalance"
        if now_ms - migration.ended_unix_ms < 1000 * rest * (1 if well else BY_HAND):
            resting.add(migration.model)
    return resting


def response(advice: Advice, served: Sequence[Served], traffic: Traffic) -> admin_pb2.PlanResponse:
    """The answer to Plan."""
    flows = {model.name: traffic.flow(model.name) for model in served}
    return admin_pb2.PlanResponse(
        moves=[
            admin_pb2.Move(
                model=move.model,
                source_worker=move.source,
                target_worker=move.target,
                reason=_why(advice, move.model),
            )
            for move in advice.moves
        ],
        served=advice.served,
        gain=advice.after - advice.served,
        cost=advice.cost,
        worthwhile=advice.worthwhile,
        reason=advice.reason,
        traffic=[
            admin_pb2.ModelTraffic(
                model=model.name,
                rate=flows[model.name].rate,
                recent_rate=flows[model.name].fast,
                burst=flows[model.name].burst,
                prompt_tokens=flows[model.name].prompt_tokens,
                output_tokens=flows[model.name].output_tokens,
                waiting=model.waiting,
            )
            for model in served
        ],
    )


def _why(advice: Advice, model: str) -> str:
    return f"served at {advice.worth.get(model, 0.0):.0%} of what it could be"
