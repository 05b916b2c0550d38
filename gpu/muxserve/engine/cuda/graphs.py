"""`Graphs`: passes that have come up before, captured, so that a launch is one call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from muxserve.engine.cuda.device import Device
from muxserve.engine.cuda.lanes import Lane

Result = TypeVar("Result")

MOST = 128
"""Graphs that are kept. Not measured: what one takes, some hundred nodes for a model with 32 layers."""


@dataclass(slots=True)
class _Entry(Generic[Result]):
    replay: Callable[[], None] | None = None
    result: Result | None = None


class Graphs(Generic[Result]):
    """Graphs by model, what they were captured for, and lane. Those not used for longest make room.

    The first time, a pass runs as it is: that loads and compiles whatever it needs. The second time it is
    captured: most shapes that come up twice come up often. One thread runs passes; any may forget models.
    """

    def __init__(self, device: Device, most: int = MOST) -> None:
        self._device = device
        self._most = most
        self._entries: OrderedDict[tuple[str, Hashable, Lane], _Entry[Result]] = OrderedDict()
        self._lock = threading.Lock()  # of the entries, held for a look at them

    def __len__(self) -> int:
        return len(self._entries)

    def run(self, model: str, key: Hashable, lane: Lane, work: Callable[[], Result]) -> Result:
        """Put `work` on the lane. key: all that `work` depends on, but for what is in the memory it reads.
        Returns what it returned when it was captured."""
        place = (model, key, lane)
        with self._lock:
            if (entry := self._entries.get(place)) is not None:
                self._entries.move_to_end(place)
        if entry is None:
            with self._device.on(lane):
                result = work()
            with self._lock:  # only now: what grows while it runs for the first time clears all graphs
                self._entries[place] = _Entry()
                if len(self._entries) > self._most:
                    self._entries.popitem(last=False)
            return result
        if entry.replay is None:
            entry.replay = self._device.capture(lane, lambda: setattr(entry, "result", work()))
        with self._device.on(lane):
            entry.replay()
        assert entry.result is not None
        return entry.result

    def forget(self, model: str) -> None:
        """Those of a model that goes. None of them may be running."""
        with self._lock:
            for place in [place for place in self._entries if place[0] == model]:
                del self._entries[place]

    def clear(self) -> None:
        """All of them: memory that they use is no longer what others use."""
        with self._lock:
            self._entries.clear()
