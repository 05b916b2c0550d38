"""Whole models through the runner: decode and prefill beside what bandwidth and products allow.

A decode step reads every weight once and every sequence's KV: at the copy ceiling that takes so long, and a
step's time is compared with it. A prompt's tokens go through every product: at the ceiling of the products
that takes so long. Weights are random, of real shapes; KV is whatever lies in the blocks.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.profile import kernels_of
from benchmarks.gpu.shapes import SHAPES, TINY_SHAPES, Shape
from benchmarks.gpu.timing import graph_seconds
from benchmarks.gpu.unit import Served, Unit
from muxserve.engine.cuda.weights import DeviceWeights

HEADLINE = (32, 2048)
"""Batch and context of what is asked for."""
BATCHES, CONTEXTS = (1, 8, 32, 128), (512, 2048, 8192)
PROMPTS = ((4, 2048), (1, 8192), (16, 512), (1, 2048), (1, 128))
"""Prompts of so many tokens, in one job; the first one is the headline."""


@dataclass(frozen=True)
class Plan:
    """What is measured of each shape."""

    shapes: tuple[Shape, ...]
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int], ...]
    steps: int
    arena_bytes: int

    @staticmethod
    def of(context: Context) -> Plan:
        if context.tiny:
            return Plan(TINY_SHAPES[1:2], ((2, 24),), ((1, 9),), 2, 1 << 20)
        free, _ = torch.cuda.mem_get_info() if context.cuda else (0, 0)
        grid = [(batch, length) for length in CONTEXTS for batch in BATCHES]
        cells = tuple(dict.fromkeys((HEADLINE, *grid)))
        # What is left must hold the weights of the largest, and what passes take.
        return Plan(SHAPES, cells, PROMPTS, 32, min(90 << 30, int(free * 0.9) - (26 << 30)))


def run(context: Context) -> dict[str, Any]:
    """The headline of every shape first, then what there is time for."""
    plan = Plan.of(context)
    found: dict[str, Any] = {"arena_bytes": plan.arena_bytes, "shapes": {}, "left_out": []}
    with Unit(context, plan.arena_bytes) as unit:
        for number, shape in enumerate(plan.shapes):
            share = context.left() / (len(plan.shapes) - number)
            own: dict[str, Any] = {}
            found["shapes"][shape.name] = own
            _shape(context, unit, plan, shape, context.left() - share, found, own)
    context.keep(found)
    return found


def _shape(
    context: Context,
    unit: Unit,
    plan: Plan,
    shape: Shape,
    reserved: float,
    found: dict[str, Any],
    own: dict[str, Any],
) -> None:
    """reserved: seconds for the shapes after this one."""
    context.keep(found, f"{shape.name}: weights")
    most = max(batch for batch, _ in (*plan.decode, *plan.prefill))
    longest = max(length for _, length in (*plan.decode, *plan.prefill)) + 1
    model = unit.add(shape.name, shape, most, longest)
    own |= {
        "step_weight_bytes": shape.step_weight_bytes,
        "layer_parameters": shape.layer_parameters,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "decode": [],
        "prefill": [],
    }

    def enough(what: str) -> bool:
        if context.enough(reserved + 2):
            context.keep(found, f"{shape.name}: {what}")
            return True
        found["left_out"].append(f"{shape.name}: {what}")
        return False

    try:
        unit.open()
        own["products"] = _products(context, unit, model, (plan.decode[0][0], 4096))
        for batch, length in plan.decode:
            if enough(f"decode {batch} x {length:,}"):
                own["decode"].append(_decode(context, unit, shape, model, batch, length, plan.steps))
        for count, length in plan.prefill:
            if enough(f"prefill {count} x {length:,}"):
                own["prefill"].append(_prefill(context, unit, shape, model, count, length))
        if enough("eager"):
            own["eager"] = _eager(context, unit, shape, model, plan)
    finally:
        unit.shut()
        unit.remove(shape.name)


def _products(context: Context, unit: Unit, model: Served, rows: tuple[int, ...]) -> dict[str, float]:
    """Seconds of the products of all layers alone, and of those for logits, on the model's own weights."""
    weights = DeviceWeights.attach(model.weights.handle, model.command.weights, runtime=unit.runtime)
    try:
        tensors = weights.tensors()
        matrices = [tensors[e.name] for e in model.command.weights if len(e.shape) == 2 and "." in e.name]
        head = tensors["embed" if model.spec.tie_embeddings else "lm_head"]
        found = {}
        for count in rows:
            found[f"layers, {count} rows"] = _product_seconds(context, matrices, count)
        found[f"logits, {rows[0]} rows"] = _product_seconds(context, [head], rows[0])
        return found
    finally:
        weights.release()


