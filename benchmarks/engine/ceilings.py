"""What this machine can do at best: `python -m benchmarks.engine.ceilings THREADS` prints it as JSON.

A process of its own for each number of threads, since libraries choose theirs once. Copy: a numpy copy of
arrays far larger than any cache, a slice of it on each thread, counting what is read and what is written.
Read: the same, summed. Matrix product: torch's bf16 `linear` for square matrices and for a layer's shapes;
the best one is the ceiling.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

COPY_BYTES = 1 << 28
COPY_REPEATS = 12
MATMUL_SECONDS = 0.4
SHAPES = ((2048, 2048, 2048), (512, 576, 3072), (512, 1536, 576))
"""(rows, inputs, outputs)."""


def best_time(parts: list[Callable[[], Any]], repeats: int) -> float:
    """Least seconds from the first part's begin to the last one's end, each on a thread of its own."""
    spans: list[list[tuple[float, float]]] = [[] for _ in parts]
    barrier = threading.Barrier(len(parts))

    def work(part: Callable[[], Any], into: list[tuple[float, float]]) -> None:
        for _ in range(repeats):
            barrier.wait()
            begun = time.perf_counter()
            part()
            into.append((begun, time.perf_counter()))

    threads = [threading.Thread(target=work, args=each) for each in zip(parts, spans, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rounds = zip(*spans, strict=True)
    return float(min(max(end for _, end in one) - min(begun for begun, _ in one) for one in rounds))


def copy_bandwidth(threads: int) -> float:
    """Bytes read and written per second by a copy."""
    source = np.ones(COPY_BYTES // 8)
    target = np.zeros_like(source)
    pairs = zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)

    def copy(to: NDArray[np.float64], of: NDArray[np.float64]) -> Callable[[], None]:
        return lambda: np.copyto(to, of)

    return 2 * COPY_BYTES / best_time([copy(*pair) for pair in pairs], COPY_REPEATS)


def read_bandwidth(threads: int) -> float:
    """Bytes read per second by a sum."""
    source = np.ones(COPY_BYTES // 8)
    return COPY_BYTES / best_time([part.sum for part in np.array_split(source, threads)], COPY_REPEATS)


def matmul(threads: int) -> dict[str, float]:
    """Operations per second of bf16 products, by shape."""
    import torch

    torch.set_num_threads(threads)
    found = {}
    for rows, inputs, outputs in SHAPES:
        left = torch.randn(rows, inputs).bfloat16()
        right = torch.randn(outputs, inputs).bfloat16()
        least, end = float("inf"), time.perf_counter() + MATMUL_SECONDS
        while time.perf_counter() < end:
            begun = time.perf_counter()
            torch.nn.functional.linear(left, right)
            least = min(least, time.perf_counter() - begun)
        found[f"{rows}x{inputs}x{outputs}"] = 2 * rows * inputs * outputs / least
    return found


def measure(threads: int) -> dict[str, Any]:
    """All of them: bytes per second, operations per second."""
    products = matmul(threads)
    return {
        "threads": threads,
        "copy_bytes_per_s": copy_bandwidth(threads),
        "read_bytes_per_s": read_bandwidth(threads),
        "matmul_flop_per_s": max(products.values()),
        "matmul_by_shape": products,
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
