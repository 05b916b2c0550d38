"""Compute shares: how a job gets its part of a device, by means that are chosen at start. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PartitionName = Literal["threads", "none", "green_contexts", "mps"]
GREEN_CONTEXTS_DRIVER = 12040
"""CUDA 12.4, as `cuDriverGetVersion` counts: the first driver with cuGreenCtxCreate."""


def split_cores(cores: int, prefill: float, decode: float, decoding: int = 1) -> tuple[int, int]:
    """Threads of a prefill job and of each of `decoding` decode jobs with these compute shares, 0 = no such
    job runs.

    A lone job has all cores. Both kinds have them in proportion to their shares, decode jobs equal parts of
    theirs, and every job at least one.
    """
    if not prefill or not decode:
        return (cores if prefill else 0, max(1, cores // decoding) if decode else 0)
    threads = max(1, min(cores - 1, round(cores * prefill / (prefill + decode))))
    return threads, max(1, (cores - threads) // decoding)


def decode_room(cores: int, lanes: int, prefill: float) -> int:
    """Decode jobs that may run at once in so many lanes beside a prefill job with this compute share, 0 =
    none runs. No more than cores are left: two jobs on one core would only spoil each other's caches."""
    if not prefill:
        return lanes
    return max(1, min(lanes, cores - split_cores(cores, prefill, max(0.0, 1 - prefill) or prefill)[0]))


def split_sms(total: int, share: float, minimum: int, alignment: int) -> int:
    """SMs of the first of two lanes, which is to have `share` of `total`; the other has all others.

    A multiple of `alignment`, and both have at least `minimum`. Raises ValueError where that cannot be.
    """
    least = -(-minimum // alignment) * alignment
    most = (total - minimum) // alignment * alignment
    if most < least:
        raise ValueError(f"partition: {total} SMs do not divide into two lanes of at least {minimum}")
    return max(least, min(most, round(total * share / alignment) * alignment))


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a GPU, see `muxserve.engine.cuda.probe`."""

    driver_version: int = 0
    """As `cuDriverGetVersion` counts; 0 = no driver, or no bindings to ask it with."""
    sms: int = 0
    lane_sms: int = 0
    """Fewest SMs of a green context; 0 = the driver does not make any."""
    mps: bool = False
    """The MPS control program is installed."""
    missing: str = ""
    """Why something is not there, for people."""


@dataclass(frozen=True, slots=True)
class Offer:
    """`partition` is what is used; `unused` what is there and is not. reason: one line, for the log."""

    partition: PartitionName
    unused: tuple[PartitionName, ...]
    reason: str
    asked: bool = False
    """By name: then nothing else will do."""


def cuda_index(device: str) -> int:
    """Of "cuda" (0) or "cuda:N". Raises ValueError that begins with "device" for anything else."""
    kind, colon, number = device.partition(":")
    if kind != "cuda" or not (number.isdecimal() if colon else True):
        raise ValueError(f"device: {device!r} is neither cpu nor cuda")
    return int(number or 0)


def detect(
    device: str, found: Found | None = None, wanted: PartitionName | Literal["auto"] = "auto"
) -> Offer:
    """Choose for a device: "cpu", "cuda" or "cuda:N".

    By itself it takes green contexts, whose shares change with each job and which need one process only, and
    time slicing where there are none. MPS wants a daemon, and is taken only if asked for. Raises ValueError,
    which begins with the setting at fault, for another device, or a wish that cannot be met.
    """
    if device == "cpu":
        if wanted not in ("auto", "threads"):
            raise ValueError(f"partition: {wanted} is for a GPU; a CPU has threads")
        return Offer("threads", (), "CPU: a share is a number of threads")
    cuda_index(device)
    found = found or Found()
    offered, lacking = _offered(found)
    chosen: PartitionName = offered[0] if wanted == "auto" else wanted
    if chosen not in offered:
        raise ValueError(f"partition: {chosen} cannot be had: {lacking.get(chosen, 'it is for a CPU')}")
    unused = tuple(name for name in offered if name not in (chosen, "none"))
    version = f"CUDA {found.driver_version // 1000}.{found.driver_version % 1000 // 10}"
    parts = [f"{version} driver, {found.sms} SMs: {_MEANING[chosen]}"]
    parts += ["as asked for"] if wanted != "auto" else []
    parts += [f"not used: {', '.join(unused)}"] if unused else []
    parts += [f"no {name}: {why}" for name, why in lacking.items()]
    return Offer(chosen, unused, "; ".join(parts), asked=wanted != "auto")


_MEANING: dict[PartitionName, str] = {
    "none": "jobs share all SMs by time slices",
    "green_contexts": "a share is a green context's SMs",
    "mps": "a share is a process's percentage of the SMs",
}


def _offered(found: Found) -> tuple[list[PartitionName], dict[PartitionName, str]]:
    """What can be had, best first as far as nobody has asked, and why others cannot."""
    offered: list[PartitionName] = []
    lacking: dict[PartitionName, str] = {}
    if not found.lane_sms:
        needs = f"the driver is older than CUDA {GREEN_CONTEXTS_DRIVER // 1000}.4"
        old = 0 < found.driver_version < GREEN_CONTEXTS_DRIVER
        lacking["green_contexts"] = needs if old else found.missing or "the driver makes none"
    elif found.sms < 2 * found.lane_sms:
        lacking["green_contexts"] = f"{found.sms} SMs are too few for two lanes of {found.lane_sms}"
    else:
        offered.append("green_contexts")
    offered.append("none")
    if found.mps:
        offered.append("mps")
    else:
        lacking["mps"] = "nvidia-cuda-mps-control is not installed"
    return offered, lacking
