"""`Fence`: keeps out what follows from placement documents that are not the newest."""

from __future__ import annotations

from muxserve.common.errors import Aborted


class Fence:
    """Of a worker process."""

    def __init__(self) -> None:
        self.epoch = 0
        """The highest that it has heard of."""

    def hear(self, epoch: int) -> None:
        """There is a document of this epoch."""
        self.epoch = max(self.epoch, epoch)

    def admit(self, epoch: int) -> None:
        """Raises Aborted for what follows from a document of this epoch if there is a newer one."""
        if epoch < self.epoch:
            raise Aborted(f"this follows from placement {epoch}, and there is a placement {self.epoch}")
        self.hear(epoch)
