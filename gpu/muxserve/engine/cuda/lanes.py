"""`Lane`: a compute share plus a stream. `Partition`: where lanes come from; here by time slicing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from muxserve.engine.cuda.driver import Driver
from muxserve.engine.shares import PartitionName

if TYPE_CHECKING:
    from torch.cuda import ExternalStream


@dataclass(frozen=True, slots=True)
class Lane:
    """Where a job's work is put. A value: whoever caches by lane (CUDA graphs) may use it as a key.

    A graph keeps the multiprocessors of the stream on which it was *captured*, wherever it is launched: so
    there has to be one for each lane, and none may be launched once its partition is closed.
    """

    kind: str
    """"prefill" or "decode"."""
    sms: int
    """Multiprocessors that its work may use: what a kernel with a persistent grid should fill."""
    handle: int
    """`cudaStream_t`, as an integer."""
    device: int

    @property
    def stream(self) -> ExternalStream:
        """The stream for torch (`with torch.cuda.stream(lane.stream)`), which does not own it."""
        from torch.cuda import ExternalStream  # executors only

        return ExternalStream(self.handle, device=self.device)  # type: ignore[no-untyped-call]

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version and stream, by the protocol that CuPy and others take a foreign stream by."""
        return 0, self.handle


@dataclass(frozen=True, slots=True)
class Lanes:
    """One lane for each kind of job. Of two kinds that both run, neither can use the other's multiprocessors,
    as far as the partition can do that."""

    prefill: Lane
    decode: Lane


class Partition(Protocol):
    """How a device's multiprocessors are divided between a prefill and a decode job."""

    @property
    def name(self) -> PartitionName: ...

    @property
    def sms(self) -> int:
        """Of the whole device, or of what this process may use."""

    def lanes(self, prefill: float, decode: float) -> Lanes:
        """For jobs with these compute shares, 0 = no such job runs. As in `shares.split_cores`, a lone job
        has all, and two have them in proportion. Costs nothing: all lanes were made at the start.

        A kind that does not run has the lane on which it would start alone. Raises ValueError for a share
        that is none. A lane does not change while a job is on it: ask for the lanes of the new shares,
        `order`, and go on there. Both jobs move, first the one that gives up SMs.
        """

    def order(self, first: Lane, then: Lane) -> None:
        """What is put on `then` from now on waits for what is on `first`: between a job's old lane and its
        new one. Does not wait itself. Raises DriverError."""

    def close(self) -> None:
        """Wait for all lanes, and destroy them. A second call does nothing. Raises DriverError."""


class TimeSlices:
    """No partition: two streams, of which decode's has precedence whenever a multiprocessor comes free.

    Also what an executor under MPS uses (name "mps"): it has its percentage for good, and `sms` is that.
    """

    def __init__(self, driver: Driver, name: PartitionName = "none") -> None:
        """Raises DriverError, nothing left behind."""
        self.name: PartitionName = name
        self.sms = driver.sm_count()
        self._driver = driver
        self._streams: list[int] = []
        least, greatest = driver.priorities()
        try:
            lanes = [self._lane(kind, level) for kind, level in (("prefill", least), ("decode", greatest))]
        except BaseException:
            self.close()
            raise
        self._lanes = Lanes(*lanes)

    def lanes(self, prefill: float, decode: float) -> Lanes:
        check_shares(prefill, decode)
        return self._lanes

    def order(self, first: Lane, then: Lane) -> None:
        if first != then:
            self._driver.order(first.handle, then.handle)

    def close(self) -> None:
        while self._streams:
            self._driver.destroy_stream(self._streams.pop())

    def _lane(self, kind: str, priority: int) -> Lane:
        self._streams.append(self._driver.stream(priority))
        return Lane(kind, self.sms, self._streams[-1], self._driver.device)


def check_shares(prefill: float, decode: float) -> None:
    """Raises ValueError."""
    for name, share in (("prefill", prefill), ("decode", decode)):
        if not 0 <= share <= 1:
            raise ValueError(f"share: {share} for {name} is not in [0, 1]")
