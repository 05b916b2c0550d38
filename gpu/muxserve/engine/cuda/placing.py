"""`Placing`: which lane a job's next pass goes on, as its shares change."""

from __future__ import annotations

from typing import Literal

from muxserve.engine.cuda.device import Device
from muxserve.engine.cuda.lanes import Lane, Partition
from muxserve.engine.messages import Shares

Kind = Literal["prefill", "decode"]


class Placing:
    """Of the jobs of one kind, which run one after another."""

    def __init__(self, partition: Partition, kind: Kind) -> None:
        self._partition = partition
        self._kind = kind
        self._last: Lane | None = None

    def lane(self, shares: Shares) -> Lane:
        """For these shares; what is put on it comes after all that was put on the lanes before it."""
        prefill, decode = shares.prefill, shares.decode
        if not (prefill if self._kind == "prefill" else decode):  # it was told nothing: as if alone
            prefill, decode = (1.0, 0.0) if self._kind == "prefill" else (0.0, 1.0)
        lanes = self._partition.lanes(prefill, decode)
        lane = lanes.prefill if self._kind == "prefill" else lanes.decode
        if self._last is not None and self._last != lane:
            self._partition.order(self._last, lane)
        self._last = lane
        return lane

    def wait(self, device: Device) -> None:
        """Return when all that was put on lanes so far is done. Raises RuntimeError if the device failed."""
        if self._last is not None:
            event = device.event()
            event.record(self._last)
            event.wait()
