"""InferenceService over the gateway."""

from __future__ import annotations

import uuid
from typing import Any, cast

import grpc

from muxserve.common.errors import InvalidArgument, ServiceError
from muxserve.gateway.gateway import Gateway
from muxserve.gateway.validation import check_request_id
from muxserve.v1 import inference_pb2, inference_pb2_grpc

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
REQUEST_ID = "x-request-id"
"""Initial metadata of every Generate call."""


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """What clients call."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(  # type: ignore[override]  # a coroutine that writes: grpc.aio takes both
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        request_id = f"req-{uuid.uuid4().hex}"
        try:
            if request.request_id:
                check_request_id(request.request_id)
                request_id = request.request_id
            await context.send_initial_metadata(((REQUEST_ID, request_id),))
            await self._gateway.generate(
                request,
                request_id,
                context.time_remaining(),
                lambda release: context.add_done_callback(cast(Any, lambda _context: release())),
                context.write,
            )
        except ServiceError as error:
            error.request_id = request_id
            raise

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: object
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=await self._gateway.catalog.describe_all())

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: object
    ) -> inference_pb2.GetModelResponse:
        if not request.name:
            raise InvalidArgument("name", "is required")
        catalog = self._gateway.catalog
        return inference_pb2.GetModelResponse(model=await catalog.describe(catalog.find(request.name)))
