"""Compute shares: how a job gets its part of a device, and what the device offers for it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

PartitionName = Literal["threads", "none", "green_contexts", "mps"]
GREEN_CONTEXTS_DRIVER = 12040
"""CUDA 12.4, as `cudaDriverGetVersion` counts: its driver API was the first with cuGreenCtxCreate."""
MPS_PIPES = Path("/tmp/nvidia-mps")
"""Where the MPS control daemon listens unless CUDA_MPS_PIPE_DIRECTORY says otherwise."""


class Partition(Protocol):
    """A way to give a job its compute share. The worker asks for `threads` when it makes a job, the executor
    calls `apply` with that number before it runs the job."""

    @property
    def name(self) -> PartitionName:
        """As in `Ready.partition` and WorkerInfo."""

    def threads(self, share: float, cores: int) -> int:
        """Host threads for a job with `share` in (0, 1] of `cores`. Raises ValueError outside of it."""

    def apply(self, threads: int) -> None:
        """Bound what this process's next job computes with."""


class ThreadsPartition:
    """CPU: a share is a number of threads. `set_threads` is torch.set_num_threads or its like; it is called
    when the number changes only, as a thread pool may be torn down for it."""

    name: PartitionName = "threads"

    def __init__(self, set_threads: Callable[[int], object]) -> None:
        self._set_threads = set_threads
        self._current = 0

    def threads(self, share: float, cores: int) -> int:
        return share_of_cores(share, cores)

    def apply(self, threads: int) -> None:
        if threads != self._current:
            self._set_threads(threads)
            self._current = threads


class NoPartition:
    """A GPU whose jobs run beside each other as the hardware interleaves them; shares steer nothing but the
    policy's arithmetic. One host thread feeds the device."""

    name: PartitionName = "none"

    def threads(self, share: float, cores: int) -> int:
        share_of_cores(share, cores)
        return 1

    def apply(self, threads: int) -> None:
        pass


def share_of_cores(share: float, cores: int) -> int:
    """At least one core, and no more than the share of them rounded to the nearest."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share: {share} is not in (0, 1]")
    if cores < 1:
        raise ValueError(f"cores: {cores} is not positive")
    return max(1, round(share * cores))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a device offers. `partition` is what is used; `unused` what is there and not used yet."""

    partition: PartitionName
    unused: tuple[PartitionName, ...]
    reason: str


def detect(device: str, driver_version: int = 0, mps_pipes: Path = MPS_PIPES) -> Offer:
    """Choose for a device: "cpu", "cuda" or "cuda:N" (else ValueError).

    driver_version: `cudaDriverGetVersion`, 0 = no driver. On a GPU the answer is "none", honestly: green
    contexts and MPS are reported where they are there, for the log, but no lane is built on them so far.
    """
    if device == "cpu":
        return Offer("threads", (), "CPU: a share is a number of threads")
    if device != "cuda" and not device.startswith("cuda:"):
        raise ValueError(f"device: {device!r} is neither cpu nor cuda")
    unused: list[PartitionName] = []
    if driver_version >= GREEN_CONTEXTS_DRIVER:
        unused.append("green_contexts")
    if (mps_pipes / "control").exists():
        unused.append("mps")
    driver = f"CUDA {driver_version // 1000}.{driver_version % 1000 // 10} driver"
    there = f"there but not used: {', '.join(unused)}" if unused else "neither green contexts nor MPS"
    return Offer("none", tuple(unused), f"{driver}; {there}")
