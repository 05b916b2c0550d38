"""The operators' calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from muxserve.client import (
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    MigrationPhase,
    ModelState,
    Move,
    NotFound,
    QuotaState,
)
from muxserve.v1 import admin_pb2
from tests.client.peer import Peer, Server, refusal


@pytest.fixture
def admin(connect: Callable[..., Any], server: Server) -> Any:
    """An admin client of the peer, sync and async in turn."""
    return connect(server.address, admin=True, timeout=10.0)


def test_status_puts_scheduler_and_worker_side_by_side(admin: Any) -> None:
    status = admin.status()
    a, b = status.models
    assert (a.model, a.unit, a.state) == ("a", "unit-0", ModelState.READY)
    assert (a.running, a.waiting, a.preemptions, a.generated_tokens) == (3, 2, 1, 99)
    assert (a.held_blocks, a.quota_blocks, a.borrowed_blocks, a.peak_blocks) == (95, 10, 85, 120)
    assert (a.cached_blocks, a.prefix_query_tokens, a.prefix_hit_tokens) == (5, 640, 512)
    assert (b.model, b.state, b.running, b.held_blocks) == ("b", ModelState.LOADING, 0, 0)
    (unit,) = status.units
    assert (unit.connected, unit.policy, unit.prefill_jobs, unit.decode_jobs) == (True, "adbs", 7, 8)
    (worker,) = status.workers
    assert (worker.pool.total_blocks, worker.pool.free_blocks, worker.pool.cached_blocks) == (1000, 900, 5)
    assert worker.pool.integrity_error == ""
    assert [(e.kind, e.pid, e.restarts) for e in worker.executors] == [("decode", 42, 1)]
    assert [(s.kind, s.pid) for s in status.services] == [("gateway", 7)]


def test_status_is_ready_for_json(admin: Any) -> None:
    status = json.loads(json.dumps(dataclasses.asdict(admin.status())))
    assert status["units"][0]["models"][0]["held_blocks"] == 95


def test_placement_says_what_could_not_be_placed_and_why(admin: Any) -> None:
    placement = admin.placement()
    assert placement.epoch == 5
    (unit,) = placement.units
    assert (unit.name, unit.worker_id, unit.worker_address) == ("unit-0", "worker-0", "127.0.0.1:9000")
    assert unit.models[0].shape is not None
    assert unit.models[0].shape.layers == 30
    assert unit.models[1].shape is None
    assert unit.models[1].config.dtype == "auto"
    (missing,) = placement.unplaced
    assert (missing.state, missing.field, missing.reason) == (ModelState.FAILED, "path", "no such file")


def test_quotas_are_read_and_set(admin: Any, peer: Peer) -> None:
    shown = admin.quotas()
    assert (shown.blocks, shown.state) == ({"a": 10, "b": 20}, QuotaState.DEFERRED)
    assert [(r.revision, r.state) for r in shown.history] == [
        (4, QuotaState.APPLIED),
        (3, QuotaState.DEFERRED),
        (2, QuotaState.STALE),
    ]
    assert (shown.history[1].above, shown.history[1].asked) == (("a",), 1.5)
    assert (shown.use["a"].held, shown.use["a"].borrowed) == (95, 85)
    quotas = admin.set_quota("a", 7, unit="unit-1", expected_revision=3)
    assert (quotas.unit, quotas.revision, quotas.blocks) == ("unit-1", 4, {"a": 7})
    assert peer.quota is not None
    assert peer.quota.expected_revision == 3


def test_errors_of_the_admin_service_are_typed(admin: Any, peer: Peer) -> None:
    peer.refuse.append(refusal(grpc.StatusCode.NOT_FOUND))
    with pytest.raises(NotFound):
        admin.quotas("nowhere")
    peer.refuse.append(refusal(grpc.StatusCode.ABORTED))
    with pytest.raises(Conflict):
        admin.set_quota("a", 7, expected_revision=1)
    with pytest.raises(InvalidRequest) as caught:
        admin.set_quota("a", -7)
    assert caught.value.field == "blocks"


def test_a_plan_says_what_would_be_moved_and_why(admin: Any) -> None:
    plan = admin.plan()
    assert plan.moves == (Move("a", "worker-1", "worker-0", "it is hot"),)
    assert (plan.served, plan.gain, plan.cost, plan.worthwhile) == (3.0, 1.5, 20.0, True)
    assert (plan.traffic[0].model, plan.traffic[0].burst, plan.traffic[0].waiting) == ("a", True, 4)


def test_moves_tell_what_happens(admin: Any, peer: Peer) -> None:
    first, last = admin.rebalance([Move("a", "worker-1")], drain_seconds=0.5)
    (move,) = peer.asked.moves  # type: ignore[attr-defined]
    assert (move.model, move.source_worker, move.target_worker) == ("a", "", "worker-1")
    assert peer.asked.drain_seconds == 0.5  # type: ignore[attr-defined]
    assert (first.migration.phase, first.ended, first.total) == (MigrationPhase.LOADING, 0, 1)
    assert (last.migration.phase, last.migration.began, last.migration.ended) == ("done", 1.5, 2.5)
    *_, last = admin.load("b", "worker-1")
    assert (last.migration.model, last.migration.error) == ("b", "")
    *_, last = admin.unload("b")
    assert (last.migration.phase, last.migration.error) == (MigrationPhase.ROLLED_BACK, "it was away")
    assert not peer.asked.HasField("drain_seconds")  # type: ignore[attr-defined]
    admin.unpin("b")
    assert peer.asked == admin_pb2.SetPinnedRequest(model="b")
    assert admin.cancel("m1").phase is MigrationPhase.ROLLING_BACK


def test_a_drain_ends_with_an_empty_worker(admin: Any, peer: Peer) -> None:
    *_, before, last = admin.drain("worker-0")
    assert before.migration is not None
    assert (before.held_blocks, before.models_left) == (95, 1)
    assert (last.migration, last.held_blocks, last.models_left) == (None, 0, 0)
    admin.undrain("worker-0")
    assert peer.asked == admin_pb2.DrainRequest(worker="worker-0", undo=True)


def test_errors_of_a_stream_are_typed_and_come_when_it_is_read(admin: Any, peer: Peer) -> None:
    peer.refuse.append(refusal(grpc.StatusCode.FAILED_PRECONDITION, "busy"))
    with pytest.raises(FailedPrecondition, match="busy"):
        list(admin.rebalance())
    with pytest.raises(InvalidRequest) as caught:
        admin.unload("a", drain_seconds="soon")
    assert caught.value.field == "drain_seconds"
