"""Compute shares: how a job gets its part of a device, and what the device offers for it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PartitionName = Literal["threads", "none", "green_contexts", "mps"]
GREEN_CONTEXTS_DRIVER = 12040
"""CUDA 12.4, as `cudaDriverGetVersion` counts: its driver API was the first with cuGreenCtxCreate."""
MPS_PIPES = Path("/tmp/nvidia-mps")
"""Where the MPS control daemon listens unless CUDA_MPS_PIPE_DIRECTORY says otherwise."""


def split_cores(cores: int, prefill: float, decode: float) -> tuple[int, int]:
    """Threads of a prefill job and of a decode job with these compute shares, 0 = no such job runs.

    A lone job has all cores. Two jobs have them in proportion to their shares, and at least one each.
    """
    if not prefill or not decode:
        return (cores if prefill else 0, cores if decode else 0)
    threads = max(1, min(cores - 1, round(cores * prefill / (prefill + decode))))
    return threads, max(1, cores - threads)


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
