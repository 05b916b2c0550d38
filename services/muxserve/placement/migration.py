"""How a migration goes on: a state machine over the plan. Pure: what is seen in, the plan a step further.

    PLANNED ─► LOADING ─► HANDING_OVER ─► DRAINING ─► UNLOADING ─► DONE
                  │             │             │
                  └─────────────┴─────────────┴─► ROLLING_BACK ─► ROLLED_BACK

A phase is in the document before anybody acts on it, and all that is done in it may be done twice, so whoever
finds the document can go on. Without a source it ends after LOADING, without a target it begins with
HANDING_OVER.

A source whose process is gone has nothing to hand over: schedulers claim its requests, and the migration ends
as it was to. A target whose process is gone while the source still has the model makes it roll back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

from muxserve.placement.document import ASLEEP, DRAINING, FAILED, READY, Place, Plan, PlannedModel
from muxserve.v1 import admin_pb2

Phase: TypeAlias = admin_pb2.MigrationPhase.ValueType

PLANNED = admin_pb2.MIGRATION_PHASE_PLANNED
LOADING = admin_pb2.MIGRATION_PHASE_LOADING
HANDING_OVER = admin_pb2.MIGRATION_PHASE_HANDING_OVER
DRAINING_SOURCE = admin_pb2.MIGRATION_PHASE_DRAINING
UNLOADING = admin_pb2.MIGRATION_PHASE_UNLOADING
ROLLING_BACK = admin_pb2.MIGRATION_PHASE_ROLLING_BACK
DONE = admin_pb2.MIGRATION_PHASE_DONE
ROLLED_BACK = admin_pb2.MIGRATION_PHASE_ROLLED_BACK

REVERSIBLE = frozenset({PLANNED, LOADING, HANDING_OVER, DRAINING_SOURCE})
"""Phases in which it can be rolled back."""

KEPT = 32
"""Migrations that have ended, in the document."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step depends on beside the plan."""

    present: Collection[str]
    """Ids of the workers that are there."""
    open_sequences: int | None
    """Of the migration's model on its source. None: not known."""
    now: int
    """Unix time in ms."""


def advance(plan: Plan, seen: Seen) -> None:
    """Take the migration under way one phase further if it is time, or begin the next one."""
    migration = plan.migration
    if migration is None:
        if plan.planned:
            _begin(plan, plan.planned.pop(0), seen)
        return
    model = plan.models[migration.model]
    source = model.places.get(migration.source_worker)
    target = model.places.get(migration.target_worker)
    match migration.phase:
        case admin_pb2.MIGRATION_PHASE_LOADING:
            _load(plan, migration, source, target, seen)
        case admin_pb2.MIGRATION_PHASE_HANDING_OVER | admin_pb2.MIGRATION_PHASE_DRAINING:
            _hand_over(plan, migration, source, target, seen)
        case admin_pb2.MIGRATION_PHASE_UNLOADING:
            _unload(plan, migration, model, source, seen)
        case admin_pb2.MIGRATION_PHASE_ROLLING_BACK:
            if target is None or not target.occupied:
                if target is not None:
                    model.vacated(target.worker)
                _end(plan, migration, ROLLED_BACK, seen.now)


def roll_back(plan: Plan, error: str) -> None:
    """Have the migration under way end as it began; `error` says why. It has to be in a REVERSIBLE phase."""
    migration = plan.migration
    assert migration is not None and migration.phase in REVERSIBLE
    model = plan.models[migration.model]
    source = model.places.get(migration.source_worker)
    target = model.places.get(migration.target_worker)
    if source is not None and source.state == DRAINING:
        if source.occupied:
            source.ready()
        else:  # its process is a new one, or away
            source.loading()
    if target is not None:
        target.drain()
    migration.phase, migration.error = ROLLING_BACK, error


def leaving(plan: Plan, model: PlannedModel, place: Place) -> bool:
    """Whether the migration under way has the place unloaded now."""
    migration = plan.migration
    if migration is None or migration.model != model.name:
        return False
    if migration.phase == UNLOADING:
        return place.worker == migration.source_worker
    return migration.phase == ROLLING_BACK and place.worker == migration.target_worker


def obstacle(plan: Plan, migration: admin_pb2.Migration, present: Collection[str]) -> str:
    """Why a planned migration cannot begin now, or nothing."""
    model = plan.models[migration.model]
    source, target = migration.source_worker, migration.target_worker
    if source and source not in model.places:
        return f'model "{model.name}" is not on {source}'
    if not target:
        return ""
    if target not in present:
        return f"{target} is away"
    if target in plan.drained:
        return f"{target} is drained"
    there = model.places.get(target)
    if there is not None and there.state not in (ASLEEP, FAILED):
        return f'model "{model.name}" is on {target} already'
    return ""


def _begin(plan: Plan, migration: admin_pb2.Migration, seen: Seen) -> None:
    if problem := obstacle(plan, migration, seen.present):
        migration.error = problem
        _end(plan, migration, ROLLED_BACK, seen.now)
        return
    plan.migration = migration
    model = plan.models[migration.model]
    source = model.places.get(migration.source_worker)
    if not migration.target_worker:
        assert source is not None
        _drain(migration, source, seen.now)
        return
    target = model.places.get(migration.target_worker)
    if target is None:
        # The shape is the source's until the target has said its own: what it takes has to be known.
        shape = next((place.shape for place in model.places.values()), None)
        target = model.add(Place(migration.target_worker, shape=shape))
    if source is not None and source.state == ASLEEP:
        migration.asleep = True
    if migration.asleep:
        target.sleep()
    else:
        target.loading()
    migration.phase = LOADING


def _load(
    plan: Plan, migration: admin_pb2.Migration, source: Place | None, target: Place | None, seen: Seen
) -> None:
    if target is None or migration.target_worker not in seen.present:
        roll_back(plan, f"{migration.target_worker} is away")
    elif target.state == FAILED:
        roll_back(plan, target.reason)
    elif _arrived(migration, target):
        if source is None:
            _end(plan, migration, DONE, seen.now)
        else:
            _drain(migration, source, seen.now)


def _arrived(migration: admin_pb2.Migration, target: Place) -> bool:
    return target.state == READY or migration.asleep


def _drain(migration: admin_pb2.Migration, source: Place, now: int) -> None:
    migration.drain_until_unix_ms = now + round(1000 * migration.drain_seconds)
    source.drain(migration.drain_until_unix_ms)
    migration.phase = HANDING_OVER


def _hand_over(
    plan: Plan, migration: admin_pb2.Migration, source: Place | None, target: Place | None, seen: Seen
) -> None:
    if source is None or not source.occupied:
        migration.phase = UNLOADING
    elif migration.target_worker and (target is None or not _arrived(migration, target)):
        roll_back(plan, f"{migration.target_worker} lost the model")
    elif migration.phase == HANDING_OVER and seen.now >= migration.drain_until_unix_ms:
        migration.phase = DRAINING_SOURCE
    elif seen.open_sequences == 0:
        migration.phase = UNLOADING


def _unload(
    plan: Plan, migration: admin_pb2.Migration, model: PlannedModel, source: Place | None, seen: Seen
) -> None:
    if source is not None and source.occupied:
        return
    if source is not None:
        model.vacated(source.worker)
    _end(plan, migration, DONE, seen.now)


def _end(plan: Plan, migration: admin_pb2.Migration, phase: Phase, now: int) -> None:
    migration.phase, migration.ended_unix_ms = phase, now
    plan.migration = None
    plan.ended = [migration, *plan.ended[: KEPT - 1]]
