"""How long device work takes: by CUDA's events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait for all that was begun."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device, budget: float = 0.1, least: int = 5, most: int = 200) -> float:
    """Median time of one call, of so many as fit the budget, after one that does not count. On a CPU, where
    time says nothing here, of one.

    What a call does on the device has to take longer than to launch it: else put many into one (`captured`).
    """
    call()
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    once = max(time.perf_counter() - begun, 1e-6)
    if device.type != "cuda":
        return once
    count = max(least, min(most, int(budget / once)))
    return statistics.median(_times(call, device, count))


def _times(call: Call, device: torch.device, count: int) -> list[float]:
    event: Callable[..., Any] = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph: what it takes to launch does not count. On a CPU, the call itself.

    Called twice before, so that all is compiled; what it allocates stays allocated as long as the result.
    """
    if device.type != "cuda":
        return call
    new_stream: Callable[..., Any] = torch.cuda.Stream
    stream = new_stream(device)
    torch.cuda.synchronize(device)  # what the call reads may just be written, on another stream
    with torch.cuda.stream(stream):
        call()
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def graph_seconds(call: Call, device: torch.device, budget: float = 0.05) -> float:
    """Median time of the call, replayed as a graph."""
    replay = captured(call, device)
    found = seconds(replay, device, budget)
    del replay
    return found
