"""How far a deployment is on its way to serving, as the gateway and placement say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxserve.client import (
    AsyncAdminClient,
    AsyncClient,
    ClientOptions,
    ModelState,
    MuxServeError,
    PlacedModel,
    Status,
)

POLL = 0.1
"""Seconds between two looks."""

ASK_TIMEOUT = 3.0
GATEWAY = "muxserve.v1.InferenceService"


@dataclass(frozen=True, slots=True)
class ModelProgress:
    """How far a model is."""

    state: ModelState
    worker: str
    """Where it is loaded; empty: no place yet."""
    reason: str
    field: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far everything is."""

    services: frozenset[str] = frozenset()
    """Ids in the registry."""
    models: Mapping[str, ModelProgress] = field(default_factory=dict)
    """By name."""
    ready: bool = False
    """Every model can be used through the gateway; one that is asleep can."""

    @property
    def failed(self) -> list[str]:
        """Names of the models that cannot be served."""
        return [name for name, model in self.models.items() if model.state is ModelState.FAILED]


class Readiness:
    """Asks a deployment how far it is. To be closed."""

    def __init__(self, gateway: str, admin: str) -> None:
        options = ClientOptions(timeout=ASK_TIMEOUT, max_retries=0, connect_timeout=1.0)
        self._admin = AsyncAdminClient(admin, options=options)
        self._client = AsyncClient(gateway, options=options)
        self._channel = grpc.aio.insecure_channel(gateway)

    async def look(self) -> Progress:
        """The present state; services that do not answer yet count as not there."""
        try:
            status = await self._admin.status()
        except MuxServeError:
            return Progress()
        models = _models(status)
        ready = all(model.state.served for model in models.values())
        connected = all(unit.connected for unit in status.units)
        served = bool(models) and ready and connected and await self._gateway_serves(models)
        return Progress(frozenset(service.id for service in status.services), models, served)

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(self._admin.close(), self._client.close(), self._channel.close())

    async def _gateway_serves(self, models: Mapping[str, ModelProgress]) -> bool:
        """Whether the gateway has heard of all of them."""
        health: Any = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=GATEWAY), timeout=ASK_TIMEOUT)
            known = await self._client.models()
        except (grpc.aio.AioRpcError, MuxServeError):
            return False
        ready = {model.name for model in known if model.state.served}
        return answer.status == health_pb2.HealthCheckResponse.SERVING and ready >= models.keys()


def _models(status: Status) -> dict[str, ModelProgress]:
    def progress(model: PlacedModel, worker: str) -> ModelProgress:
        return ModelProgress(model.state, worker, model.reason, model.field)

    placed = {
        model.config.name: progress(model, unit.worker_id)
        for unit in status.placement.units
        for model in unit.models
    }
    return placed | {model.config.name: progress(model, "") for model in status.placement.unplaced}
