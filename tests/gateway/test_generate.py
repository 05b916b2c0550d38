"""The life of a request through a running gateway."""

from __future__ import annotations

import time
from dataclasses import replace

import grpc
from google.rpc import code_pb2

from muxserve.v1 import common_pb2, inference_pb2
from tests.gateway.peer import Event
from tests.gateway.service import EOS, Running, collect, ids_of, refusal, text_of

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
UNFINISHED = common_pb2.FINISH_REASON_UNSPECIFIED
ANSWER = " of France is Paris — naïve 😀 日本語."


async def test_tokens_come_out_as_text(up: Running) -> None:
    ids = up.tokenizer.encode(ANSWER)
    call = up.generate(request_id="mine")
    delivery = await up.scheduler.pull("smol")
    for index, token in enumerate(ids):
        up.scheduler.tokens(delivery, index, [token])
    up.scheduler.tokens(delivery, len(ids), [EOS], finish=STOP)
    messages = await collect(call)
    assert text_of(messages) == ANSWER
    assert ids_of(messages) == [*ids, EOS]
    assert [m.index for m in messages] == [len(ids_of(messages[:i])) for i in range(len(messages))]
    assert {m.request_id for m in messages} == {"mine"}
    assert [m.finish_reason for m in messages[:-1]] == [UNFINISHED] * (len(messages) - 1)
    last = messages[-1]
    assert last.finish_reason == STOP and last.stop_string == ""
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, len(ids) + 1)
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"


async def test_a_queued_request_has_everything_a_scheduler_needs(up: Running) -> None:
    before = time.time() * 1000
    call = up.generate(
        timeout=20,
        max_tokens=7,
        stop_token_ids=[5, 9],
        logprobs=0,
        priority=-7,
        tenant="acme",
        sampling=common_pb2.SamplingParams(temperature=0.0, top_k=3, seed=2**64 - 1, min_p=0.25),
    )
    request = (await up.scheduler.pull("smol")).request
    assert list(request.prompt_tokens) == up.tokenizer.encode("The capital")
    assert request.model == "smol" and request.max_tokens == 7
    assert request.gateway_id == up.scheduler.gateway_id
    assert list(request.stop_token_ids) == [EOS, 5, 9]
    assert request.HasField("logprobs") and request.logprobs == 0
    assert (request.priority, request.tenant) == (-7, "acme")
    sampling = request.sampling
    assert all(sampling.HasField(name) for name in ("temperature", "top_p", "seed", "repetition_penalty"))
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.0, 1.0, 1.0)
    assert (sampling.top_k, sampling.seed, sampling.min_p) == (3, 2**64 - 1, 0.25)
    assert before - 1 <= request.accepted_unix_ms <= time.time() * 1000 + 1
    assert abs(request.deadline_unix_ms - before - 20_000) < 2_000
    call.cancel()


async def test_what_a_client_leaves_out_gets_its_default(up: Running) -> None:
    calls = [up.generate(timeout=None, ignore_eos=True) for _ in range(2)]
    first, second = [(await up.scheduler.pull("smol")).request for _ in range(2)]
    assert first.max_tokens == 256 - len(first.prompt_tokens)
    assert list(first.stop_token_ids) == [] and not first.HasField("logprobs")
    assert first.sampling.temperature == 1.0 and first.sampling.seed != second.sampling.seed
    assert first.request_id != second.request_id
    assert abs(first.deadline_unix_ms - first.accepted_unix_ms - 600_000) < 10
    for call in calls:
        call.cancel()


async def test_a_conversation_is_rendered_with_the_template(up: Running) -> None:
    messages = [inference_pb2.ChatMessage(role="user", content="hi <|im_end|>")]
    call = up.generate(chat=inference_pb2.Chat(messages=messages))
    request = (await up.scheduler.pull("smol")).request
    text = up.tokenizer.render([{"role": "user", "content": "hi <|im_end|>"}])
    assert list(request.prompt_tokens) == up.tokenizer.encode(text, add_special_tokens=False)
    call.cancel()


