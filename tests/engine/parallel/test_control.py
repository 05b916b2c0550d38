"""Rank 0 tells, the others hear the same in the same order; and which steps run is agreed on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from muxserve.engine.link import Link
from muxserve.engine.messages import DecodeJob, DecodeRow, PrefillJob, Sampling
from muxserve.engine.parallel.control import Follower, Leader
from muxserve.engine.parallel.errors import MeshBroken
from muxserve.engine.parallel.steps import AHEAD, Advance, LeadingSteps, Steps

Told = PrefillJob | DecodeJob | Advance


@pytest.fixture
def sockets() -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """Leader's ends and followers' ends, two pairs."""
    pairs = [Link.pair() for _ in range(2)]
    yield [one for one, _ in pairs], [other for _, other in pairs]
    for pair in pairs:
        for end in pair:
            end.close()


Ends = tuple[list[socket.socket], list[socket.socket]]


def test_followers_hear_what_the_leader_tells_however_long_it_is(sockets: Ends) -> None:
    leader = Leader(sockets[0])
    followers = [Follower[Told](end, Told) for end in sockets[1]]
    rows = tuple(DecodeRow(slot, 10**6, 10**6, Sampling(seed=2**63)) for slot in range(2000))
    told: list[Told] = [DecodeJob(1, "m", rows, 8), Advance(1, 4), PrefillJob(2, "m", ())]

    def tell() -> None:
        for message in told:
            leader.tell(message)

    teller = threading.Thread(target=tell)
    teller.start()
    for message in told:  # by turns: what a socket cannot take, its reader has to make room for
        assert [follower.receive() for follower in followers] == [message, message]
    teller.join()
    assert [follower.try_receive() for follower in followers] == [None, None]
    leader.check()


def test_each_side_learns_that_the_other_is_gone(sockets: Ends) -> None:
    leader = Leader(sockets[0])
    followers = [Follower[Told](end, Told) for end in sockets[1]]
    followers[1].close()
    with pytest.raises(MeshBroken, match="watching rank 2: it is gone"):
        leader.check()
    with pytest.raises(MeshBroken, match="telling rank 2: "):
        leader.tell(Advance(1, 1))
    leader.close()
    assert followers[0].receive() == Advance(1, 1)
    with pytest.raises(MeshBroken, match="following rank 0: "):
        followers[0].receive()
    with pytest.raises(MeshBroken, match="following rank 0: "):
        followers[0].try_receive()


def test_a_follower_that_does_not_listen_is_given_up(sockets: Ends) -> None:
    leader = Leader(sockets[0], timeout=0.05)
    with pytest.raises(MeshBroken, match="telling rank 1: timed out"):
        for _ in range(100_000):
            leader.tell(Advance(1, 1))


def test_steps_are_granted_ahead_of_the_leaders_own() -> None:
    told: list[Advance] = []
    follower = Steps(11)
    run = []
    for step in LeadingSteps(7, 11, told.append):
        run.append(step)
        assert step + 1 < told[-1].steps or told[-1].last
    assert run == list(range(11))
    assert [advance.last for advance in told] == [False] * (len(told) - 1) + [True]
    for advance in told:
        follower.grant(advance)
    assert list(follower) == run


@pytest.mark.parametrize("stop_at", [0, 1, 2, 5])
def test_a_stopped_job_runs_what_was_granted_and_no_more(stop_at: int) -> None:
    told: list[Advance] = []
    leading = LeadingSteps(7, 100, told.append)
    run = []
    for step in leading:
        run.append(step)
        if step == stop_at:
            leading.stop()
            leading.stop()
    assert len(run) == stop_at + AHEAD
    assert [advance for advance in told if advance.last] == told[-1:] == [Advance(7, len(run), last=True)]
    follower = Steps(100)
    follower.grant(told[-1])
    assert list(follower) == run


def test_a_follower_waits_for_its_steps() -> None:
    follower, run = Steps(5), []
    first = threading.Event()

    def work() -> None:
        for step in follower:
            run.append(step)
            first.set()

    thread = threading.Thread(target=work)
    thread.start()
    follower.grant(Advance(1, 1))
    assert first.wait(10)
    assert run == [0]
    follower.grant(Advance(1, 3, last=True))
    thread.join(10)
    assert run == [0, 1, 2]
