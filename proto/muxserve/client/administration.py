"""muxserve.v1 admin messages to the values of this SDK."""

from __future__ import annotations

from collections.abc import Mapping

from muxserve.v1 import admin_pb2, common_pb2, scheduler_pb2, worker_pb2

from .inference import state_of
from .migrations import migration_of
from .results import ModelState
from .status import (
    Executor,
    ModelConfig,
    ModelShape,
    ModelStatus,
    PlacedModel,
    Placement,
    Pool,
    QuotaRevision,
    Quotas,
    QuotaState,
    QuotaUse,
    Service,
    Status,
    Unit,
    UnitStatus,
    Worker,
)

_QUOTA_STATES = {
    getattr(admin_pb2, f"QUOTA_STATE_{state.name}"): state
    for state in QuotaState
    if state is not QuotaState.UNKNOWN
}


def _config(message: common_pb2.ModelConfig) -> ModelConfig:
    return ModelConfig(
        name=message.name,
        path=message.path,
        dtype=message.dtype or "auto",
        quota_blocks=message.quota_blocks,
        rate=message.rate,
        max_context=message.max_context,
        pinned=message.pinned,
        priority=message.residency_priority,
        keep_alive=message.keep_alive,
        min_resident=message.min_resident,
    )


def _shape(message: common_pb2.ModelShape) -> ModelShape:
    return ModelShape(
        architecture=message.architecture,
        dtype=message.dtype,
        context_length=message.context_length,
        vocab_size=message.vocab_size,
        layers=message.layers,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        weight_bytes=message.weight_bytes,
        tokens_per_block=message.tokens_per_block,
        blocks_per_span=message.blocks_per_span,
        slots=message.slots,
    )


def _placed(message: admin_pb2.PlacedModel) -> PlacedModel:
    return PlacedModel(
        config=_config(message.config),
        state=state_of(message.state),
        reason=message.reason,
        field=message.field,
        shape=_shape(message.shape) if message.HasField("shape") else None,
        loads=message.loads,
        load_seconds=message.load_seconds,
        expected_wait=message.expected_wait_seconds,
        room_at=message.room_at_unix_ms / 1000,
    )


def placement_of(message: admin_pb2.Placement) -> Placement:
    """The placement document."""
    return Placement(
        epoch=message.epoch,
        units=tuple(
            Unit(
                name=unit.unit,
                worker_id=unit.worker_id,
                worker_address=unit.worker_address,
                worker_incarnation=unit.worker_incarnation,
                models=tuple(map(_placed, unit.models)),
            )
            for unit in message.units
        ),
        unplaced=tuple(map(_placed, message.unplaced)),
        migration=migration_of(message.migration) if message.HasField("migration") else None,
        planned=tuple(map(migration_of, message.planned)),
        ended=tuple(map(migration_of, message.ended)),
        drained_workers=tuple(message.drained_workers),
        pinned=dict(message.pinned),
    )


def quotas_of(message: admin_pb2.Quotas) -> Quotas:
    """Block quotas of a unit."""
    return Quotas(unit=message.unit, revision=message.revision, blocks=dict(message.blocks))


def quotas_and_more_of(message: admin_pb2.GetQuotasResponse) -> Quotas:
    """The same, with its history and the use that is made of it."""
    quotas = message.quotas
    return Quotas(
        unit=quotas.unit,
        revision=quotas.revision,
        blocks=dict(quotas.blocks),
        history=tuple(map(_revision, message.history)),
        use={
            each.model: QuotaUse(
                quota=each.quota_blocks,
                held=each.held_blocks,
                borrowed=each.borrowed_blocks,
                cached=each.cached_blocks,
            )
            for each in message.use
        },
    )


def _revision(message: admin_pb2.QuotaRevision) -> QuotaRevision:
    return QuotaRevision(
        revision=message.revision,
        author=message.author,
        blocks=dict(message.blocks),
        asked=message.asked_unix_ms / 1000,
        state=_QUOTA_STATES.get(message.state, QuotaState.UNKNOWN),
        above=tuple(message.above),
    )


def _worker(message: worker_pb2.WorkerInfo) -> Worker:
    pool = message.pool
    return Worker(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        device=message.device,
        compute_units=message.compute_units,
        partition=message.partition,
        pool=Pool(
            block_bytes=pool.block_bytes,
            total_blocks=pool.total_blocks,
            free_blocks=pool.free_blocks,
            cached_blocks=pool.cached_blocks,
            integrity_error=pool.integrity_error,
        ),
        executors=tuple(Executor(kind=e.kind, pid=e.pid, restarts=e.restarts) for e in message.executors),
        weight_budget_bytes=message.weight_budget_bytes,
    )


def _unit(
    name: str,
    placed: Mapping[str, PlacedModel],
    scheduled: scheduler_pb2.UnitStatus,
    books: Mapping[str, worker_pb2.ModelBlocks],
) -> UnitStatus:
    """A unit from three sources, any of which may not know of it (or of a model) yet."""
    running = {model.model: model for model in scheduled.models}
    models = []
    for model in sorted(placed.keys() | running.keys() | books.keys()):
        counts = running.get(model, scheduler_pb2.UnitModelStatus())
        blocks = books.get(model, worker_pb2.ModelBlocks())
        models.append(
            ModelStatus(
                model=model,
                unit=name,
                state=placed[model].state if model in placed else ModelState.UNKNOWN,
                running=counts.running,
                waiting=counts.waiting,
                held_blocks=blocks.held_blocks,
                quota_blocks=blocks.quota_blocks if model in books else counts.quota_blocks,
                borrowed_blocks=blocks.borrowed_blocks,
                peak_blocks=blocks.peak_blocks,
                preemptions=counts.preemptions,
                generated_tokens=counts.generated_tokens,
                prefill_tokens=counts.prefill_tokens,
                cached_blocks=blocks.cached_blocks,
                prefix_query_tokens=blocks.prefix_query_tokens,
                prefix_hit_tokens=blocks.prefix_hit_tokens,
            )
        )
    return UnitStatus(
        unit=name,
        connected=scheduled.connected,
        policy=scheduled.policy,
        models=tuple(models),
        prefill_jobs=scheduled.prefill_jobs,
        decode_jobs=scheduled.decode_jobs,
    )


def status_of(message: admin_pb2.GetStatusResponse) -> Status:
    """Everything. A unit is listed if the placement or a scheduler knows of it."""
    placement = placement_of(message.placement)
    placed = {unit.name: unit for unit in placement.units}
    scheduled = {unit.unit: unit for unit in message.units}
    books = {
        worker.worker_id: {model.model: model for model in worker.pool.models} for worker in message.workers
    }
    units = []
    for name in sorted(placed.keys() | scheduled.keys()):
        unit = placed.get(name)
        units.append(
            _unit(
                name,
                {model.config.name: model for model in unit.models} if unit else {},
                scheduled.get(name, scheduler_pb2.UnitStatus()),
                books.get(unit.worker_id, {}) if unit else {},
            )
        )
    return Status(
        placement=placement,
        units=tuple(units),
        workers=tuple(map(_worker, message.workers)),
        services=tuple(
            Service(kind=s.kind, id=s.id, address=s.address, incarnation=s.incarnation, pid=s.pid)
            for s in message.services
        ),
    )