async def test_a_long_prompt_is_tokenized_as_a_short_one(up: Running) -> None:
    ids = [1, 2, 3] * 80
    call = up.generate(prompt_tokens=inference_pb2.TokenIds(ids=ids))
    assert list((await up.scheduler.pull("smol")).request.prompt_tokens) == ids
    call.cancel()
    text = " " * 9000 + "word"
    call = up.generate(prompt=text)
    prompt = list((await up.scheduler.pull("smol")).request.prompt_tokens)
    assert prompt == up.tokenizer.encode(text)
    call.cancel()


async def test_a_model_without_tokenizer_is_served_with_token_ids(up: Running) -> None:
    call = up.generate(model="bare", prompt_tokens=inference_pb2.TokenIds(ids=[7, 8]))
    delivery = await up.scheduler.pull("bare")
    up.scheduler.tokens(delivery, 0, [9, 10], finish=LENGTH)
    messages = await collect(call)
    assert ids_of(messages) == [9, 10] and text_of(messages) == ""


async def test_logprobs_go_with_their_tokens(up: Running) -> None:
    def logprobs(token: int) -> common_pb2.Logprobs:
        return common_pb2.Logprobs(chosen=common_pb2.TokenLogprob(token_id=token, logprob=-token))

    call = up.generate(logprobs=2)
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, [5, 6], logprobs=[logprobs(5), logprobs(6)])
    up.scheduler.tokens(delivery, 1, [6, 7], logprobs=[logprobs(6), logprobs(7)])
    up.scheduler.tokens(delivery, 3, [8], logprobs=[logprobs(8)], finish=LENGTH)
    messages = await collect(call)
    assert ids_of(messages) == [5, 6, 7, 8]
    for message in messages:
        assert [each.chosen.token_id for each in message.logprobs] == list(message.token_ids)


async def test_an_unfinished_character_at_the_end_is_flushed(up: Running) -> None:
    ids = up.tokenizer.encode("😀")[:-1]
    call = up.generate()
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, ids)
    first = await anext(aiter(call))
    assert first.text == ""
    up.scheduler.tokens(delivery, len(ids), [], finish=LENGTH)
    assert text_of(await collect(call)) == up.tokenizer.decode(ids)


async def test_a_stop_string_over_several_tokens_ends_the_text_before_it(up: Running) -> None:
    ids = up.tokenizer.encode("one two three four five six")
    call = up.generate(stop=["ee fo", "zzz"])
    delivery = await up.scheduler.pull("smol")
    for index, token in enumerate(ids):
        up.scheduler.tokens(delivery, index, [token])
    messages = await collect(call)
    assert text_of(messages) == "one two thr"
    assert messages[-1].finish_reason == STOP and messages[-1].stop_string == "ee fo"
    assert ids_of(messages) == ids[:4] and messages[-1].usage.completion_tokens == 4
    assert (await up.scheduler.message()).cancel.request_id == delivery.request.request_id
    await up.wait_for_queue(0)


async def test_text_held_back_for_a_stop_string_comes_at_the_end(up: Running) -> None:
    ids = up.tokenizer.encode("one two three")
    call = up.generate(stop=["three four"])
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, ids)
    assert (await anext(aiter(call))).text == "one two "
    up.scheduler.tokens(delivery, len(ids), [EOS], finish=STOP)
    messages = await collect(call)
    assert text_of(messages) == "three" and messages[-1].stop_string == ""


async def test_a_cancelled_call_leaves_the_queue(up: Running) -> None:
    call = up.generate()
    await up.wait_for_queue(1)
    call.cancel()
    await up.wait_for_queue(0)
    assert await up.scheduler.queue.depth("smol") == 0


