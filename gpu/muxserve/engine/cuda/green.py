"""`GreenContexts`: lanes on multiprocessors of their own, by CUDA's green contexts, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from muxserve.engine.cuda.driver import Driver, SmResource
from muxserve.engine.cuda.lanes import Lane, Lanes, TimeSlices, check_shares
from muxserve.engine.cuda.runtime import DeviceError
from muxserve.engine.shares import PartitionName, split_sms

PREFILL_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of the pairs that are made at the start. Each takes two contexts, and graphs are captured for each."""


class GreenContexts:
    """Pairs of green contexts, made once, so that another share for a job is another pair and costs nothing.

    A share that none has is served by the nearest pair. A job that runs alone uses no green context but a
    stream on the whole device. Pairs overlap each other, which CUDA allows: a job that is still on its old
    lane while its neighbour is on the new one competes for some multiprocessors, and that is all.

    Contexts are of one process: two executors that each have theirs are time-sliced as wholes.
    """

    name: PartitionName = "green_contexts"

    def __init__(self, driver: Driver, prefill_shares: Sequence[float] = PREFILL_SHARES) -> None:
        """Raises DeviceError if the device has too few multiprocessors for two lanes, DriverError if the
        driver does not do it; nothing is left behind."""
        self._driver = driver
        whole = driver.sm_resource()
        self.sms = whole.sms
        if not whole.divides:
            raise DeviceError(
                "partition", f"{whole.sms} SMs are too few for two lanes of at least {whole.minimum}"
            )
        counts = {split_sms(whole.sms, share, whole.minimum, whole.alignment) for share in prefill_shares}
        self._pairs: list[Lanes] = []
        with ExitStack() as undo:
            self._alone = TimeSlices(driver)
            undo.callback(self._alone.close)
            for count in sorted(counts):
                self._pairs.append(self._pair(whole, count, undo))
            self._undo = undo.pop_all()

    def lanes(self, prefill: float, decode: float) -> Lanes:
        check_shares(prefill, decode)
        if not prefill or not decode:
            return self._alone.lanes(prefill, decode)
        wanted = self.sms * prefill / (prefill + decode)
        return min(self._pairs, key=lambda pair: abs(pair.prefill.sms - wanted))

    def order(self, first: Lane, then: Lane) -> None:
        self._alone.order(first, then)

    def close(self) -> None:
        # Streams go before their contexts: a stream without one answers every call with an error.
        self._undo.close()

    def _pair(self, whole: SmResource, sms: int, undo: ExitStack) -> Lanes:
        least, greatest = self._driver.priorities()
        first, rest = self._driver.split(whole, sms)
        if first.sms + rest.sms > whole.sms or not rest.sms:
            raise DeviceError("partition", f"the driver made {first.sms} + {rest.sms} of {whole.sms} SMs")
        return Lanes(
            self._lane("prefill", first, least, undo.callback),
            self._lane("decode", rest, greatest, undo.callback),
        )

    def _lane(self, kind: str, resource: SmResource, priority: int, undo: Callable[..., object]) -> Lane:
        context = self._driver.green_context(resource)
        undo(self._driver.destroy_green_context, context)
        stream = self._driver.green_stream(context, priority)
        undo(self._driver.destroy_stream, stream)
        return Lane(kind, resource.sms, stream, self._driver.device)
