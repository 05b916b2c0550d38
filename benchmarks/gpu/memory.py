"""Device memory that each model more on the same runner takes beyond its weights, graphs included."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import QWEN3_4B, TINY_SHAPES
from benchmarks.gpu.unit import Served, Unit
from muxserve.engine.checkpoint.canonical import manifest_bytes
from muxserve.engine.cuda.memory import GRANULE

MODELS = 4
"""The first one pays for what all share."""
BATCHES, LENGTHS = (1, 2, 4, 8, 16, 32), (200, 500, 1000, 2000)


def run(context: Context) -> dict[str, Any]:
    """Models are added one by one; each is run in many batches, so that it has its graphs."""
    shape = TINY_SHAPES[1] if context.tiny else QWEN3_4B
    batches, lengths = ((1,), (8,)) if context.tiny else (BATCHES, LENGTHS)
    found: dict[str, Any] = {"shape": shape.name, "models": []}
    weights = -(-manifest_bytes(shape.manifest) // GRANULE) * GRANULE
    with Unit(context, (1 << 20) if context.tiny else (10 << 30)) as unit:
        unit.open("green_contexts" if context.tiny else "none")
        last, _ = unit.runtime.memGetInfo()
        for number in range(2 if context.tiny else MODELS):
            if not context.enough(3):
                found["left_out"] = f"models from number {number} on"
                break
            context.keep(found, f"model {number}")
            model = unit.add(f"m{number}", shape, max(batches), max(lengths) + 1, number)
            before_running, _ = unit.runtime.memGetInfo()
            _use(unit, model, batches, lengths)
            now, _ = unit.runtime.memGetInfo()
            found["models"].append(
                {
                    "bytes": last - now,
                    "weights": weights,
                    "beyond_weights": last - now - weights,
                    "by_running": before_running - now,
                }
            )
            last = now
    extra = [one["beyond_weights"] for one in found["models"][1:]]
    found["most_beyond_weights"] = max(extra, default=None)
    context.keep(found)
    return found


def _use(unit: Unit, model: Served, batches: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    """Prefill and decode, each shape twice: the second time it is captured."""
    for length in lengths:
        slots = unit.place(model, [length] * max(batches))
        for batch in batches:
            for _ in range(2):
                unit.finish(unit.decode(model, dict.fromkeys(slots[:batch], length - 4), 2))
        for end in dict.fromkeys((min(20, length), length)):
            for _ in range(2):
                unit.finish(unit.prefill(model, {slots[0]: (0, end)}))
        unit.empty(model, slots)
