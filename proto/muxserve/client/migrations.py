"""What the calls that move models take and return: values, with no protobuf in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from muxserve.v1 import admin_pb2

from .inference import naming


class MigrationPhase(StrEnum):
    """How far a migration is."""

    UNKNOWN = "unknown"
    """A phase that this SDK does not know."""
    PLANNED = "planned"
    """Others come first."""
    LOADING = "loading"
    """The target loads the model. The source serves it."""
    HANDING_OVER = "handing_over"
    """The target serves it. The source hands back what waits there; what runs may finish."""
    DRAINING = "draining"
    """The source hands back what still runs: the target recomputes it and goes on."""
    UNLOADING = "unloading"
    """The source unloads it. This cannot be rolled back."""
    ROLLING_BACK = "rolling_back"
    """The source serves it again; the target unloads it."""
    DONE = "done"
    """Ended as it was to."""
    ROLLED_BACK = "rolled_back"
    """Ended as it began; `error` says why."""


_PHASES = {
    getattr(admin_pb2, f"MIGRATION_PHASE_{phase.name}"): phase
    for phase in MigrationPhase
    if phase is not MigrationPhase.UNKNOWN
}


@dataclass(frozen=True, slots=True)
class Move:
    """A model that is to go elsewhere."""

    model: str
    target: str = ""
    """Id of the worker that it goes to. Empty: it is unloaded (in plans; in requests it is required)."""
    source: str = ""
    """Id of the worker that it leaves. Empty: in requests, the one that it is on; in plans, it is loaded on
    one more."""
    reason: str = ""
    """Why; of plans."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A model's way from one worker to another."""

    id: str
    model: str
    source: str
    """Id of the worker that it leaves. Empty: it is loaded on one more."""
    target: str
    """Id of the worker that it goes to. Empty: it is unloaded."""
    phase: MigrationPhase
    author: str
    """Who asked for it: "admin", "drain" or "rebalance"."""
    reason: str
    """Why it was asked for."""
    began: float
    """When it was asked for, in seconds of Unix time."""
    ended: float | None
    """When it ended. None: it has not."""
    error: str
    """Why it is rolled back. Empty: it is not."""
    asleep: bool
    """Whether it sleeps on the target until a request wakes it."""


@dataclass(frozen=True, slots=True)
class MigrationEvent:
    """A migration has begun, has come a phase further, or has ended."""

    migration: Migration
    ended: int
    """How many of the migrations that were asked for have ended."""
    total: int
    """How many were asked for; of a drain, as far as that is known."""


@dataclass(frozen=True, slots=True)
class DrainEvent:
    """How far a drain is."""

    migration: Migration | None
    """The one that has come further. None in the last event."""
    held_blocks: int
    """Blocks that the worker's sequences hold."""
    models_left: int
    """Models that are still there."""


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """What is known of a model's traffic."""

    model: str
    rate: float
    """Requests per second, averaged over minutes."""
    recent_rate: float
    """The same, averaged over seconds."""
    burst: bool
    """Whether the recent rate is more than chance makes of the other."""
    prompt_tokens: float
    """Mean of a prompt. 0: none came yet."""
    output_tokens: float
    """Mean of an output. 0: none came yet."""
    waiting: int
    """Requests that wait now."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be moved now, and why. Rates are requests per second."""

    moves: tuple[Move, ...]
    """In order. Empty: nothing better is known, or nothing that is worth its cost."""
    served: float
    """Rate that is served now, as predicted."""
    gain: float
    """Rate that more would be served after the moves, as predicted."""
    cost: float
    """Requests that the moves would cost, as predicted."""
    worthwhile: bool
    """Whether rebalancing would do it by itself."""
    reason: str
    """The judgement in words."""
    traffic: tuple[ModelTraffic, ...]
    """By model name."""


def migration_of(message: admin_pb2.Migration) -> Migration:
    """A migration."""
    return Migration(
        id=message.id,
        model=message.model,
        source=message.source_worker,
        target=message.target_worker,
        phase=_PHASES.get(message.phase, MigrationPhase.UNKNOWN),
        author=message.author,
        reason=message.reason,
        began=message.began_unix_ms / 1000,
        ended=message.ended_unix_ms / 1000 if message.ended_unix_ms else None,
        error=message.error,
        asleep=message.asleep,
    )


def event_of(message: admin_pb2.MigrationEvent) -> MigrationEvent:
    """A migration's progress."""
    return MigrationEvent(migration_of(message.migration), message.ended, message.total)


def drain_event_of(message: admin_pb2.DrainResponse) -> DrainEvent:
    """A drain's progress."""
    migration = migration_of(message.event.migration) if message.HasField("event") else None
    return DrainEvent(migration, message.held_blocks, message.models_left)


def plan_of(message: admin_pb2.PlanResponse) -> Plan:
    """A plan."""
    return Plan(
        moves=tuple(
            Move(move.model, move.target_worker, move.source_worker, move.reason) for move in message.moves
        ),
        served=message.served,
        gain=message.gain,
        cost=message.cost,
        worthwhile=message.worthwhile,
        reason=message.reason,
        traffic=tuple(
            ModelTraffic(
                each.model,
                each.rate,
                each.recent_rate,
                each.burst,
                each.prompt_tokens,
                each.output_tokens,
                each.waiting,
            )
            for each in message.traffic
        ),
    )


def rebalance_request(moves: Iterable[Move], drain_seconds: float | None) -> admin_pb2.RebalanceRequest:
    """Raises InvalidRequest."""
    asked = [
        admin_pb2.Move(model=move.model, source_worker=move.source, target_worker=move.target)
        for move in moves
    ]
    with naming("drain_seconds"):
        return admin_pb2.RebalanceRequest(moves=asked, drain_seconds=drain_seconds)


def unload_request(
    model: str, worker: str, drain_seconds: float | None
) -> admin_pb2.AdminServiceUnloadModelRequest:
    """Raises InvalidRequest."""
    with naming("drain_seconds"):
        return admin_pb2.AdminServiceUnloadModelRequest(
            model=model, worker=worker, drain_seconds=drain_seconds
        )


def drain_request(worker: str, undo: bool, drain_seconds: float | None) -> admin_pb2.DrainRequest:
    """Raises InvalidRequest."""
    with naming("drain_seconds"):
        return admin_pb2.DrainRequest(worker=worker, undo=undo, drain_seconds=drain_seconds)
