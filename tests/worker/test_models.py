"""Loading, inspecting and unloading models: once each, and with a clear word for what is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from muxserve.common.errors import Aborted, from_rpc_error
from muxserve.v1 import common_pb2, worker_pb2
from muxserve.worker.models import ModelChoice
from tests.worker.harness import Harness, running_worker

pytestmark = pytest.mark.asyncio(loop_scope="session")

Code = grpc.StatusCode


async def fault(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Code, field and message of the error that `call` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    return caught.value.code(), getattr(error, "field", ""), str(error)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_inspect_says_what_serving_takes(worker: Harness, llama: Path) -> None:
    shape = await worker.inspect("any", llama)
    assert (shape.architecture, shape.dtype, shape.context_length) == ("llama", "float32", 512)
    assert (shape.tokens_per_block, shape.blocks_per_span, shape.slots) == (8, 6, 8)
    assert shape.weight_bytes > 0
    assert list(shape.eos_token_ids) == [2]
    assert (await worker.inspect("any", llama, dtype="bfloat16")).tokens_per_block == 16
    assert (await worker.inspect("any", llama, max_context=100)).context_length == 100


async def test_a_changed_checkpoint_is_read_again(worker: Harness, llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    assert (await worker.inspect("copy", copy)).context_length == 512
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    assert (await worker.inspect("copy", copy)).context_length == 256


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cramped() -> AsyncIterator[Harness]:
    """Room for 100 blocks and 3 MiB of weights."""
    async with running_worker(arena=100 * 4096, weight_budget=3 * 2**20) as harness:
        yield harness


async def test_context_is_what_the_whole_arena_holds_of_one_sequence(cramped: Harness, llama: Path) -> None:
    # 100 blocks are 16 groups of 6: 128 tokens.
    assert (await cramped.load("llama", llama)).context_length == 128
    async with cramped.stream() as stream:
        [text] = await stream.generate("llama", [[5] * 100], 28)
        assert len(text) == 28
    await cramped.assert_idle()
    await cramped.unload("llama")


async def test_weights_beyond_the_budget_are_refused_with_the_numbers(cramped: Harness, llama: Path) -> None:
    await cramped.load("one", llama)
    code, _, text = await fault(cramped.load("two", llama, dtype="bfloat16"))
    assert code is Code.RESOURCE_EXHAUSTED
    assert "1 MiB" in text
    assert "3 MiB" in text
    # Under another name the same weights take nothing more.
    await cramped.load("twin", llama)
    await cramped.unload("one")
    await cramped.unload("twin")
    await cramped.load("two", llama, dtype="bfloat16")
    await cramped.unload("two")


async def test_calls_for_one_model_share_one_load(worker: Harness, qwen: Path) -> None:
    shapes = await asyncio.gather(*(worker.load("shared", qwen) for _ in range(4)))
    assert len({shape.SerializeToString() for shape in shapes}) == 1
    assert await worker.load("shared", qwen) == shapes[0]
    code, _, text = await fault(worker.load("shared", qwen, dtype="bfloat16"))
    assert code is Code.ALREADY_EXISTS
    assert str(qwen) in text
    await worker.unload("shared")
    await worker.load("shared", qwen, dtype="bfloat16")
    await worker.unload("shared")
    code, _, text = await fault(worker.unload("shared"))
    assert code is Code.NOT_FOUND


async def test_a_model_with_open_sequences_stays(worker: Harness) -> None:
    async with worker.stream() as stream:
        number = await stream.open("llama", [5, 6], 4)
        await stream.prefill("llama", {number: (0, 2)})
        code, _, _ = await fault(worker.unload("llama"))
        assert code is Code.FAILED_PRECONDITION
        assert (await stream.decode("llama", [number], 3)).outcome == "OK"


async def test_a_load_can_be_given_up(worker: Harness, qwen: Path) -> None:
    models = worker.worker.models
    choice = ModelChoice("brief", str(qwen), "bfloat16")
    load = asyncio.create_task(models.load(choice))
    await asyncio.sleep(0)  # one turn of the loop: the load has begun, and its loader is not there yet
    await models.unload("brief")
    with pytest.raises(Aborted):
        await load
    assert "brief" not in [model.model for model in (await worker.info()).models]
    await models.load(choice)
    await models.unload("brief")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"path": "/nowhere"}, "model.path"),
        ({"path": ""}, "model.path"),
        ({"name": "", "path": "x"}, "model.name"),
        ({"path": "LLAMA", "dtype": "int8"}, "model.dtype"),
        ({"path": "NO_CONFIG"}, "model.path"),
        ({"path": "NO_WEIGHTS"}, "model.path"),
        ({"path": "TRUNCATED"}, ""),
        ({"path": "NOT_GGUF"}, "model.path"),
    ],
)
async def test_a_bad_checkpoint_is_refused_with_the_field_and_leaves_nothing(
    worker: Harness, llama: Path, tmp_path: Path, config: dict[str, Any], field: str
) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    values = {"name": "bad", **config}
    match config["path"]:
        case "LLAMA":
            values["path"] = str(llama)
        case "NO_CONFIG":
            (copy / "config.json").unlink()
            values["path"] = str(copy)
        case "NO_WEIGHTS":
            (copy / "model.safetensors").unlink()
            values["path"] = str(copy)
        case "TRUNCATED":
            os.truncate(copy / "model.safetensors", 100_000)
            values["path"] = str(copy)
        case "NOT_GGUF":
            values["path"] = str(copy / "config.json")
    before = open_descriptors()
    request = common_pb2.ModelConfig(**values)
    for call in (
        worker.stub.InspectModel(worker_pb2.InspectModelRequest(model=request)),
        worker.stub.LoadModel(worker_pb2.LoadModelRequest(model=request)),
    ):
        code, found, text = await fault(call)
        assert code is Code.INVALID_ARGUMENT, text
        assert found == field if field else found, text
    assert open_descriptors() <= before
    assert "bad" not in [model.model for model in (await worker.info()).models]


async def test_weights_that_turn_bad_while_they_load_are_refused(
    worker: Harness, llama: Path, tmp_path: Path
) -> None:
    """The headers were read before, so that only the loader can notice."""
    copy = shutil.copytree(llama, tmp_path / "copy")
    await worker.inspect("rotten", copy)
    stat = (copy / "model.safetensors").stat()
    os.truncate(copy / "model.safetensors", 100_000)
    os.truncate(copy / "model.safetensors", stat.st_size)
    header = (copy / "model.safetensors").read_bytes()[:8]
    with (copy / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * len(header))
    os.utime(copy / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, found, text = await fault(worker.load("rotten", copy))
    assert code is Code.INVALID_ARGUMENT, text
    assert found


async def test_orders_that_follow_from_an_older_placement_are_refused(llama: Path) -> None:
    async with running_worker() as worker:
        model = common_pb2.ModelConfig(name="llama", path=str(llama))
        await worker.stub.LoadModel(worker_pb2.LoadModelRequest(model=model, epoch=5))
        announced = await worker.stub.AnnounceEpoch(worker_pb2.AnnounceEpochRequest(epoch=7))
        assert announced.epoch == 7
        for epoch in (0, 6):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await worker.stub.UnloadModel(worker_pb2.UnloadModelRequest(model="llama", epoch=epoch))
            assert refused.value.code() is grpc.StatusCode.ABORTED
        assert [each.model for each in (await worker.info()).models] == ["llama"]
        await worker.stub.UnloadModel(worker_pb2.UnloadModelRequest(model="llama", epoch=8))
        late = await worker.stub.AnnounceEpoch(worker_pb2.AnnounceEpochRequest(epoch=7))
        assert late.epoch == 8
