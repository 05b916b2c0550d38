"""Which kernels the device was busy with, for a figure that misses what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.context import Context

MOST = 14
"""Kernels that are named; the others are summed."""


def kernels_of(context: Context, call: Callable[[], object]) -> dict[str, Any]:
    """Microseconds by kernel, and how often it ran. Empty without a GPU."""
    if not context.cuda:
        call()
        return {}
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    except Exception as error:  # a figure without its profile is better than none
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    events.sort(key=lambda event: -event.self_device_time_total)
    return {
        "total_us": sum(event.self_device_time_total for event in events),
        "others_us": sum(event.self_device_time_total for event in events[MOST:]),
        "kernels": [
            {"name": event.key[:120], "count": event.count, "us": event.self_device_time_total}
            for event in events[:MOST]
        ],
    }
