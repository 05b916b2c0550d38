"""Bad requests: the status, the field, the request id; and nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from muxserve.common import keys
from muxserve.v1 import common_pb2, inference_pb2
from tests.gateway.service import LOADING, READY, Running, collect, ids_of, parse, place, placed, refusal

INF, NAN = float("inf"), float("nan")


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": common_pb2.SamplingParams(**fields)}


def chat(*messages: tuple[str, str]) -> dict[str, Any]:
    each = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return {"chat": inference_pb2.Chat(messages=each)}


def ids(*token_ids: int) -> dict[str, Any]:
    return {"prompt_tokens": inference_pb2.TokenIds(ids=token_ids)}


BAD: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": ""}),
    ("model", {"model": "m" * 1000}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": "word " * 1000}),
    ("prompt", {"prompt": "x" * 1_000_000}),
    ("prompt_tokens", ids()),
    ("prompt_tokens", ids(49152)),
    ("prompt_tokens", ids(2**32 - 1)),
    ("prompt_tokens", ids(*range(256))),
    ("prompt_tokens", ids(*range(5000))),
    ("chat.messages", chat()),
    ("chat.messages[1].role", chat(("user", "hi"), ("", "hi"))),
    ("chat.messages", chat(("user", "word " * 1000))),
    ("chat.messages", chat(("user", "x" * 3_000_000))),
    ("max_tokens", {"max_tokens": 255}),
    ("max_tokens", {"max_tokens": 2**32 - 1}),
    *(("sampling.temperature", sampling(temperature=value)) for value in (-0.1, 100.5, INF, -INF, NAN)),
    *(("sampling.top_p", sampling(top_p=value)) for value in (0.0, 2.0, -0.5, NAN)),
    *(("sampling.min_p", sampling(min_p=value)) for value in (-0.1, 1.1, NAN)),
    *(("sampling.repetition_penalty", sampling(repetition_penalty=v)) for v in (0.0, -1.0, 10.5, INF, NAN)),
    *(("sampling.presence_penalty", sampling(presence_penalty=value)) for value in (-2.1, 2.1, NAN)),
    *(("sampling.frequency_penalty", sampling(frequency_penalty=value)) for value in (-2.1, 2.1, INF)),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": ["x"] * 10_001}),
    ("stop", {"stop": ["ok", ""]}),
    ("stop", {"stop": ["é" * 129]}),
    ("stop", {"model": "bare", "stop": ["x"], **ids(1)}),
    ("stop_token_ids", {"stop_token_ids": range(65)}),
    ("stop_token_ids", {"stop_token_ids": [49152]}),
    ("logprobs", {"logprobs": 21}),
    ("priority", {"priority": 101}),
    ("priority", {"priority": -101}),
    ("tenant", {"tenant": "x" * 129}),
    ("tenant", {"tenant": "a\nb"}),
    ("request_id", {"request_id": "x" * 129}),
    ("request_id", {"request_id": "näme"}),
    ("request_id", {"request_id": "a\nb"}),
]


@pytest.fixture(autouse=True)
async def goes_on(up: Running) -> Any:
    """After every test nothing waits, and the gateway serves."""
    yield
    assert await up.redis.xlen(keys.queue("smol")) == 0
    call = up.generate(max_tokens=3)
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, [5, 6, 7], finish=common_pb2.FINISH_REASON_LENGTH)
    assert ids_of(await collect(call)) == [5, 6, 7]
    await up.scheduler.queue.acknowledge("smol", [delivery.entry_id])


async def test_every_bad_field_is_named(up: Running) -> None:
    for field, fields in BAD:
        refused = await refusal(up.generate(**fields))
        assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, field), (fields, refused)
        assert refused.message.startswith(f"{field}: ") and len(refused.message) < 300
        assert refused.request_id and refused.reason == "INVALID_ARGUMENT"


async def test_the_borders_are_allowed(up: Running) -> None:
    for fields in (
        {"max_tokens": 254},
        ids(*range(255)),
        sampling(temperature=0.0, top_p=1.0, min_p=1.0, repetition_penalty=10.0, presence_penalty=-2.0),
        sampling(temperature=100.0, frequency_penalty=2.0, top_k=2**32 - 1),
        {"stop": ["x" * 256] * 16},
        {"stop_token_ids": range(64)},
        {"logprobs": 20},
        {"request_id": "x" * 128},
        chat(("critic", "")),
    ):
        call = up.generate(**fields)
        delivery = await up.scheduler.pull("smol")
        up.scheduler.tokens(delivery, 0, [5], finish=common_pb2.FINISH_REASON_LENGTH)
        assert ids_of(await collect(call)) == [5]
        assert delivery.request.sampling.top_k == 0  # as good as off
        await up.scheduler.queue.acknowledge("smol", [delivery.entry_id])


async def test_a_prompt_that_is_too_long_is_told_in_numbers(up: Running) -> None:
    refused = await refusal(up.generate(max_tokens=255))
    assert all(number in refused.message for number in ("2 tokens", "255", "257", "256"))
    refused = await refusal(up.generate(**ids(*range(300))))
    assert "300" in refused.message and "256" in refused.message


async def test_an_unknown_model_is_not_found_and_the_known_are_named(up: Running) -> None:
    refused = await refusal(up.generate(model="nosuch"))
    assert refused.code == grpc.StatusCode.NOT_FOUND
    assert '"nosuch"' in refused.message and "smol-too" in refused.message
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await up.stub.GetModel(inference_pb2.GetModelRequest(name="nosuch"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await up.stub.GetModel(inference_pb2.GetModelRequest())
    assert parse(caught.value).field == "name"


async def test_a_model_that_loads_is_unavailable_for_now(up: Running) -> None:
    refused = await refusal(up.generate(model="coming"))
    assert refused.code == grpc.StatusCode.UNAVAILABLE and refused.retry_after
    assert "loading" in refused.message


async def test_a_model_that_failed_says_why(up: Running) -> None:
    refused = await refusal(up.generate(model="failed"))
    assert refused.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "needs 9 GiB" in refused.message


async def test_text_for_a_model_without_usable_tokenizer_is_refused(up: Running) -> None:
    for fields in ({"model": "bare"}, {"model": "broken"}, {"model": "broken", **ids(1)}):
        refused = await refusal(up.generate(**fields))
        assert refused.code == grpc.StatusCode.FAILED_PRECONDITION
        assert "tokenizer" in refused.message


async def test_no_input_at_all_names_the_prompt(up: Running) -> None:
    refused = await refusal(up.stub.Generate(inference_pb2.GenerateRequest(model="smol")))
    assert refused.field == "prompt"


async def test_a_message_of_50_mb_is_refused_with_the_limit(up: Running) -> None:
    refused = await refusal(up.generate(prompt="x" * 50_000_000))
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(16 * 2**20) in refused.message


async def test_models_are_listed_with_their_state(up: Running) -> None:
    models = (await up.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert [m.name for m in models] == ["bare", "broken", "coming", "failed", "smol", "smol-too"]
    by_name = {m.name: m for m in models}
    assert by_name["smol"].state == READY and by_name["smol"].chat
    assert by_name["coming"].state == LOADING
    assert by_name["failed"].reason == "needs 9 GiB, 1 GiB is free"
    assert not by_name["bare"].chat and not by_name["broken"].chat
    one = (await up.stub.GetModel(inference_pb2.GetModelRequest(name="smol"))).model
    assert one == by_name["smol"]
    assert (one.context_length, one.architecture, one.dtype) == (256, "llama", "float32")


async def test_a_new_placement_is_followed(up: Running, smollm2: Any) -> None:
    await place(up.redis, 2, placed("smol", smollm2, LOADING))
    await up.wait_for_health(False)
    assert (await refusal(up.generate())).code == grpc.StatusCode.UNAVAILABLE
    assert (await refusal(up.generate(model="bare"))).code == grpc.StatusCode.NOT_FOUND
    await place(up.redis, 3, placed("smol", smollm2))
    await up.wait_for_health(True)


async def test_health_and_reflection_answer_foreign_clients(up: Running) -> None:
    kind = health_pb2.HealthCheckResponse
    assert await up.health("") == kind.SERVING
    assert await up.health() == kind.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await up.health("nosuch")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    def reflect() -> tuple[list[str], list[str]]:
        with grpc.insecure_channel(up.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            file = database.FindFileContainingSymbol("muxserve.v1.InferenceService")
            return list(database.get_services()), [m.name for m in file.service[0].method]

    services, methods = await asyncio.to_thread(reflect)
    assert "muxserve.v1.InferenceService" in services and "grpc.health.v1.Health" in services
    assert methods == ["Generate", "ListModels", "GetModel"]
