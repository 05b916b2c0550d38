"""Attention alone: over blocks scattered through an arena, over the same KV in one piece, and torch's own.

Decode: bytes of K and V read per second, beside the copy ceiling. Prefill: operations per second, beside the
matrix products' ceiling. A call goes over as many layers, each with blocks of its own, as it takes to read
several times what the caches hold, and is replayed as a graph: to launch it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.attention_cells import Cell, decode_cells, prefill_cells
from benchmarks.gpu.context import Context
from benchmarks.gpu.side import side_by_side
from benchmarks.gpu.timing import graph_seconds
from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.kernels.triton.decode import decode_attention
from muxserve.engine.kernels.triton.prefill import prefill_attention
from muxserve.engine.kernels.triton.tuning import decode_launch, splits
from muxserve.engine.spec import ITEMSIZE

AT_LEAST = 384 * 2**20
"""Bytes that a call reads: several times what the largest cache holds (60 MB)."""
ROUNDS = 2
"""Layouts are measured by turns; the better of the rounds counts."""


def run(context: Context) -> dict[str, Any]:
    """Compiles everything at once first."""
    found: dict[str, Any] = {"decode": [], "prefill": [], "not_compiled": [], "left_out": []}
    groups = [*decode_cells(context), *prefill_cells(context)]
    if context.cuda:
        different = list({_key(cell): cell for group in groups for cell in group}.values())
        context.keep(found, f"compiling {len(different)} kernels")
        for cell, error in side_by_side(context, compile_cell, different):
            if isinstance(error, Exception):
                found["not_compiled"].append({"cell": f"{cell.title}, {cell.name}", "error": str(error)})
    with torch.inference_mode():
        arena = _arena(context, groups)
        for group in groups:
            if not context.enough(3):
                found["left_out"].append(group[0].title)
                continue
            kind = "decode" if group[0].decode else "prefill"
            context.keep(found, f"{kind} attention: {group[0].title}")
            found[kind].append(_measure(context, group, arena))
    context.keep(found)
    return found


def _key(cell: Cell) -> tuple[object, ...]:
    """Cells for which the same code is compiled."""
    shape, group = cell.shape, cell.shape.heads // cell.shape.kv_heads
    fixed = (cell.decode, cell.layout.tokens_per_block, group, shape.dtype)
    if not cell.decode:
        return fixed
    device = torch.device("cuda")
    launch = decode_launch(device, shape.head_dim, group, ITEMSIZE[shape.dtype])
    rows = len(cell.pieces) * shape.kv_heads
    return (*fixed, splits(device, launch, rows, cell.longest))


def compile_cell(cell: Cell) -> bool:
    """Launch it once, with nothing to do, in a process of its own: the code is in Triton's cache then."""
    layout = cell.layout
    arena = torch.zeros(2 * layout.block_bytes, dtype=torch.uint8, device="cuda")
    spans = layout.spans(cell.longest)
    table = torch.zeros(1, len(cell.pieces), layout.kv_heads, spans, dtype=torch.int32, device="cuda")
    empty = Cell(cell.shape, ((0, 1),) * len(cell.pieces))
    _call(cell, KVCache.over(arena, table, layout), _Batch.of(empty, "cuda"))()
    torch.cuda.synchronize()
    return True