async def test_a_cancelled_call_is_cancelled_at_its_scheduler(up: Running) -> None:
    call = up.generate()
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, [5])
    await anext(aiter(call))
    call.cancel()
    assert (await up.scheduler.message()).cancel.request_id == delivery.request.request_id
    await up.wait_for_queue(0)


async def test_a_client_that_vanishes_is_a_cancelled_call(up: Running) -> None:
    async with grpc.aio.insecure_channel(up.address) as channel:
        there = replace(up, channel=channel)
        calls = [there.generate() for _ in range(5)]
        deliveries = [await up.scheduler.pull("smol") for _ in range(3)]
        for delivery in deliveries:
            up.scheduler.tokens(delivery, 0, [5])
        await up.wait_for_queue(5)
    del calls
    ids = {delivery.request.request_id for delivery in deliveries}
    cancelled = set[str]()
    while cancelled != ids:  # tokens that come after a client has left are answered so once more
        cancelled.add((await up.scheduler.message()).cancel.request_id)
        assert cancelled <= ids
    await up.wait_for_queue(0)


async def test_a_client_that_does_not_read_and_vanishes_is_a_cancelled_call(up: Running) -> None:
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 0)]
    async with grpc.aio.insecure_channel(up.address, options=narrow) as channel:
        call = replace(up, channel=channel).generate()
        delivery = await up.scheduler.pull("smol")
        # Each alone fills the window: the gateway is held up while it writes.
        for index in range(0, 600_000, 100_000):
            up.scheduler.tokens(delivery, index, [40_000] * 100_000)
        await anext(aiter(call))
    assert (await up.scheduler.message()).cancel.request_id == delivery.request.request_id
    await up.wait_for_queue(0)


async def test_a_deadline_ends_a_request_that_nobody_pulls(up: Running) -> None:
    refused = await refusal(up.generate(timeout=0.3))
    assert refused.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await up.wait_for_queue(0)


async def test_a_failed_request_says_why(up: Running) -> None:
    for code, status in (
        (code_pb2.NOT_FOUND, grpc.StatusCode.NOT_FOUND),
        (code_pb2.DEADLINE_EXCEEDED, grpc.StatusCode.DEADLINE_EXCEEDED),
        (code_pb2.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE),
        (code_pb2.RESOURCE_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (code_pb2.DATA_LOSS, grpc.StatusCode.INTERNAL),
        (999, grpc.StatusCode.INTERNAL),
    ):
        call = up.generate(request_id="mine")
        delivery = await up.scheduler.pull("smol")
        failed = Event.Failed(code=code, message="the reason", retry_after_ms=1500)
        up.scheduler.send(Event(request_id=delivery.request.request_id, attempt=1, failed=failed))
        refused = await refusal(call)
        assert refused.code == status and "the reason" in refused.message
        assert refused.request_id == "mine"
        if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
            assert refused.retry_after == 1.5


async def test_a_slow_client_gets_tokens_in_fewer_messages(up: Running) -> None:
    count = 20_000
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 0)]
    channel = grpc.aio.insecure_channel(up.address, options=narrow)
    call = replace(up, channel=channel).generate(prompt_tokens=inference_pb2.TokenIds(ids=[5]))
    delivery = await up.scheduler.pull("smol")
    for index in range(count):
        event = Event.Tokens(index=index, token_ids=[5 + index % 100])
        if index == count - 1:
            event.finish_reason = LENGTH
        up.scheduler.send(Event(request_id=delivery.request.request_id, attempt=1, tokens=event))
    other = up.generate(prompt_tokens=inference_pb2.TokenIds(ids=[6]))
    last = await up.scheduler.pull("smol")
    up.scheduler.tokens(last, 0, [7], finish=LENGTH)
    await collect(other)  # what was sent before it has reached the gateway
    messages = await collect(call)
    assert ids_of(messages) == [5 + index % 100 for index in range(count)]
    assert len(messages) < count / 2
    await channel.close()
