"""Attention alone: over blocks scattered through an arena, over the same KV in one piece, and torch's own.

Decode: bytes of K and V read per second, beside the copy ceiling. Prefill: operations per second, beside the
matrix products' ceiling. A call goes over as many layers, each with blocks of its own, as it takes to read
several times what the caches hold, and is replayed as a graph: to launch it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from muxserve.engine.kernels.triton.tuning import DecodeLaunch, PrefillLaunch, decode_launch, splits
from muxserve.engine.spec import ITEMSIZE

Launch = DecodeLaunch | PrefillLaunch

AT_LEAST = 384 * 2**20
"""Bytes that a call reads: several times what the largest cache holds (60 MB)."""
ROUNDS = 2
"""Layouts are measured by turns; the better of the rounds counts."""


def run(context: Context) -> dict[str, Any]:
    """Compiles everything at once first."""
    found: dict[str, Any] = {"decode": [], "prefill": [], "not_compiled": [], "left_out": []}
    groups = [*decode_cells(context), *prefill_cells(context)]
    if context.cuda:
        different = [(cell, None) for cell in {_key(c): c for group in groups for c in group}.values()]
        context.keep(found, f"compiling {len(different)} kernels")
        for (cell, _), error in side_by_side(context, compiled, different):
            if isinstance(error, Exception):
                found["not_compiled"].append({"cell": f"{cell.title}, {cell.name}", "error": str(error)})
    with torch.inference_mode():
        arena = arena_for(context, [cell for group in groups for cell in group])
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


def compiled(what: tuple[Cell, Launch | None]) -> bool:
    """Launch a cell once, with nothing to do: the code is in Triton's cache then. Raises what Triton says if
    it does not fit the device."""
    cell, launch = what
    layout = cell.layout
    arena = torch.zeros(2 * layout.block_bytes, dtype=torch.uint8, device="cuda")
    shape = (1, len(cell.pieces), layout.kv_heads, layout.spans(cell.longest))
    cache = KVCache.over(arena, torch.zeros(shape, dtype=torch.int32, device="cuda"), layout)
    empty = Cell(cell.shape, ((0, 1),) * len(cell.pieces))
    bound_call(cell, cache, Batch.of(empty, "cuda"), 0, launch)()
    torch.cuda.synchronize()
    return True


def arena_for(context: Context, cells: Sequence[Cell]) -> Tensor:
    """Full of random numbers, and a quarter larger than the most that is read."""
    needed = max(layers_of(cell) * _taken(cell) for cell in cells)
    size = -(-needed * 5 // 4 // (1 << 20)) * (1 << 20)
    arena = torch.empty(size, dtype=torch.uint8, device=context.torch_device)
    for part in torch.split(arena, 1 << 30):
        part.view(getattr(torch, cells[0].shape.dtype)).normal_()
    return arena


def _taken(cell: Cell) -> int:
    """Bytes of the blocks of one layer."""
    layout = cell.layout
    return len(cell.pieces) * layout.kv_heads * layout.spans(cell.longest) * layout.block_bytes


def layers_of(cell: Cell) -> int:
    """With blocks of their own, to be gone over by one call."""
    return max(1, min(256, -(-AT_LEAST // cell.kv_bytes))) if cell.shape.dtype == "bfloat16" else 2


def _measure(context: Context, group: tuple[Cell, ...], arena: Tensor) -> dict[str, Any]:
    first = group[0]
    layers, device = layers_of(first), context.torch_device
    batch = Batch.of(first, context.device)
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
            cache = KVCache.over(arena, table_of(cell, layers, arena, device), cell.layout)
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


def table_of(cell: Cell, layers: int, arena: Tensor, device: torch.device) -> Tensor:
    """Block ids, as the cell's order says."""
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
class Batch:
    """What goes with a cell, on its device."""

    query: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor

    @staticmethod
    def of(cell: Cell, device: str) -> Batch:
        shape, counts = cell.shape, torch.tensor([0, *(new for _, new in cell.pieces)])
        query = torch.randn(int(counts.sum()), shape.heads, shape.head_dim, device=device)
        return Batch(
            query.to(getattr(torch, shape.dtype)),
            torch.arange(len(cell.pieces), device=device),
            counts.cumsum(0).to(device),
            torch.tensor([history + new for history, new in cell.pieces], device=device),
        )


def bound_call(
    cell: Cell,
    cache: KVCache,
    batch: Batch,
    layer: int = 0,
    launch: DecodeLaunch | PrefillLaunch | None = None,
) -> Callable[[], Tensor]:
    """The kernel with its arguments. launch: instead of what the tuning table says."""
    how = (batch.query, cell.shape.head_dim**-0.5, None, None)
    if cell.decode:
        assert not isinstance(launch, PrefillLaunch)
        return lambda: decode_attention(
            cache, layer, batch.slots, batch.lengths, *how, longest=cell.longest, launch=launch
        )
    assert not isinstance(launch, DecodeLaunch)
    return lambda: prefill_attention(
        cache, layer, batch.slots, batch.starts, batch.lengths, *how, launch=launch
    )


def _layered(cell: Cell, cache: KVCache, batch: Batch, layers: int) -> Callable[[], None]:
    calls = [bound_call(cell, cache, batch, layer) for layer in range(layers)]

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
