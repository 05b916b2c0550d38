"""Messages and descriptors between worker and executor."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from muxserve.engine.link import Link, LinkClosed
from muxserve.engine.messages import Command, DecodeJob, DecodeRow, EndLease, RemoveModel, Sampling


@pytest.fixture
def ends() -> Iterator[tuple[Link[Command], Link[Command]]]:
    left, right = (Link[Command](sock, Command) for sock in Link.pair())
    yield left, right
    left.close()
    right.close()


def job(stops: int) -> DecodeJob:
    """A job whose message has about three bytes per stop token."""
    return DecodeJob(
        1, "m", (DecodeRow(0, 5, 9, Sampling(stop_token_ids=tuple(range(300, 300 + stops)))),), 8
    )


@pytest.mark.parametrize("stops", [0, 21_000, 60_000])
def test_a_message_of_any_size_arrives_whole(ends: tuple[Link[Command], Link[Command]], stops: int) -> None:
    left, right = ends
    left.send(job(stops))
    left.send(EndLease(1))
    assert right.receive() == (job(stops), [])
    assert right.receive() == (EndLease(1), [])


def test_descriptors_come_with_their_message_and_no_other(ends: tuple[Link[Command], Link[Command]]) -> None:
    left, right = ends
    source = os.memfd_create("test")
    os.write(source, b"seen")
    left.send(EndLease(1))
    left.send(job(60_000), [source, source])
    left.send(RemoveModel("m"))
    os.close(source)
    assert right.receive()[1] == []
    _, received = right.receive()
    assert [os.pread(fd, 4, 0) for fd in received] == [b"seen", b"seen"]
    assert not any(os.get_inheritable(fd) for fd in received)
    assert right.receive()[1] == []
    for fd in received:
        os.close(fd)


def test_nothing_there_is_not_the_end(ends: tuple[Link[Command], Link[Command]]) -> None:
    left, right = ends
    assert right.try_receive() is None
    left.send(EndLease(1))
    left.close()
    assert right.try_receive() == (EndLease(1), [])
    with pytest.raises(LinkClosed):
        right.try_receive()
    with pytest.raises(LinkClosed):
        right.send(EndLease(1))


def test_a_full_socket_says_so_instead_of_blocking(ends: tuple[Link[Command], Link[Command]]) -> None:
    left, right = ends
    [piece] = left.pieces(EndLease(1))
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            left.send_piece(piece, block=False)
            sent += 1
    for _ in range(sent):
        assert right.receive()[0] == EndLease(1)
    assert right.try_receive() is None
