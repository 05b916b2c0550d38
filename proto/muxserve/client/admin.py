"""The operators' clients, for the placement service: blocking and asyncio."""

from __future__ import annotations

from typing import Self

from muxserve.v1 import admin_pb2, admin_pb2_grpc

from .administration import placement_of, quotas_and_more_of, quotas_of, status_of
from .aio import AsyncTransport
from .inference import naming
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
    """Looks at a running MuxServe and changes its quotas. Every call raises the errors of
    `muxserve.client.errors`."""

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

    async def close(self) -> None:
        """Close the connection."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
