"""Two models behind one endpoint: the text is right, and both live in one arena."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import transformers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from muxserve.client import AsyncClient, Client
from tests.e2e.conftest import Cluster

PROMPT = "The capital of France is"


@pytest.fixture(scope="session")
def reference(smollm2: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype="float32"
    )


def continuation(model: transformers.PreTrainedModel, gguf: Path, prompt: str, tokens: int) -> str:
    """What transformers says, greedily."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    inputs = tokenizer(prompt, return_tensors="pt")
    generate: Any = model.generate  # its declared type is not callable
    output = generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_generate_prints_what_transformers_prints(
    cluster: Cluster, reference: transformers.PreTrainedModel, smollm2: Path
) -> None:
    done = cluster.cli("generate", "-m", "a", "--max-tokens", "24", "--temperature", "0", PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n") == continuation(reference, smollm2, PROMPT, 24)


async def test_two_models_decode_at_once_in_one_arena(cluster: Cluster) -> None:
    async with AsyncClient(cluster.gateway) as client:

        async def run(model: str) -> int:
            result = await client.generate(model, PROMPT, max_tokens=400, temperature=0, ignore_eos=True)
            return result.usage.completion_tokens

        work = [asyncio.create_task(run(model)) for model in "abab"]

        def both(status: dict[str, object]) -> bool:
            models = {m["name"]: m for m in status["models"]}  # type: ignore[attr-defined]
            return all(models[n]["running"] > 0 and models[n]["blocks_held"] > 0 for n in "ab")

        status = await asyncio.to_thread(cluster.wait, "both models hold blocks", both, 20.0)
        assert all(m["quota_blocks"] > 0 for m in status["models"])
        assert len(status["pool"]) == 1
        assert await asyncio.gather(*work) == [400] * 4
    await asyncio.to_thread(cluster.wait_idle)


def test_stream_is_the_text_in_pieces(client: Client) -> None:
    whole = client.generate("a", PROMPT, max_tokens=24, temperature=0)
    with client.stream("a", PROMPT, max_tokens=24, temperature=0) as stream:
        pieces = [chunk.text for chunk in stream]
    assert "".join(pieces) == whole.text
    assert len(pieces) > 2
    assert stream.result.token_ids == whole.token_ids


def test_chat_follows_the_template(client: Client) -> None:
    answer = client.chat(
        "a", [{"role": "user", "content": "What is the capital of France?"}], max_tokens=32, temperature=0
    )
    assert "Paris" in answer.text
    assert answer.finish_reason.name == "STOP"


def test_same_seed_same_text_whatever_else_runs(client: Client) -> None:
    def text(seed: int) -> str:
        return client.generate("a", PROMPT, max_tokens=24, temperature=0.9, seed=seed).text

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    free = client.generate("a", PROMPT, max_tokens=24, temperature=0).text
    stop = free[5:9]
    cut = client.generate("a", PROMPT, max_tokens=24, temperature=0, stop=[stop])
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason.name == "STOP"


async def test_health_answers_a_client_that_is_not_ours(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.gateway) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types leave the methods out
        for name in ("", "muxserve.v1.InferenceService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_answers_a_client_that_is_not_ours(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.gateway) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "muxserve.v1.InferenceService" in database.get_services()
        file = database.FindFileContainingSymbol("muxserve.v1.InferenceService")
        assert [m.name for m in file.service[0].method] == ["Generate", "ListModels", "GetModel"]
