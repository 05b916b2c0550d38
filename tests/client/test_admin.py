"""The operators' calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from muxserve.client import Conflict, InvalidRequest, ModelState, NotFound, QuotaState
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
