"""How kernels are launched: a table, looked up when a kernel is launched or captured; serving never tunes it.

Keys are the device's class, the kernel, the head size, and the group (query heads per KV head; None = any).
NOT MEASURED: until a benchmark on such a device says otherwise, these are first values from what the kernels
need: enough loads in flight for the memory's latency in decode, tiles that fill the tensor cores and no more
shared memory than there is (227 KiB on these devices) in prefill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from muxserve.engine.kernels.triton.language import next_power_of_2

DeviceClass = Literal["h100", "h200", "other"]

SMS: dict[DeviceClass, int] = {"h100": 132, "h200": 132, "other": 108}
"""Streaming multiprocessors, for sizing grids; no need to be exact."""


@dataclass(frozen=True, slots=True)
class WriteLaunch:
    """heads: of one token, in a program."""

    heads: int
    warps: int


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """keys: of a tile. least_keys: a split with fewer is not worth merging. programs: how many for each
    multiprocessor to aim at when splitting; most_splits: bounds the merge."""

    keys: int
    warps: int
    stages: int
    least_keys: int
    programs: int
    most_splits: int = 32


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """rows: of a tile of queries (query tokens × group); keys: of a tile of keys."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """Kernels that go through rows of a matrix. block: elements at a time; warps."""

    block: int
    warps: int


Key = tuple[DeviceClass, int, int | None]

_DECODE: dict[Key, DecodeLaunch] = {
    ("h200", 64, None): DecodeLaunch(128, 4, 3, 512, 4),
    ("h200", 128, None): DecodeLaunch(64, 4, 4, 256, 4),
    ("h200", 256, None): DecodeLaunch(32, 4, 3, 256, 3),
    ("h100", 64, None): DecodeLaunch(128, 4, 3, 512, 4),
    ("h100", 128, None): DecodeLaunch(64, 4, 3, 256, 4),
    ("h100", 256, None): DecodeLaunch(32, 4, 3, 256, 3),
    ("other", 64, None): DecodeLaunch(64, 4, 2, 256, 2),
    ("other", 128, None): DecodeLaunch(32, 4, 2, 256, 2),
    ("other", 256, None): DecodeLaunch(16, 4, 2, 256, 2),
}
_PREFILL: dict[Key, PrefillLaunch] = {
    ("h200", 64, None): PrefillLaunch(128, 128, 8, 3),
    ("h200", 128, None): PrefillLaunch(128, 64, 8, 3),
    ("h200", 256, None): PrefillLaunch(128, 32, 8, 2),
    ("h100", 64, None): PrefillLaunch(128, 128, 8, 3),
    ("h100", 128, None): PrefillLaunch(128, 64, 8, 3),
    ("h100", 256, None): PrefillLaunch(128, 32, 8, 2),
    ("other", 64, None): PrefillLaunch(64, 64, 4, 2),
    ("other", 128, None): PrefillLaunch(64, 32, 4, 2),
    ("other", 256, None): PrefillLaunch(32, 16, 4, 2),
}


@cache
def device_class(device: torch.device) -> DeviceClass:
    """By the device's name; what is not a GPU is "other"."""
    if device.type != "cuda":
        return "other"
    name = torch.cuda.get_device_name(device)
    return "h200" if "H200" in name else "h100" if "H100" in name else "other"


def _padded(head_dim: int) -> int:
    return max(64, next_power_of_2(head_dim))


def decode_launch(device: torch.device, head_dim: int, group: int, itemsize: int) -> DecodeLaunch:
    """Of decode attention. KeyError for a head size above 256."""
    kind, head = device_class(device), _padded(head_dim)
    found = _DECODE.get((kind, head, group)) or _DECODE[kind, head, None]
    if itemsize > 2:  # float32 is there for tests: fit it into shared memory
        found = replace(found, keys=max(16, found.keys // 2), stages=2)
    return found


def prefill_launch(device: torch.device, head_dim: int, group: int, itemsize: int) -> PrefillLaunch:
    """Of prefill attention; at least one query's group fits a tile. KeyError for a head size above 256."""
    kind, head = device_class(device), _padded(head_dim)
    found = _PREFILL.get((kind, head, group)) or _PREFILL[kind, head, None]
    if itemsize > 2:
        found = replace(found, rows=32, keys=16, warps=4, stages=1)
    return replace(found, rows=max(found.rows, next_power_of_2(group)))


def splits(device: torch.device, launch: DecodeLaunch, rows: int, longest: int) -> int:
    """How many parts to cut contexts into, for `rows` = sequences × KV heads of at most `longest` keys."""
    wanted = -(-SMS[device_class(device)] * launch.programs // max(1, rows))
    return max(1, min(wanted, launch.most_splits, -(-longest // launch.least_keys)))


def write_launch(device: torch.device, head_dim: int) -> WriteLaunch:
    """Of the KV write: 2,048 elements in a program."""
    return WriteLaunch(max(1, 2048 // _padded(head_dim)), 4)


def norm_launch(size: int) -> RowLaunch:
    """Of a norm over rows of `size`, each held by one program."""
    block = next_power_of_2(size)
    return RowLaunch(block, max(1, min(16, block // 512)))


GATE = RowLaunch(1024, 4)
SAMPLE = RowLaunch(4096, 16)
