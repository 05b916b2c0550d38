"""Generating: what is sent, what comes back, and how it is stopped."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import text_format

from muxserve.client import (
    ClientOptions,
    FinishReason,
    InternalError,
    InvalidRequest,
    Logprobs,
    Message,
    ModelState,
    NotFound,
    RequestTooLarge,
    Sampling,
    TokenLogprob,
    Usage,
)
from muxserve.v1 import common_pb2, inference_pb2
from tests.client.peer import Peer, Server, answer, refusal


def test_every_argument_reaches_the_server_as_given(client: Any, peer: Peer) -> None:
    client.generate(
        "a",
        "Hi",
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        seed=2**63,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        max_tokens=5,
        stop=["\n", "END"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        logprobs=0,
        request_id="mine",
    )
    assert peer.requests == [
        text_format.Parse(
            """
            model: "a" prompt: "Hi" max_tokens: 5 stop: "\\n" stop: "END" stop_token_ids: [1, 2]
            ignore_eos: true logprobs: 0 request_id: "mine"
            sampling {
                temperature: 0.5 top_p: 0.25 top_k: 3 min_p: 0.125 seed: 9223372036854775808
                repetition_penalty: 1.5 presence_penalty: -1 frequency_penalty: 1
            }
            """,
            inference_pb2.GenerateRequest(),
        )
    ]


def test_what_is_left_out_is_absent_so_that_the_service_decides(client: Any, peer: Peer) -> None:
    client.generate("a", "Hi", temperature=None, stop=None, request_id="mine")
    assert peer.requests == [inference_pb2.GenerateRequest(model="a", prompt="Hi", request_id="mine")]


def test_keywords_replace_fields_of_the_sampling_argument(client: Any, peer: Peer) -> None:
    client.generate("a", "Hi", sampling=Sampling(temperature=0.0, top_k=4), top_k=5)
    assert peer.requests[0].sampling == common_pb2.SamplingParams(temperature=0.0, top_k=5)
    assert peer.requests[0].sampling.HasField("temperature")


def test_token_ids_are_sent_instead_of_a_text(client: Any, peer: Peer) -> None:
    client.generate("a", prompt_tokens=[5, 6])
    assert list(peer.requests[0].prompt_tokens.ids) == [5, 6]


@pytest.mark.parametrize(("prompt", "ids"), [("", None), (None, [])])
def test_an_empty_input_is_sent_as_such_for_the_service_to_refuse(
    client: Any, peer: Peer, prompt: str | None, ids: list[int] | None
) -> None:
    client.generate("a", prompt, prompt_tokens=ids)
    assert peer.requests[0].WhichOneof("input") == ("prompt" if ids is None else "prompt_tokens")


def test_a_conversation_may_mix_messages_and_mappings(client: Any, peer: Peer) -> None:
    completion = client.chat(
        "a", [Message("system", "Be brief."), {"role": "user", "content": "Hi"}], stop="\n"
    )
    turns = [(turn.role, turn.content) for turn in peer.requests[0].chat.messages]
    assert turns == [("system", "Be brief."), ("user", "Hi")]
    assert list(peer.requests[0].stop) == ["\n"]
    assert completion.message == Message("assistant", "Hello world")


def test_a_completion_has_everything_that_was_streamed(client: Any, peer: Peer) -> None:
    def script(*_: object) -> Iterator[inference_pb2.GenerateResponse]:
        entry = common_pb2.Logprobs(
            chosen=common_pb2.TokenLogprob(token_id=11, logprob=-0.5),
            top=[common_pb2.TokenLogprob(token_id=12, logprob=-0.25)],
        )
        yield inference_pb2.GenerateResponse(request_id="r", token_ids=[11], text="H", logprobs=[entry])
        yield inference_pb2.GenerateResponse(
            request_id="r",
            index=1,
            token_ids=[13, 14],
            text="é",
            logprobs=[entry, entry],
            finish_reason=common_pb2.FINISH_REASON_STOP,
            usage=common_pb2.Usage(prompt_tokens=4, completion_tokens=3),
            stop_string="END",
        )

    peer.script = script
    completion = client.generate("a", "Hi", logprobs=1)
    entry = Logprobs(TokenLogprob(11, -0.5), (TokenLogprob(12, -0.25),))
    assert completion.model == "a"
    assert completion.text == "Hé"
    assert completion.token_ids == (11, 13, 14)
    assert completion.logprobs == (entry, entry, entry)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.stop_string == "END"
    assert completion.usage == Usage(4, 3)
    assert completion.usage.total_tokens == 7
    assert completion.request_id == "r"


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        (common_pb2.FINISH_REASON_LENGTH, FinishReason.LENGTH),
        (common_pb2.FINISH_REASON_ABORT, FinishReason.ABORT),
        (77, FinishReason.UNKNOWN),
    ],
)
def test_the_finish_reason_is_told(client: Any, peer: Peer, sent: Any, seen: FinishReason) -> None:
    peer.script = lambda *_: answer(["x"], finish=sent)
    assert client.generate("a", "Hi").finish_reason is seen


def test_a_stream_gives_the_pieces_and_then_the_result(client: Any, peer: Peer) -> None:
    stream = client.stream("a", "Hi")
    chunks = list(stream)
    assert [chunk.text for chunk in chunks] == ["Hello", " world", ""]
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, FinishReason.STOP]
    assert stream.result.text == "Hello world"
    assert stream.request_id == peer.requests[0].request_id == stream.result.request_id
    assert list(stream) == []


def test_a_piece_is_given_before_the_next_one_exists(client: Any, peer: Peer) -> None:
    proceed = threading.Event()

    def script(*_: object) -> Iterator[inference_pb2.GenerateResponse]:
        pieces = answer(["one", "two"])
        yield next(pieces)
        proceed.wait(10)
        yield from pieces

    peer.script = script
    stream = client.stream("a", "Hi")
    assert next(stream).text == "one"
    with pytest.raises(RuntimeError, match="not been read"):
        _ = stream.result
    proceed.set()
    assert [chunk.text for chunk in stream] == ["two", ""]


def test_a_stream_is_under_way_before_it_is_read(client: Any, peer: Peer) -> None:
    arrived = threading.Event()
    peer.script = lambda *_: (arrived.set(), answer(["x"]))[1]  # type: ignore[func-returns-value]
    stream = client.stream("a", "Hi")
    client.models()  # an event loop sends when it runs
    assert arrived.wait(10)
    stream.close()


def _endless(_: object, context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
    stopped = threading.Event()
    context.add_callback(stopped.set)
    yield from (message for message in answer(["one"]) if not message.finish_reason)
    stopped.wait(30)


def test_closing_a_stream_cancels_the_call(client: Any, peer: Peer) -> None:
    peer.script = _endless
    with client.stream("a", "Hi") as stream:
        assert next(stream).text == "one"
    assert peer.ended.wait(5)


def test_breaking_out_of_the_loop_cancels_the_call(client: Any, peer: Peer) -> None:
    peer.script = _endless
    for chunk in client.stream("a", "Hi"):
        assert chunk.text == "one"
        break
    client.models()  # an event loop sends when it runs
    assert peer.ended.wait(5)


def test_closing_the_client_cancels_its_calls(connect: Callable[..., Any], server: Server) -> None:
    server.peer.script = _endless
    client = connect(server.address)
    stream = client.stream("a", "Hi")
    next(stream)
    client.close()
    assert server.peer.ended.wait(5)


def test_a_lost_piece_is_an_error_and_not_a_gap_in_the_text(client: Any, peer: Peer) -> None:
    peer.script = lambda *_: (message for message in answer(["a", "b", "c"]) if message.index != 1)
    with pytest.raises(InternalError, match="broke"):
        client.generate("a", "Hi")
    assert peer.ended.wait(5)


def test_a_stream_without_an_end_is_an_error(client: Any, peer: Peer) -> None:
    peer.script = lambda *_: (message for message in answer(["a"]) if not message.finish_reason)
    stream = client.stream("a", "Hi")
    with pytest.raises(InternalError, match="finish reason"):
        list(stream)
    with pytest.raises(InternalError, match="finish reason"):
        _ = stream.result


def test_models_are_listed_and_looked_up(client: Any, peer: Peer) -> None:
    first, second = client.models()
    assert (first.name, first.state, first.context_length, first.chat) == ("a", ModelState.READY, 2048, True)
    assert (second.name, second.state) == ("b", ModelState.UNKNOWN)
    assert client.model("a") == first
    peer.refuse.append(refusal(grpc.StatusCode.NOT_FOUND, "no model z", field="model"))
    with pytest.raises(NotFound, match="no model z"):
        client.model("z")


def test_metadata_goes_with_every_call(connect: Callable[..., Any], server: Server) -> None:
    options = ClientOptions(metadata=(("authorization", "Bearer secret"),))
    connect(server.address, options=options).generate("a", "Hi")
    assert ("authorization", "Bearer secret") in server.peer.metadata


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": "Hi", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "Hi", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "Hi", "top_k": -1}, "sampling.top_k"),
        ({"prompt": "Hi", "seed": 2**64}, "sampling.seed"),
        ({"prompt": "Hi", "temperature": "hot"}, "sampling.temperature"),
        ({"prompt": "Hi", "stop": [1]}, "stop"),
        ({"prompt": "Hi", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "Hi", "logprobs": -1}, "logprobs"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt_tokens": [-1]}, "prompt_tokens.ids"),
        ({}, "prompt"),
        ({"prompt": "Hi", "prompt_tokens": [1]}, "prompt"),
    ],
)
def test_what_does_not_fit_its_field_is_refused_by_name(
    client: Any, peer: Peer, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("a", **arguments)
    assert caught.value.field == field
    assert caught.value.description
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert not peer.requests


@pytest.mark.parametrize(
    ("turn", "field"), [({"role": "user"}, "chat.messages[1].content"), ("Hi", "chat.messages[1].role")]
)
def test_a_malformed_turn_is_refused_by_name(client: Any, turn: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.chat("a", [Message("user", "Hi"), turn])
    assert caught.value.field == field
    assert caught.value.description == "is missing"


def test_an_unknown_keyword_is_a_type_error(client: Any) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.generate("a", "Hi", temprature=0)


def test_a_message_over_the_clients_limit_is_not_sent(client: Any, peer: Peer) -> None:
    with pytest.raises(RequestTooLarge) as caught:
        client.generate("a", "x" * 50_000_000)
    assert caught.value.field == "prompt"
    assert not peer.requests


def test_a_message_over_the_servers_limit_names_its_largest_field(connect: Callable[..., Any]) -> None:
    server = Server(max_receive_bytes=1000)
    try:
        with pytest.raises(RequestTooLarge, match="larger than max") as caught:
            connect(server.address).chat("a", [Message("user", "x" * 2000)])
        assert caught.value.field == "chat"
    finally:
        server.stop()


def test_a_dropped_stream_leaves_no_reference_cycle_behind(client: Any, peer: Peer) -> None:
    """Breaking out relies on reference counts; a cycle would keep the call running until it is collected."""
    peer.script = _endless
    gc.disable()
    try:
        for _ in client.stream("a", "Hi"):
            break
        client.models()  # an event loop sends when it runs
        assert peer.ended.wait(5)
    finally:
        gc.enable()
