"""How ranks learn what to do: rank 0 gets the worker's jobs and tells the others, in order.

Over sockets between the processes of one machine (`Link`), not through torch.distributed: a rank that waits
for the next job for an hour is not late, the end of a process is noticed at once, and a loop can poll them.
A follower says nothing. What it cannot do, it ends of, which its leader notices.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from muxserve.engine.link import Link, LinkClosed
from muxserve.engine.parallel.errors import MeshBroken

M = TypeVar("M")


class Leader:
    """Rank 0's side. Threads may tell at once: every follower hears the same order.

    followers: connected sockets of ranks 1, 2, …. timeout: seconds that one may let a message wait.
    """

    def __init__(self, followers: Sequence[socket.socket], timeout: float = 30.0) -> None:
        self._links: list[Link[Any]] = []
        self._lock = threading.Lock()
        self._poll = select.poll()
        for follower in followers:
            follower.settimeout(timeout)
            self._links.append(Link(follower, Any))
            self._poll.register(follower, select.POLLIN)

    def filenos(self) -> list[int]:
        """Readable when a follower has gone."""
        return [link.fileno() for link in self._links]

    def tell(self, message: msgspec.Struct) -> None:
        """Send to every follower; it is encoded once. Raises MeshBroken."""
        with self._lock:
            pieces = self._links[0].pieces(message) if self._links else []
            for piece in pieces:
                for rank, link in enumerate(self._links, 1):
                    try:
                        link.send_piece(piece)
                    except OSError as error:  # LinkClosed and TimeoutError are
                        raise MeshBroken(f"telling rank {rank}", str(error) or "it is gone") from error

    def check(self) -> None:
        """Raises MeshBroken if a follower has gone."""
        gone = [descriptor for descriptor, _ in self._poll.poll(0)]
        ranks = [rank for rank, link in enumerate(self._links, 1) if link.fileno() in gone]
        if ranks:
            raise MeshBroken(f"watching rank {ranks[0]}", "it is gone")

    def close(self) -> None:
        for link in self._links:
            link.close()


class Follower(Generic[M]):
    """Another rank's side. Receives what rank 0 tells: messages of type `receives`, as a Link does."""

    def __init__(self, leader: socket.socket, receives: Any) -> None:
        self._link: Link[M] = Link(leader, receives)

    def fileno(self) -> int:
        """Readable when there is something to receive, or rank 0 has gone."""
        return self._link.fileno()

    def receive(self) -> M:
        """The next message, waiting for it however long. Raises MeshBroken if rank 0 is gone."""
        try:
            return self._link.receive()[0]
        except LinkClosed as error:
            raise MeshBroken("following rank 0", str(error)) from error

    def try_receive(self) -> M | None:
        """The next message if one is there. Raises MeshBroken."""
        try:
            received = self._link.try_receive()
        except LinkClosed as error:
            raise MeshBroken("following rank 0", str(error)) from error
        return None if received is None else received[0]

    def close(self) -> None:
        self._link.close()
