"""`Device`: what the runner needs of torch on a GPU: streams, events, graphs, pinned memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from muxserve.engine.cuda.lanes import Lane


class Event(Protocol):
    """A point in a lane's work. The host waits for it asleep, the interpreter's lock released."""

    def record(self, lane: Lane) -> None:
        """The point is here: after all that was put on the lane so far."""

    def wait(self) -> None:
        """Return when the lane has got there."""


class Device(Protocol):
    """One GPU, for threads that have called `enter`."""

    @property
    def torch(self) -> torch.device: ...

    @property
    def name(self) -> str: ...

    def enter(self) -> None:
        """Make it this thread's device."""

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        """What torch and Triton are asked for inside is put on the lane."""

    def event(self) -> Event: ...

    def pinned(self, size: int) -> Tensor:
        """uint8 `[size]` of host memory that copies go from and to while the host goes on."""

    def capture(self, lane: Lane, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a graph: does not run it; a call of the result does. It has run on the lane before, so
        that nothing is compiled, loaded or allocated by it. What it puts on the lane depends on no value on
        the device, and what it has taken from memory stays where it is."""


class TorchDevice:
    """Implements `Device`."""

    def __init__(self, index: int) -> None:
        self.torch = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self._streams: dict[Lane, torch.cuda.Stream] = {}
        self._pools: dict[int, Any] = {}

    def enter(self) -> None:
        torch.cuda.set_device(self.torch)

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream(lane))

    def event(self) -> Event:
        return _TorchEvent(self._stream)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def capture(self, lane: Lane, work: Callable[[], None]) -> Callable[[], None]:
        # torch.cuda.graph would wait for the whole device, neighbours included, and empty torch's caches.
        graph, thread = torch.cuda.CUDAGraph(), threading.get_ident()
        # What a product needs on its way is the same memory for all graphs of a thread: they run in turn.
        pool = self._pools.setdefault(thread, torch.cuda.graph_pool_handle())
        with ExitStack() as stack:
            stack.enter_context(self.on(lane))
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            stack.callback(graph.capture_end)
            work()
        return graph.replay

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        found = self._streams.get(lane)
        if found is None:
            found = self._streams[lane] = lane.stream
        return found


class _TorchEvent:
    """Implements `Event`."""

    def __init__(self, stream_of: Callable[[Lane], torch.cuda.Stream]) -> None:
        self._stream_of = stream_of
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def record(self, lane: Lane) -> None:
        self._event.record(self._stream_of(lane))

    def wait(self) -> None:
        self._event.synchronize()