def _arena(context: Context, groups: list[tuple[Cell, ...]]) -> Tensor:
    """Full of random numbers, and a quarter larger than the most that is read."""
    needed = max(_layers(cell) * _taken(cell) for group in groups for cell in group)
    size = -(-needed * 5 // 4 // (1 << 20)) * (1 << 20)
    arena = torch.empty(size, dtype=torch.uint8, device=context.torch_device)
    for part in torch.split(arena, 1 << 30):
        part.view(getattr(torch, groups[0][0].shape.dtype)).normal_()
    return arena


def _taken(cell: Cell) -> int:
    """Bytes of the blocks of one layer."""
    layout = cell.layout
    return len(cell.pieces) * layout.kv_heads * layout.spans(cell.longest) * layout.block_bytes


def _layers(cell: Cell) -> int:
    return max(1, min(256, -(-AT_LEAST // cell.kv_bytes))) if cell.shape.dtype == "bfloat16" else 2


def _measure(context: Context, group: tuple[Cell, ...], arena: Tensor) -> dict[str, Any]:
    first = group[0]
    layers, device = _layers(first), context.torch_device
    batch = _Batch.of(first, context.device)
    found: dict[str, Any] = {
        "shape": first.shape.name,
        "title": first.title,
        "sequences": len(first.pieces),
        "pieces": [list(first.pieces[0])],
        "layers": layers,
        "kv_bytes": first.kv_bytes,
        "flop": first.flop,
        "seconds": {},
    }
    for _ in range(ROUNDS):
        for cell in group:
            cache = KVCache.over(arena, _table(cell, layers, arena, device), cell.layout)
            once = graph_seconds(_layered(cell, cache, batch, layers), device, 0.03) / layers
            found["seconds"][cell.name] = min(once, found["seconds"].get(cell.name, once))
    try:
        once = graph_seconds(_torchs(first, arena, layers), device, 0.03) / layers
        found["seconds"]["torch"] = once
    except RuntimeError as error:  # it may have no kernel for this; and what it cannot do is no fault of ours
        found["torch_error"] = str(error)[:500]
    own = found["seconds"][first.name]
    found["vs_contiguous"] = found["seconds"]["contiguous"] / own
    if first.decode:
        found["bytes_per_s"] = first.kv_bytes / own
        found["of_copy"] = found["bytes_per_s"] / context.ceiling("copy_bytes_per_s")
    else:
        found["flop_per_s"] = first.flop / own
        found["of_matmul"] = found["flop_per_s"] / context.ceiling("matmul_flop_per_s")
    return found


def _table(cell: Cell, layers: int, arena: Tensor, device: torch.device) -> Tensor:
    layout = cell.layout
    shape = (layers, len(cell.pieces), layout.kv_heads, layout.spans(cell.longest))
    count = math.prod(shape)
    if cell.order == "scattered":
        generator = torch.Generator(device).manual_seed(1)
        ids = torch.randperm(arena.numel() // layout.block_bytes, generator=generator, device=device)[:count]
    else:
        ids = torch.arange(count, device=device)
    return ids.int().view(shape)


@dataclass(frozen=True)
class _Batch:
    """What goes with a cell, on its device."""

    query: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor

    @staticmethod
    def of(cell: Cell, device: str) -> _Batch:
        shape, counts = cell.shape, torch.tensor([0, *(new for _, new in cell.pieces)])
        query = torch.randn(int(counts.sum()), shape.heads, shape.head_dim, device=device)
        return _Batch(
            query.to(getattr(torch, shape.dtype)),
            torch.arange(len(cell.pieces), device=device),
            counts.cumsum(0).to(device),
            torch.tensor([history + new for history, new in cell.pieces], device=device),
        )


def _call(cell: Cell, cache: KVCache, batch: _Batch, layer: int = 0) -> Callable[[], Tensor]:
    scale = cell.shape.head_dim**-0.5
    if cell.decode:
        return lambda: decode_attention(
            cache, layer, batch.slots, batch.lengths, batch.query, scale, None, None, longest=cell.longest
        )
    return lambda: prefill_attention(
        cache, layer, batch.slots, batch.starts, batch.lengths, batch.query, scale, None, None
    )


def _layered(cell: Cell, cache: KVCache, batch: _Batch, layers: int) -> Callable[[], None]:
    calls = [_call(cell, cache, batch, layer) for layer in range(layers)]

    def all_layers() -> None:
        for call in calls:
            call()

    return all_layers


def _torchs(cell: Cell, arena: Tensor, layers: int) -> Callable[[], None]:
    """torch's attention over contiguous K and V, where all sequences are of one length."""
    shape, count, (history, new) = cell.shape, len(cell.pieces), cell.pieces[0]
    if history and new > 1:
        raise RuntimeError("torch has no causal attention with a history that needs no mask in memory")
    if len(set(cell.pieces)) > 1:
        raise RuntimeError("sequences of several lengths")
    typed = arena.view(getattr(torch, shape.dtype))
    sizes = (layers, 2, count, shape.kv_heads, history + new, shape.head_dim)
    kv = typed[: math.prod(sizes)].view(sizes)
    query = torch.randn(count, shape.heads, new, shape.head_dim, device=arena.device).to(typed.dtype)

    def all_layers() -> None:
        for keys, values in kv:
            F.scaled_dot_product_attention(query, keys, values, is_causal=new > 1, enable_gqa=True)

    return all_layers
