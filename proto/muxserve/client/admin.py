"""The operators' clients, for the placement service: blocking and asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Self

from muxserve.v1 import admin_pb2, admin_pb2_grpc

from .administration import placement_of, quotas_and_more_of, quotas_of, status_of
from .aio import AsyncTransport
from .inference import naming
from .migrations import (
    DrainEvent,
    Migration,
    MigrationEvent,
    Move,
    Plan,
    drain_event_of,
    drain_request,
    event_of,
    migration_of,
    plan_of,
    rebalance_request,
    unload_request,
)
from .options import ClientOptions, with_timeout
from .status import Placement, Quotas, Status
from .sync import Transport


def _set_quota_request(
    unit: str, model: str, blocks: int, expected_revision: int | None
) -> admin_pb2.SetQuotaRequest:
    request = admin_pb2.SetQuotaRequest(unit=unit, model=model)
    with naming("blocks"):
        request.blocks = blocks
    with naming("expected_revision"):
        request.expected_revision = expected_revision or 0
    return request


class AdminClient:
    """Looks at a running MuxServe, changes its quotas and moves its models. Every call raises the errors of
    `muxserve.client.errors`; those that return an iterator raise them when it is read."""

    def __init__(
        self,
        target: str = "127.0.0.1:8601",
        *,
        options: ClientOptions | None = None,
        timeout: float | None = None,
    ) -> None:
        """`target`: host:port, or any gRPC target. `timeout`: in place of the one in `options`."""
        self._transport = Transport(target, with_timeout(options, timeout))
        self._stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)

    def status(self, *, timeout: float | None = None) -> Status:
        """Placement, units, models, workers and processes."""
        return status_of(self._transport.call(self._stub.GetStatus, admin_pb2.GetStatusRequest(), timeout))

    def placement(self, *, timeout: float | None = None) -> Placement:
        """The placement in force."""
        request = admin_pb2.GetPlacementRequest()
        return placement_of(self._transport.call(self._stub.GetPlacement, request, timeout).placement)

    def quotas(self, unit: str = "", *, timeout: float | None = None) -> Quotas:
        """Block quotas of a unit; empty: the only one. NotFound: there is no such unit."""
        request = admin_pb2.GetQuotasRequest(unit=unit)
        return quotas_and_more_of(self._transport.call(self._stub.GetQuotas, request, timeout))

    def set_quota(
        self,
        model: str,
        blocks: int,
        *,
        unit: str = "",
        expected_revision: int | None = None,
        timeout: float | None = None,
    ) -> Quotas:
        """Set how many blocks a model may hold without borrowing, until the policy adapts it; never retried.

        NotFound: no such unit or model. InvalidRequest: more blocks than the arena has. Conflict: the
        revision is not `expected_revision`.
        """
        request = _set_quota_request(unit, model, blocks, expected_revision)
        return quotas_of(self._transport.call(self._stub.SetQuota, request, timeout, retry=False).quotas)

    def plan(self, *, timeout: float | None = None) -> Plan:
        """What would be moved now, and why. Changes nothing."""
        return plan_of(self._transport.call(self._stub.Plan, admin_pb2.PlanRequest(), timeout))

    def rebalance(
        self,
        moves: Iterable[Move] = (),
        *,
        drain_seconds: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[MigrationEvent]:
        """Move models, one after the other; without `moves`, as `plan` says, if that is worthwhile. What
        happens, until all have ended; migrations go on where nobody reads. Look at the last phases: some
        may be ROLLED_BACK.

        NotFound: no such model or worker. FailedPrecondition: migrations are already under way, or one of
        these cannot be. `drain_seconds`: that sequences on a source have to finish. None: as configured.
        """
        request = rebalance_request(moves, drain_seconds)
        answers = self._transport.stream(self._stub.Rebalance, request, timeout)
        return (event_of(answer.event) for answer in answers)

    def load(self, model: str, worker: str, *, timeout: float | None = None) -> Iterator[MigrationEvent]:
        """Load a model on one more worker, or wake it there. Iterate to see what happens, as in `rebalance`;
        where it is loaded already, that is nothing."""
        request = admin_pb2.AdminServiceLoadModelRequest(model=model, worker=worker)
        answers = self._transport.stream(self._stub.LoadModel, request, timeout)
        return (event_of(answer.event) for answer in answers)

    def unload(
        self,
        model: str,
        worker: str = "",
        *,
        drain_seconds: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[MigrationEvent]:
        """Take a model off a worker (empty: the only one that has it), where it goes to sleep if that is its
        only place. Iterate to see what happens, as of `rebalance`.

        FailedPrecondition: it is pinned or has a min_resident, and has to stay loaded.
        """
        request = unload_request(model, worker, drain_seconds)
        answers = self._transport.stream(self._stub.UnloadModel, request, timeout)
        return (event_of(answer.event) for answer in answers)

    def pin(self, model: str, *, timeout: float | None = None) -> None:
        """Never put a model to sleep, and move it only by hand. NotFound: there is none of that name."""
        request = admin_pb2.SetPinnedRequest(model=model, pinned=True)
        self._transport.call(self._stub.SetPinned, request, timeout)

    def unpin(self, model: str, *, timeout: float | None = None) -> None:
        """Lift what `pin` said, or the configuration. NotFound: there is none of that name."""
        request = admin_pb2.SetPinnedRequest(model=model, pinned=False)
        self._transport.call(self._stub.SetPinned, request, timeout)

    def drain(
        self, worker: str, *, drain_seconds: float | None = None, timeout: float | None = None
    ) -> Iterator[DrainEvent]:
        """Have all models leave a worker, which gets none until `undrain`. What happens, until it has none; a
        drain goes on where nobody reads.

        NotFound: no such worker. FailedPrecondition: a model has nowhere to go, and nothing was changed.
        """
        request = drain_request(worker, False, drain_seconds)
        answers = self._transport.stream(self._stub.Drain, request, timeout)
        return (drain_event_of(answer) for answer in answers)

    def undrain(self, worker: str, *, timeout: float | None = None) -> None:
        """Let a drained worker have models again; a drain that is under way ends. NotFound: no such
        worker."""
        request = drain_request(worker, True, None)
        for _ in self._transport.stream(self._stub.Drain, request, timeout):
            pass

    def cancel(self, migration: str = "", *, timeout: float | None = None) -> Migration:
        """Roll back the migration under way (empty: whichever it is) and drop those that are to follow it.

        NotFound: there is none. FailedPrecondition: it is too late.
        """
        request = admin_pb2.CancelMigrationRequest(id=migration)
        answer = self._transport.call(self._stub.CancelMigration, request, timeout, retry=False)
        return migration_of(answer.migration)

    def close(self) -> None:
        """Close the connection."""
        self._transport.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncAdminClient:
    """`AdminClient` for asyncio."""

    def __init__(
        self,
        target: str = "127.0.0.1:8601",
        *,
        options: ClientOptions | None = None,
        timeout: float | None = None,
    ) -> None:
        """`target`: host:port, or any gRPC target. `timeout`: in place of the one in `options`."""
        self._transport = AsyncTransport(target, with_timeout(options, timeout))

    async def status(self, *, timeout: float | None = None) -> Status:
        """Placement, units, models, workers and processes."""
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        return status_of(await self._transport.call(stub.GetStatus, admin_pb2.GetStatusRequest(), timeout))

    async def placement(self, *, timeout: float | None = None) -> Placement:
        """The placement in force."""
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = admin_pb2.GetPlacementRequest()
        return placement_of((await self._transport.call(stub.GetPlacement, request, timeout)).placement)

    async def quotas(self, unit: str = "", *, timeout: float | None = None) -> Quotas:
        """Block quotas of a unit; empty: the only one. NotFound: there is no such unit."""
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = admin_pb2.GetQuotasRequest(unit=unit)
        return quotas_and_more_of(await self._transport.call(stub.GetQuotas, request, timeout))

    async def set_quota(
        self,
        model: str,
        blocks: int,
        *,
        unit: str = "",
        expected_revision: int | None = None,
        timeout: float | None = None,
    ) -> Quotas:
        """Set how many blocks a model may hold without borrowing, until the policy adapts it; never retried.

        NotFound: no such unit or model. InvalidRequest: more blocks than the arena has. Conflict: the
        revision is not `expected_revision`.
        """
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = _set_quota_request(unit, model, blocks, expected_revision)
        return quotas_of((await self._transport.call(stub.SetQuota, request, timeout, retry=False)).quotas)

    async def plan(self, *, timeout: float | None = None) -> Plan:
        """What would be moved now, and why. Changes nothing."""
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        return plan_of(await self._transport.call(stub.Plan, admin_pb2.PlanRequest(), timeout))

    def rebalance(
        self,
        moves: Iterable[Move] = (),
        *,
        drain_seconds: float | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[MigrationEvent]:
        """Move models, one after the other; without `moves`, as `plan` says, if that is worthwhile. What
        happens, until all have ended; migrations go on where nobody reads. Look at the last phases: some
        may be ROLLED_BACK.

        NotFound: no such model or worker. FailedPrecondition: migrations are already under way, or one of
        these cannot be. `drain_seconds`: that sequences on a source have to finish. None: as configured.
        """
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = rebalance_request(moves, drain_seconds)
        answers = self._transport.stream(stub.Rebalance, request, timeout)
        return (event_of(answer.event) async for answer in answers)

    def load(self, model: str, worker: str, *, timeout: float | None = None) -> AsyncIterator[MigrationEvent]:
        """Load a model on one more worker, or wake it there. Iterate to see what happens, as in `rebalance`;
        where it is loaded already, that is nothing."""
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = admin_pb2.AdminServiceLoadModelRequest(model=model, worker=worker)
        answers = self._transport.stream(stub.LoadModel, request, timeout)
        return (event_of(answer.event) async for answer in answers)

    def unload(
        self,
        model: str,
        worker: str = "",
        *,
        drain_seconds: float | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[MigrationEvent]:
        """Take a model off a worker (empty: the only one that has it), where it goes to sleep if that is its
        only place. Iterate to see what happens, as of `rebalance`.

        FailedPrecondition: it is pinned or has a min_resident, and has to stay loaded.
        """
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = unload_request(model, worker, drain_seconds)
        answers = self._transport.stream(stub.UnloadModel, request, timeout)
        return (event_of(answer.event) async for answer in answers)

    async def pin(self, model: str, *, timeout: float | None = None) -> None:
        """Never put a model to sleep, and move it only by hand. NotFound: there is none of that name."""
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = admin_pb2.SetPinnedRequest(model=model, pinned=True)
        await self._transport.call(stub.SetPinned, request, timeout)

    async def unpin(self, model: str, *, timeout: float | None = None) -> None:
        """Lift what `pin` said, or the configuration. NotFound: there is none of that name."""
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = admin_pb2.SetPinnedRequest(model=model, pinned=False)
        await self._transport.call(stub.SetPinned, request, timeout)

    def drain(
        self, worker: str, *, drain_seconds: float | None = None, timeout: float | None = None
    ) -> AsyncIterator[DrainEvent]:
        """Have all models leave a worker, which gets none until `undrain`. What happens, until it has none; a
        drain goes on where nobody reads.

        NotFound: no such worker. FailedPrecondition: a model has nowhere to go, and nothing was changed.
        """
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = drain_request(worker, False, drain_seconds)
        answers = self._transport.stream(stub.Drain, request, timeout)
        return (drain_event_of(answer) async for answer in answers)

    async def undrain(self, worker: str, *, timeout: float | None = None) -> None:
        """Let a drained worker have models again; a drain that is under way ends. NotFound: no such
        worker."""
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = drain_request(worker, True, None)
        async for _ in self._transport.stream(stub.Drain, request, timeout):
            pass

    async def cancel(self, migration: str = "", *, timeout: float | None = None) -> Migration:
        """Roll back the migration under way (empty: whichever it is) and drop those that are to follow it.

        NotFound: there is none. FailedPrecondition: it is too late.
        """
        stub = admin_pb2_grpc.AdminServiceStub(self._transport.channel)
        request = admin_pb2.CancelMigrationRequest(id=migration)
        answer = await self._transport.call(stub.CancelMigration, request, timeout, retry=False)
        return migration_of(answer.migration)

    async def close(self) -> None:
        """Close the connection."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
