"""Launch parameters of attention, tried out: prints entries for `kernels/triton/tuning.py`.

Not in the default run. Candidates are compiled by several processes; those that do not fit the device are
left out. Each is timed on a few shapes, and the least product of times wins. What is there now is among them:
an entry says what it gains over that.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attention import Batch, Launch, arena_for, bound_call, compiled, layers_of, table_of
from benchmarks.gpu.attention_cells import Cell
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import TINY_SHAPES, Shape
from benchmarks.gpu.side import side_by_side
from benchmarks.gpu.timing import graph_seconds
from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.kernels.triton.tuning import (
    DecodeLaunch,
    decode_launch,
    device_class,
    prefill_launch,
)
from muxserve.engine.spec import ITEMSIZE

HEADS = ((128, 4), (128, 1), (64, 3), (64, 1), (256, 2), (128, 8))
"""(head size, group), what counts most first."""


def run(context: Context) -> dict[str, Any]:
    """Kind by kind and head by head, as far as time goes."""
    found: dict[str, Any] = {"entries": [], "tried": [], "left_out": []}
    heads = ((64, 2),) if context.tiny else HEADS
    work = list(itertools.product(("decode", "prefill"), heads))
    for number, (kind, (dim, group)) in enumerate(work):
        each = context.left() / (len(work) - number)
        if each < 8 and not context.tiny:
            found["left_out"].append(f"{kind} {dim} {group}")
            continue
        context.keep(found, f"{kind}, head size {dim}, group {group}")
        cells = _cells(context, kind, dim, group)
        with torch.inference_mode():
            _tune(context, kind, cells, each, found)
    context.keep(found)
    return found


def _cells(context: Context, kind: str, dim: int, group: int) -> list[Cell]:
    if context.tiny:
        return [Cell(TINY_SHAPES[0], ((22, 1), (6, 1)) if kind == "decode" else ((3, 9),), block_bytes=4096)]
    kv_heads = 32 // group if group < 3 else 8
    shape = Shape("", 1, 1024, 1024, kv_heads * group, kv_heads, dim, 1024)
    if kind == "decode":
        return [
            Cell(shape, ((length - 1, 1),) * batch) for batch, length in ((32, 2048), (4, 8192), (128, 512))
        ]
    return [Cell(shape, pieces) for pieces in (((0, 2048),) * 4, ((4096, 512),) * 4)]


def _candidates(context: Context, kind: str, now: Launch) -> list[Launch]:
    if isinstance(now, DecodeLaunch):
        if context.tiny:
            return [now, replace(now, keys=16)]
        tiles = itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4))
        return [now, *(replace(now, keys=k, warps=w, stages=s) for k, w, s in tiles)]
    if context.tiny:
        return [now]
    prefills = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))
    return [now, *(replace(now, rows=r, keys=k, warps=w, stages=s) for r, k, w, s in prefills)]


def _tune(context: Context, kind: str, cells: list[Cell], seconds: float, found: dict[str, Any]) -> None:
    shape, device = cells[0].shape, context.torch_device
    group, itemsize = shape.heads // shape.kv_heads, ITEMSIZE[shape.dtype]
    look_up = decode_launch if kind == "decode" else prefill_launch
    now: Launch = look_up(device, shape.head_dim, group, itemsize)
    arena = arena_for(context, cells)
    best, times = _best(context, cells, arena, _candidates(context, kind, now), found)
    if isinstance(best, DecodeLaunch) and not context.tiny:
        cuts = itertools.product((128, 256, 512), (2, 4, 8), (16, 32, 64))
        finer = [replace(best, least_keys=k, programs=p, most_splits=m) for k, p, m in cuts]
        best, more = _best(context, cells, arena, [best, *finer], found)
        times |= more
    name = device_class(device) if context.cuda else "other"
    values = ", ".join(map(str, astuple(best)))
    gain = times[now] / times[best]
    entry = f'("{name}", {shape.head_dim}, {group}): {type(best).__name__}({values}),  # {gain:.2f} x'
    found["entries"].append(entry)


def _best(
    context: Context, cells: list[Cell], arena: Tensor, launches: list[Launch], found: dict[str, Any]
) -> tuple[Launch, dict[Launch, float]]:
    """The fastest, and the geometric mean of the seconds of each that runs on all cells."""
    launches = list(dict.fromkeys(launches))
    works = set(launches)
    if context.cuda:
        trials = [(cell, launch) for launch in launches for cell in cells]
        fits = Counter(
            launch
            for (_, launch), error in side_by_side(context, compiled, trials)
            if not isinstance(error, Exception)
        )
        works = {launch for launch, count in fits.items() if count == len(cells)}
    times: dict[Launch, float] = {}
    for launch in launches:
        if launch not in works:
            continue
        each = [_seconds(context, cell, arena, launch) for cell in cells]
        times[launch] = math.exp(sum(map(math.log, each)) / len(each))
        found["tried"].append(
            {"cells": [cell.title for cell in cells], "launch": repr(launch), "seconds": each}
        )
    return min(times, key=lambda launch: times[launch]), times


def _seconds(context: Context, cell: Cell, arena: Tensor, launch: Launch) -> float:
    layers, device = layers_of(cell), context.torch_device
    cache = KVCache.over(arena, table_of(cell, layers, arena, device), cell.layout)
    batch = Batch.of(cell, context.device)
    calls = [bound_call(cell, cache, batch, layer, launch) for layer in range(layers)]

    def all_layers() -> None:
        for call in calls:
            call()

    return graph_seconds(all_layers, device, 0.01) / layers
