"""What is tried again, when, and what is not."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from muxserve.client import Client, ClientOptions, Overloaded, Unavailable
from muxserve.client.retry import Attempts
from tests.client.peer import Peer, Script, Server, answer, refusal


def failing(times: int, code: grpc.StatusCode, retry_after: float | None = None) -> Script:
    """A script that refuses so many calls and answers the next."""
    count = itertools.count()

    def script(request: Any, context: grpc.ServicerContext) -> Any:
        if next(count) < times:
            context.abort_with_status(refusal(code, retry_after=retry_after))
        return answer(["ok"], request.request_id)

    return script


def test_unavailable_is_tried_twice_more(client: Any, peer: Peer) -> None:
    peer.script = failing(2, grpc.StatusCode.UNAVAILABLE, retry_after=0.01)
    assert client.generate("a", "Hi").text == "ok"
    assert len({request.request_id for request in peer.requests}) == 3  # an id names one attempt


def test_an_id_of_the_callers_is_kept_over_retries(client: Any, peer: Peer) -> None:
    peer.script = failing(1, grpc.StatusCode.UNAVAILABLE, retry_after=0.01)
    client.generate("a", "Hi", request_id="mine")
    assert [request.request_id for request in peer.requests] == ["mine", "mine"]


def test_the_last_refusal_is_the_error(client: Any, peer: Peer) -> None:
    peer.script = failing(3, grpc.StatusCode.UNAVAILABLE, retry_after=0.01)
    with pytest.raises(Unavailable) as caught:
        client.generate("a", "Hi")
    assert caught.value.retry_after == pytest.approx(0.01)
    assert len(peer.requests) == 3


def test_retry_after_is_waited_for(client: Any, peer: Peer) -> None:
    peer.script = failing(1, grpc.StatusCode.UNAVAILABLE, retry_after=0.5)
    start = time.monotonic()
    client.generate("a", "Hi")
    assert time.monotonic() - start >= 0.5


def test_a_retry_that_would_come_too_late_is_not_waited_for(client: Any, peer: Peer) -> None:
    peer.script = failing(1, grpc.StatusCode.UNAVAILABLE, retry_after=5)
    start = time.monotonic()
    with pytest.raises(Unavailable):
        client.generate("a", "Hi", timeout=2)
    assert time.monotonic() - start < 1.5


def test_a_full_queue_is_the_callers_to_deal_with(client: Any, peer: Peer) -> None:
    peer.script = failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.01)
    with pytest.raises(Overloaded):
        client.generate("a", "Hi")
    assert len(peer.requests) == 1


def test_retries_can_be_turned_off(connect: Callable[..., Any], server: Server) -> None:
    server.peer.script = failing(1, grpc.StatusCode.UNAVAILABLE, retry_after=0.01)
    with pytest.raises(Unavailable):
        connect(server.address, options=ClientOptions(max_retries=0)).generate("a", "Hi")
    assert len(server.peer.requests) == 1


def test_other_calls_are_tried_again_too(client: Any, peer: Peer) -> None:
    peer.refuse = [refusal(grpc.StatusCode.UNAVAILABLE, retry_after=0.01)] * 2
    assert len(client.models()) == 2


def test_a_change_is_never_made_twice(connect: Callable[..., Any], server: Server) -> None:
    server.peer.refuse = [refusal(grpc.StatusCode.UNAVAILABLE, retry_after=0.01)]
    with pytest.raises(Unavailable):
        connect(server.address, admin=True).set_quota("a", 5)
    assert not server.peer.refuse


@pytest.mark.parametrize("call", [lambda c: c.models(), lambda c: c.generate("a", "Hi")])
def test_nobody_there_is_unavailable_within_the_connect_timeout(
    connect: Callable[..., Any], server: Server, call: Callable[[Any], Any]
) -> None:
    server.stop()
    client = connect(server.address, options=ClientOptions(connect_timeout=0.5))
    start = time.monotonic()
    with pytest.raises(Unavailable):
        call(client)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("call", [lambda c: c.models(), lambda c: c.generate("a", "Hi")])
def test_a_server_that_comes_back_in_time_is_not_missed(
    connect: Callable[..., Any], server: Server, call: Callable[[Any], Any]
) -> None:
    client = connect(server.address)
    call(client)
    server.stop()
    comeback = threading.Timer(0.6, server.start)
    comeback.start()
    try:
        call(client)
    finally:
        comeback.join()


def test_closing_a_stream_ends_its_wait_for_a_retry(server: Server) -> None:
    server.peer.script = failing(9, grpc.StatusCode.UNAVAILABLE, retry_after=30)
    with Client(server.address) as client:
        stream = client.stream("a", "Hi")
        closer = threading.Timer(0.3, stream.close)
        closer.start()
        start = time.monotonic()
        with pytest.raises(Unavailable):
            next(stream)
        closer.join()
    assert time.monotonic() - start < 10


def test_delays_grow_and_keep_within_the_timeout() -> None:
    error = Unavailable("no", code=grpc.StatusCode.UNAVAILABLE)
    attempts = Attempts(ClientOptions(max_retries=9), 10.0, now=0.0)
    delays = [attempts.next_delay(error, 0.0) for _ in range(9)]
    for number, delay in enumerate(delays):
        assert delay is not None
        assert min(8.0, 0.25 * 2**number) * 0.5 <= delay <= min(8.0, 0.25 * 2**number)
    assert attempts.next_delay(error, 0.0) is None
    assert attempts.remaining(9.0) == 1.0
    assert attempts.remaining(11.0) == 0.0
