"""A `Device` whose work the host does at once, so that kernels can be interpreted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from muxserve.engine.cuda.device import Event
from muxserve.engine.cuda.lanes import Lane


class HostDevice:
    """A graph is its work, done again with the memory and the values it was captured with. `lanes`: what was
    put on which, captured passes in parentheses."""

    name = "host"

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.lanes: list[int] = []
        self.captures = 0
        self.replays = 0
        self._one_at_a_time = threading.RLock()  # the interpreter is not for several threads

    def enter(self) -> None:
        torch.set_num_threads(1)
        np.seterr(all="ignore")  # the interpreter computes with numpy, which warns of infinities

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        self.lanes.append(lane.handle)
        return self._one_at_a_time

    def event(self) -> Event:
        return _Past()

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def capture(self, lane: Lane, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


class _Past:
    def record(self, lane: Lane) -> None:
        pass

    def wait(self) -> None:
        pass
