"""What goes wrong between the ranks of a mesh."""

from __future__ import annotations


class MeshBroken(ConnectionError):
    """The ranks of a mesh no longer act together: one has died, hangs, or did something else than the others.

    What they were computing is lost, and so is the mesh: each rank ends, and all are started again.
    """

    def __init__(self, doing: str, reason: str) -> None:
        super().__init__(f"{doing}: {reason}")
        self.doing = doing
        self.reason = reason
