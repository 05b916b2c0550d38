"""A gRPC server that plays gateway and placement by a script, for the SDK to be tested against."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from muxserve.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    scheduler_pb2,
    worker_pb2,
)
from tests.support.ports import free_port

Script = Callable[
    [inference_pb2.GenerateRequest, grpc.ServicerContext], Iterable[inference_pb2.GenerateResponse]
]


def answer(
    pieces: Iterable[str],
    request_id: str = "",
    finish: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_STOP,
) -> Iterator[inference_pb2.GenerateResponse]:
    """One token per piece of text, then the end."""
    index = 0
    for index, text in enumerate(pieces, 1):
        yield inference_pb2.GenerateResponse(
            request_id=request_id, index=index - 1, token_ids=[100 + index], text=text
        )
    yield inference_pb2.GenerateResponse(
        request_id=request_id,
        index=index,
        finish_reason=finish,
        usage=common_pb2.Usage(prompt_tokens=7, completion_tokens=index),
    )


def refusal(
    code: grpc.StatusCode,
    message: str = "no",
    *,
    field: str = "",
    retry_after: float | None = None,
    request_id: str = "req-of-server",
) -> grpc.Status:
    """A status with details as the gateway makes them, by the public packages that the SDK does without."""
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason="BECAUSE", domain="muxserve", metadata={"request_id": request_id})
    )
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="is wrong")
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status)


class Peer(inference_pb2_grpc.InferenceServiceServicer, admin_pb2_grpc.AdminServiceServicer):
    """Answers as `script` says and remembers what it was asked."""

    def __init__(self) -> None:
        self.script: Script = lambda request, _: answer(["Hello", " world"], request.request_id)
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.metadata: list[tuple[str, str | bytes]] = []
        self.calls: set[str] = set()
        self.ended = threading.Event()
        """Set when a generation has ended on the server, however it did."""
        self.refuse: list[grpc.Status] = []
        """Statuses for the next calls that are not generations."""
        self.quota: admin_pb2.SetQuotaRequest | None = None
        self.asked: object = None
        """The last request to move or pin something."""
        self.quota_states: list[admin_pb2.QuotaState.ValueType] = []
        """Of revision 4, the next times it is asked for."""

    def _called(self, name: str, context: grpc.ServicerContext) -> None:
        self.calls.add(name)
        if self.refuse:
            context.abort_with_status(self.refuse.pop(0))

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self.calls.add("Generate")
        self.requests.append(request)
        self.metadata = list(context.invocation_metadata())
        context.add_callback(self.ended.set)
        yield from self.script(request, context)

    def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        self._called("ListModels", context)
        return inference_pb2.ListModelsResponse(models=[_model("a"), inference_pb2.Model(name="b")])

    def GetModel(
        self, request: inference_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetModelResponse:
        self._called("GetModel", context)
        return inference_pb2.GetModelResponse(model=_model(request.name))

    def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        self._called("GetStatus", context)
        return STATUS

    def GetPlacement(
        self, request: admin_pb2.GetPlacementRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetPlacementResponse:
        self._called("GetPlacement", context)
        return admin_pb2.GetPlacementResponse(placement=STATUS.placement)

    def GetQuotas(
        self, request: admin_pb2.GetQuotasRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetQuotasResponse:
        self._called("GetQuotas", context)
        quotas = admin_pb2.Quotas(unit=request.unit or "unit-0", revision=3, blocks={"a": 10, "b": 20})
        state = self.quota_states.pop(0) if self.quota_states else admin_pb2.QUOTA_STATE_APPLIED
        history = [
            admin_pb2.QuotaRevision(revision=4, author="admin", state=state, asked_unix_ms=2_000),
            admin_pb2.QuotaRevision(
                revision=3,
                author="admin",
                blocks={"a": 10, "b": 20},
                asked_unix_ms=1_500,
                state=admin_pb2.QUOTA_STATE_DEFERRED,
                above=["a"],
            ),
            admin_pb2.QuotaRevision(revision=2, author="policy", state=admin_pb2.QUOTA_STATE_STALE),
        ]
        return admin_pb2.GetQuotasResponse(quotas=quotas, history=history, use=STATUS.workers[0].pool.models)

    def SetQuota(
        self, request: admin_pb2.SetQuotaRequest, context: grpc.ServicerContext
    ) -> admin_pb2.SetQuotaResponse:
        self.quota = request
        self._called("SetQuota", context)
        quotas = admin_pb2.Quotas(unit=request.unit, revision=4, blocks={request.model: request.blocks})
        return admin_pb2.SetQuotaResponse(quotas=quotas)

    def Plan(self, request: admin_pb2.PlanRequest, context: grpc.ServicerContext) -> admin_pb2.PlanResponse:
        self._called("Plan", context)
        return PLAN

    def Rebalance(
        self, request: admin_pb2.RebalanceRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.RebalanceResponse]:
        self.asked = request
        self._called("Rebalance", context)
        for event in _migration(request.moves[0].model if request.moves else "a"):
            yield admin_pb2.RebalanceResponse(event=event)

    def LoadModel(
        self, request: admin_pb2.AdminServiceLoadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.AdminServiceLoadModelResponse]:
        self.asked = request
        self._called("LoadModel", context)
        for event in _migration(request.model):
            yield admin_pb2.AdminServiceLoadModelResponse(event=event)

    def UnloadModel(
        self, request: admin_pb2.AdminServiceUnloadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.AdminServiceUnloadModelResponse]:
        self.asked = request
        self._called("UnloadModel", context)
        for event in _migration(request.model, admin_pb2.MIGRATION_PHASE_ROLLED_BACK):
            yield admin_pb2.AdminServiceUnloadModelResponse(event=event)

    def SetPinned(
        self, request: admin_pb2.SetPinnedRequest, context: grpc.ServicerContext
    ) -> admin_pb2.SetPinnedResponse:
        self.asked = request
        self._called("SetPinned", context)
        return admin_pb2.SetPinnedResponse(epoch=6)

    def Drain(
        self, request: admin_pb2.DrainRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.DrainResponse]:
        self.asked = request
        self._called("Drain", context)
        for event in () if request.undo else _migration("a"):
            yield admin_pb2.DrainResponse(event=event, held_blocks=95, models_left=1)
        yield admin_pb2.DrainResponse()

    def CancelMigration(
        self, request: admin_pb2.CancelMigrationRequest, context: grpc.ServicerContext
    ) -> admin_pb2.CancelMigrationResponse:
        self.asked = request
        self._called("CancelMigration", context)
        *_, event = _migration("a", admin_pb2.MIGRATION_PHASE_ROLLING_BACK)
        return admin_pb2.CancelMigrationResponse(migration=event.migration)


def _migration(
    model: str, end: admin_pb2.MigrationPhase.ValueType = admin_pb2.MIGRATION_PHASE_DONE
) -> Iterator[admin_pb2.MigrationEvent]:
    """Its beginning and its end."""
    for phase in (admin_pb2.MIGRATION_PHASE_LOADING, end):
        over = phase == end
        migration = admin_pb2.Migration(
            id="m1",
            model=model,
            source_worker="worker-0",
            target_worker="worker-1",
            phase=phase,
            author="admin",
            began_unix_ms=1500,
            ended_unix_ms=2500 if over else 0,
            error="it was away" if end == admin_pb2.MIGRATION_PHASE_ROLLED_BACK else "",
        )
        yield admin_pb2.MigrationEvent(migration=migration, ended=int(over), total=1)


PLAN = admin_pb2.PlanResponse(
    moves=[admin_pb2.Move(model="a", source_worker="worker-0", target_worker="worker-1", reason="it is hot")],
    served=3.0,
    gain=1.5,
    cost=20.0,
    worthwhile=True,
    reason="better",
    traffic=[admin_pb2.ModelTraffic(model="a", rate=2.0, recent_rate=9.0, burst=True, waiting=4)],
)


def _model(name: str) -> inference_pb2.Model:
    return inference_pb2.Model(
        name=name,
        state=inference_pb2.MODEL_STATE_READY,
        context_length=2048,
        architecture="llama",
        dtype="float32",
        chat=True,
    )


STATUS = admin_pb2.GetStatusResponse(
    placement=admin_pb2.Placement(
        epoch=5,
        units=[
            admin_pb2.Unit(
                unit="unit-0",
                worker_id="worker-0",
                worker_address="127.0.0.1:9000",
                worker_incarnation="w1",
                models=[
                    admin_pb2.PlacedModel(
                        config=common_pb2.ModelConfig(name="a", path="/a.gguf", dtype="float32"),
                        state=inference_pb2.MODEL_STATE_READY,
                        shape=common_pb2.ModelShape(architecture="llama", layers=30, head_dim=64),
                    ),
                    admin_pb2.PlacedModel(
                        config=common_pb2.ModelConfig(name="b", path="/b"),
                        state=inference_pb2.MODEL_STATE_LOADING,
                    ),
                ],
            )
        ],
        unplaced=[
            admin_pb2.PlacedModel(
                config=common_pb2.ModelConfig(name="c", path="/nowhere"),
                state=inference_pb2.MODEL_STATE_FAILED,
                reason="no such file",
                field="path",
            )
        ],
    ),
    units=[
        scheduler_pb2.UnitStatus(
            unit="unit-0",
            connected=True,
            policy="adbs",
            models=[
                scheduler_pb2.UnitModelStatus(
                    model="a", running=3, waiting=2, quota_blocks=10, preemptions=1, generated_tokens=99
                )
            ],
            prefill_jobs=7,
            decode_jobs=8,
        )
    ],
    workers=[
        worker_pb2.WorkerInfo(
            worker_id="worker-0",
            incarnation="w1",
            device="cpu",
            compute_units=2,
            partition="threads",
            pool=worker_pb2.PoolState(
                block_bytes=8192,
                total_blocks=1000,
                free_blocks=900,
                cached_blocks=5,
                models=[
                    worker_pb2.ModelBlocks(
                        model="a",
                        held_blocks=95,
                        quota_blocks=10,
                        borrowed_blocks=85,
                        peak_blocks=120,
                        prefix_query_tokens=640,
                        prefix_hit_tokens=512,
                        cached_blocks=5,
                    )
                ],
            ),
            executors=[worker_pb2.ExecutorInfo(kind="decode", pid=42, restarts=1)],
        )
    ],
    services=[
        admin_pb2.ServiceEntry(kind="gateway", id="g", address="127.0.0.1:8600", incarnation="1", pid=7)
    ],
)


class Server:
    """A running `Peer`. `address` stays the same over `stop()` and `start()`."""

    def __init__(self, *, max_receive_bytes: int = 4 * 2**20) -> None:
        self.peer = Peer()
        self._options = [("grpc.max_receive_message_length", max_receive_bytes), ("grpc.so_reuseport", 0)]
        self._port = free_port()
        self._server: grpc.Server | None = None
        self.start()

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serve."""
        server = grpc.server(ThreadPoolExecutor(8), options=self._options)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.peer, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self.peer, server)
        server.add_insecure_port(self.address)
        server.start()
        self._server = server

    def stop(self) -> None:
        """End calls that are open, and serve no more."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None
