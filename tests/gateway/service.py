"""A gateway of a test's own, with a real Valkey and a scripted scheduler, and a client without our SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.documents import PlacementStore
from muxserve.common.registry import Registry
from muxserve.gateway.__main__ import serve
from muxserve.gateway.service import SERVICE
from muxserve.gateway.settings import GatewaySettings
from muxserve.gateway.tokenizer import Tokenizer
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2, inference_pb2_grpc
from tests.gateway.peer import SchedulerPeer
from tests.support.valkey import ValkeyProcess

CONTEXT, VOCABULARY, EOS = 256, 49152, 2
READY, LOADING, FAILED = (
    inference_pb2.MODEL_STATE_READY,
    inference_pb2.MODEL_STATE_LOADING,
    inference_pb2.MODEL_STATE_FAILED,
)


def placed(
    name: str,
    path: Path | str,
    state: inference_pb2.ModelState.ValueType = READY,
    reason: str = "",
    context: int = CONTEXT,
) -> admin_pb2.PlacedModel:
    return admin_pb2.PlacedModel(
        config=common_pb2.ModelConfig(name=name, path=str(path)),
        state=state,
        reason=reason,
        shape=common_pb2.ModelShape(
            architecture="llama",
            dtype="float32",
            context_length=context,
            vocab_size=VOCABULARY,
            eos_token_ids=[EOS],
        ),
    )


async def place(redis: Redis, epoch: int, *models: admin_pb2.PlacedModel) -> None:
    """Put a placement with these models in force."""
    unit = admin_pb2.Unit(unit="unit-0", models=models)
    assert await PlacementStore(redis).compare_and_set(
        epoch - 1, admin_pb2.Placement(epoch=epoch, units=[unit])
    )


@dataclass
class Running:
    """Everything that a test of the gateway talks to."""

    valkey: ValkeyProcess
    redis: Redis
    scheduler: SchedulerPeer
    tokenizer: Tokenizer
    channel: grpc.aio.Channel
    stop: asyncio.Event
    ended: asyncio.Task[None]
    address: str

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    def generate(self, timeout: float | None = 30, **fields: Any) -> Any:
        """Call Generate; the model is "smol" and the prompt short unless said otherwise."""
        request = {"model": "smol", **fields}
        if not {"prompt", "prompt_tokens", "chat"} & fields.keys():
            request["prompt"] = "The capital"
        return self.stub.Generate(inference_pb2.GenerateRequest(**request), timeout=timeout)

    async def health(self, name: str = SERVICE) -> int:
        """The status of the gRPC health protocol."""
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        return int(answer.status)

    async def wait_for_health(self, serving: bool) -> None:
        kind = health_pb2.HealthCheckResponse
        wanted = kind.SERVING if serving else kind.NOT_SERVING
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        async with asyncio.timeout(10):
            async for answer in watch:
                if answer.status == wanted:
                    break
        watch.cancel()

    async def wait_for_queue(self, length: int, model: str = "smol") -> None:
        """Wait until the model's stream has that many entries, delivered or not."""
        async with asyncio.timeout(10):
            while await self.redis.xlen(keys.queue(model)) != length:  # noqa: ASYNC110 - Redis does not tell
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(
    valkey: ValkeyProcess, redis: Redis, smollm2: Path, folder: Path, **settings: Any
) -> AsyncIterator[Running]:
    """A gateway with models in every state and a scheduler; ready."""
    bare = folder / "bare"
    bare.mkdir()
    broken = folder / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    await place(
        redis,
        1,
        placed("smol", smollm2),
        placed("smol-too", smollm2),
        placed("bare", bare),
        placed("broken", broken),
        placed("coming", smollm2, LOADING),
        placed("failed", smollm2, FAILED, "needs 9 GiB, 1 GiB is free"),
    )
    scheduler = SchedulerPeer(redis)
    await scheduler.start()
    stop = asyncio.Event()
    options = GatewaySettings(redis_url=valkey.url, **settings)
    ended = asyncio.create_task(serve(options, stop))
    registry = Registry(redis)
    async with asyncio.timeout(10):
        while not (found := await registry.list("gateway")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await scheduler.attached.wait()
    large = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(found[0].address, options=large) as channel:
        tokenizer = Tokenizer.load(smollm2)
        up = Running(valkey, redis, scheduler, tokenizer, channel, stop, ended, found[0].address)
        await up.wait_for_health(True)
        yield up
        stop.set()
        await ended
        await scheduler.kill()


async def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    """All messages."""
    return [message async for message in call]


def text_of(messages: list[inference_pb2.GenerateResponse]) -> str:
    return "".join(message.text for message in messages)


def ids_of(messages: list[inference_pb2.GenerateResponse]) -> list[int]:
    return [token for message in messages for token in message.token_ids]


@dataclass
class Refusal:
    """A status with its details."""

    code: grpc.StatusCode
    message: str
    field: str = ""
    retry_after: float | None = None
    request_id: str = ""
    reason: str = ""


async def refusal(call: Any) -> Refusal:
    """The error that a call ends with."""
    try:
        await collect(call)
    except grpc.aio.AioRpcError as error:
        return parse(error)
    raise AssertionError("the call did not fail")


def parse(error: grpc.aio.AioRpcError) -> Refusal:
    found = Refusal(error.code(), error.details() or "")
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        bad, retry, info = (
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.ErrorInfo(),
        )
        if detail.Unpack(bad):
            found.field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            found.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(info):
            assert info.domain == "muxserve"
            found.reason, found.request_id = info.reason, info.metadata["request_id"]
    return found
