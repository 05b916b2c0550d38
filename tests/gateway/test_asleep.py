"""Requests for models that are asleep: they wait in the queue, or are refused at once."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc

from muxserve.v1 import common_pb2, inference_pb2
from tests.gateway.service import FAILED, Running, collect, ids_of, place, placed, refusal

ASLEEP = inference_pb2.MODEL_STATE_ASLEEP


async def fall_asleep(up: Running, path: Path, wait: float) -> inference_pb2.Model:
    """The only model is asleep, and the gateway knows."""
    model = placed("smol", path, ASLEEP)
    model.expected_wait_seconds = wait
    await place(up.redis, 2, model)
    async with asyncio.timeout(10):
        while True:
            answer = await up.stub.GetModel(inference_pb2.GetModelRequest(name="smol"))
            if answer.model.state == ASLEEP:
                return answer.model
            await asyncio.sleep(0.02)  # the gateway polls


async def test_a_request_waits_in_the_queue_until_somebody_serves_it(up: Running, smollm2: Path) -> None:
    model = await fall_asleep(up, smollm2, 5.0)
    assert model.expected_wait_seconds == 5.0
    await up.wait_for_health(True)
    call = up.generate(timeout=20, max_tokens=2)
    await up.wait_for_queue(1)
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, [5, 6], finish=common_pb2.FINISH_REASON_LENGTH)
    assert ids_of(await collect(call)) == [5, 6]


async def test_who_cannot_wait_is_refused_at_once_and_told_how_long_it_takes(
    up: Running, smollm2: Path
) -> None:
    await fall_asleep(up, smollm2, 5.0)
    took = []
    for _ in range(3):
        began = time.monotonic()
        refused = await refusal(up.generate(timeout=4))
        took.append(time.monotonic() - began)
        assert (refused.code, refused.retry_after) == (grpc.StatusCode.UNAVAILABLE, 5.0)
        assert "5.00 s" in refused.message
    assert min(took) < 0.1 and max(took) < 2  # a busy machine may stop; who waits does so for 4 s
    await up.wait_for_queue(0)


async def test_those_who_wait_hear_at_once_that_the_model_turned_out_to_be_broken(
    up: Running, smollm2: Path
) -> None:
    await fall_asleep(up, smollm2, 5.0)
    waiting = asyncio.create_task(refusal(up.generate(timeout=60)))
    await up.wait_for_queue(1)
    await place(up.redis, 3, placed("smol", smollm2, FAILED, "its file is gone"))
    async with asyncio.timeout(10):
        refused = await waiting
    assert refused.code == grpc.StatusCode.FAILED_PRECONDITION and "its file is gone" in refused.message
    await up.wait_for_queue(0)
