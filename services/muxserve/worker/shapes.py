"""`ServedShape`: what serving a checkpoint on this worker takes, and whether its arena is large enough."""

from __future__ import annotations

from dataclasses import dataclass

from muxserve.common.errors import InvalidArgument
from muxserve.engine.messages import TensorEntry, WeightLayout
from muxserve.engine.spec import ITEMSIZE, KVLayout, ModelSpec

MIN_CONTEXT = 16
"""A model of which fewer tokens fit the arena is refused: it could not serve a sentence."""

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint's headers: enough to plan with, no tensor data."""

    spec: ModelSpec
    layout: WeightLayout
    manifest: tuple[TensorEntry, ...]
    bytes: int
    fingerprint: tuple[object, ...]
    """Equal for the same unchanged files in the same dtype: such weights are loaded once."""


@dataclass(frozen=True, slots=True)
class ServedShape:
    """A model as this worker serves it."""

    weights: Weights
    layout: KVLayout
    context_length: int
    """The checkpoint's own, or what was configured, or what the whole arena holds of one sequence."""
    slots: int


def serve(
    model: str, weights: Weights, *, block_bytes: int, blocks: int, slots: int, max_context: int
) -> ServedShape:
    """How `model` is served from an arena of `blocks` blocks. `max_context` 0 = the checkpoint's own.

    Raises InvalidArgument for field "arena" or "block_bytes", with the numbers.
    """
    spec = weights.spec
    layout = KVLayout(
        layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        block_bytes=block_bytes,
    )
    if layout.tokens_per_block < 1:
        token = 2 * spec.head_dim * ITEMSIZE[spec.dtype]
        reason = f'model "{model}" needs {token} bytes per token and KV head, a block has {block_bytes}'
        raise InvalidArgument("block_bytes", reason)
    wanted = min(spec.context_length, max_context or spec.context_length)
    held = blocks // layout.blocks_per_span * layout.tokens_per_block
    needed = min(MIN_CONTEXT, wanted)
    if held < needed:
        group = layout.blocks_per_span * block_bytes / MIB
        raise InvalidArgument(
            "arena",
            f'{blocks * block_bytes / MIB:.1f} MiB hold {held} tokens of model "{model}", not {needed}: '
            f"each {layout.tokens_per_block} tokens take {layout.blocks_per_span} blocks ({group:.1f} MiB)",
        )
    return ServedShape(weights, layout, min(wanted, held), slots)