def _product_seconds(context: Context, matrices: list[Tensor], rows: int) -> float:
    inputs = {
        width: torch.randn(rows, width, device=context.torch_device).to(matrices[0].dtype)
        for width in {matrix.shape[1] for matrix in matrices}
    }

    def all_of_them() -> None:
        for matrix in matrices:
            torch.mm(inputs[matrix.shape[1]], matrix.t())

    with torch.inference_mode():
        return graph_seconds(all_of_them, context.torch_device, 0.05)


def _decode(
    context: Context, unit: Unit, shape: Shape, model: Served, batch: int, length: int, steps: int
) -> dict[str, Any]:
    """Sequences that end at `length`. Two short jobs before: one compiles, one captures."""
    begin = length - steps
    try:
        slots = unit.place(model, [length] * batch)
    except MemoryError as error:
        return {"batch": batch, "context": length, "does_not_fit": str(error)}
    rows = dict.fromkeys(slots, begin)
    try:
        for _ in range(2):
            unit.finish(unit.decode(model, rows, 2))
        seconds, gaps = [], []
        for _ in range(1 if context.tiny else 2):
            job = unit.decode(model, rows, steps)
            times = unit.finish(job)
            seconds.append(job.seconds / job.steps)
            gaps += [b - a for a, b in itertools.pairwise(times)]
        profile = {}
        if (batch, length) == HEADLINE or context.tiny:
            profile = kernels_of(context, lambda: unit.finish(unit.decode(model, rows, min(8, steps))))
    finally:
        unit.empty(model, slots)
    kv = batch * (begin + steps / 2) * shape.kv_bytes_per_token
    once = min(seconds)
    limit = (shape.step_weight_bytes + kv) / context.ceiling("copy_bytes_per_s")
    return {
        "batch": batch,
        "context": length,
        "step_s": once,
        "steps_s": seconds,
        "median_step_s": statistics.median(gaps),
        "kv_bytes": kv,
        "tokens_per_s": batch / once,
        "of_bandwidth": limit / once,
        "profile": profile,
    }


def _prefill(
    context: Context, unit: Unit, shape: Shape, model: Served, count: int, length: int
) -> dict[str, Any]:
    """Prompts without a history, all in one job."""
    tokens = count * length
    slots = unit.place(model, [length] * count)
    pieces = dict.fromkeys(slots, (0, length))
    try:
        seconds = []
        for index in range(3 if context.tiny else 4 if tokens > 4096 else 7):
            job = unit.prefill(model, pieces)
            unit.finish(job)
            if index > 1:
                seconds.append(job.seconds)
        profile = {}
        if (count, length) == PROMPTS[0] or context.tiny:
            profile = kernels_of(context, lambda: unit.finish(unit.prefill(model, pieces)))
    finally:
        unit.empty(model, slots)
    once = statistics.median(seconds)
    flop = 2 * shape.layer_parameters * tokens
    attention = count * shape.attention_flop(0, length)
    rate = context.ceiling("matmul_flop_per_s")
    return {
        "prompts": count,
        "length": length,
        "job_s": once,
        "jobs_s": seconds,
        "tokens_per_s": tokens / once,
        "of_products": flop / rate / once,
        "of_products_and_attention": (flop + attention) / rate / once,
        "profile": profile,
    }


def _eager(context: Context, unit: Unit, shape: Shape, model: Served, plan: Plan) -> dict[str, Any]:
    """The same without graphs: a batch of one, and the headline; a short prompt."""
    unit.open(eager=True)
    batch, length = plan.decode[0]
    steps = min(16, plan.steps)
    return {
        "decode": [
            _decode(context, unit, shape, model, count, length, steps) for count in dict.fromkeys((1, batch))
        ],
        "prefill": [_prefill(context, unit, shape, model, 1, plan.prefill[-1][1])],
    }
