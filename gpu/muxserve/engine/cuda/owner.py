"""`Owner`: the process whose device memory this one maps, watched: its end is the end of that memory."""

from __future__ import annotations

import os
import select


class OwnerDied(ConnectionError):
    """The process that owns the arena and the weights has ended, and with it their memory."""


class Owner:
    """A process by its id, through a descriptor that stays this process's own though the id be used again.

    CUDA frees what a process allocated when it ends. What reads of it by another process give from then on is
    undefined: so whoever maps memory asks before each job, and ends when its owner has. `fileno()` becomes
    readable at the owner's end, for a loop that waits for jobs. The kernel's own means (PDEATHSIG) and the
    closed link come on top: none of them is first in all cases, and messages that were sent before the
    owner's end can still be received after it. A job that runs at that moment may compute rubbish; there is
    nobody left to tell it to.
    """

    def __init__(self, pid: int) -> None:
        """Raises OwnerDied if there is no such process any more, or it is not this one's parent: the id may
        then be another process's already."""
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise OwnerDied(f"process {pid} has ended") from error
        self.pid = pid
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)
        if os.getppid() != pid:
            self.close()
            raise OwnerDied(f"process {pid} is not the parent of this one, or has ended")

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._descriptor

    def check(self) -> None:
        """To be called before each job. Raises OwnerDied. Takes about a microsecond."""
        if self._poll.poll(0):
            raise OwnerDied(f"process {self.pid} has ended, and its device memory is gone")

    def close(self) -> None:
        """Watch no longer; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
